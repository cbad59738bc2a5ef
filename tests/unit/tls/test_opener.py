from __future__ import annotations

import pickle
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from ztunnel.errors import TlsError
from ztunnel.tls.alerts import Alert
from ztunnel.tls.opener import BARREN_RECORDS_MAX, Opener
from ztunnel.tls.sealer import Sealer

SUITE = "TLS_AES_128_GCM_SHA256"
SECRET = bytes(range(32))
OUT = memoryview(bytearray(1 << 18))
TICKET = b"\x04\x00\x00\x05abcde"


def a_pair() -> tuple[Sealer, Opener]:
    return Sealer(SECRET, SUITE), Opener(SECRET, SUITE)


def record(sealer: Sealer, inner: bytes) -> bytes:
    """Seal any inner plaintext, that is, content, type and padding."""
    return sealer.seal_record(inner[:-1], inner[-1:])


def open_all(opener: Opener, raw: bytes) -> bytes:
    consumed, produced = opener.open(memoryview(raw), OUT)
    assert consumed == len(raw)
    return bytes(OUT[:produced])


@pytest.mark.parametrize(
    ("inner", "code"),
    [
        pytest.param(bytes(5), Alert.UNEXPECTED_MESSAGE, id="no content type"),
        pytest.param(b"x" * 16385 + b"\x17", Alert.RECORD_OVERFLOW, id="too long"),
        pytest.param(b"x" * 16385 + b"\x17\0", Alert.RECORD_OVERFLOW, id="too long, padded"),
        pytest.param(b"\x14\0\0\0\x16", Alert.UNEXPECTED_MESSAGE, id="late Finished"),
        pytest.param(b"\x0d\0\0\0\x16", Alert.UNEXPECTED_MESSAGE, id="CertificateRequest"),
        pytest.param(b"\x18\0\0\x01\x02\x16", Alert.ILLEGAL_PARAMETER, id="KeyUpdate value"),
        pytest.param(b"\x18\0\0\x02\0\0\x16", Alert.DECODE_ERROR, id="KeyUpdate length"),
        pytest.param(b"\x18\0\0\x01\0\x04\x16", Alert.UNEXPECTED_MESSAGE, id="KeyUpdate inside"),
        pytest.param(b"\x04\x01\0\x01\x16", Alert.DECODE_ERROR, id="huge message"),
        pytest.param(b"\x16", Alert.UNEXPECTED_MESSAGE, id="empty handshake record"),
        pytest.param(b"\x01\x14", Alert.UNEXPECTED_MESSAGE, id="sealed CCS"),
        pytest.param(b"\x01\x15", Alert.DECODE_ERROR, id="short alert"),
        pytest.param(b"\x01\x00\x00\x15", Alert.DECODE_ERROR, id="long alert"),
        pytest.param(b"abc\x18", Alert.UNEXPECTED_MESSAGE, id="heartbeat"),
    ],
)
def test_a_record_that_breaks_the_rules_gets_the_right_alert(inner: bytes, code: Alert) -> None:
    sealer, opener = a_pair()
    with pytest.raises(TlsError) as caught:
        open_all(opener, record(sealer, inner))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        pytest.param(b"\x15\3\3\0\2\2\x28", Alert.UNEXPECTED_MESSAGE, id="plaintext alert"),
        pytest.param(b"\x14\3\3\0\1\1", Alert.UNEXPECTED_MESSAGE, id="late CCS"),
        pytest.param(b"GET / HTTP/1.1", Alert.UNEXPECTED_MESSAGE, id="plaintext"),
        pytest.param(b"\x17\3\3\x41\x01", Alert.RECORD_OVERFLOW, id="longer than allowed"),
        pytest.param(b"\x17\3\3\0\x0f" + bytes(15), Alert.DECODE_ERROR, id="shorter than a tag"),
        pytest.param(b"\x17\3\3\0\x10" + bytes(16), Alert.UNEXPECTED_MESSAGE, id="only a tag"),
        pytest.param(b"\x17\3\3\0\x20" + bytes(32), Alert.BAD_RECORD_MAC, id="forged"),
    ],
)
def test_bytes_that_are_no_record_of_the_peer_get_the_right_alert(raw: bytes, code: Alert) -> None:
    with pytest.raises(TlsError) as caught:
        open_all(a_pair()[1], raw)
    assert caught.value.code == code


def test_a_forged_record_uses_up_no_sequence_number() -> None:
    sealer, opener = a_pair()
    good = sealer.seal(b"hello")
    for at in range(5, len(good)):
        forged = bytearray(good)
        forged[at] ^= 1
        with pytest.raises(TlsError, match="bad record MAC"):
            open_all(opener, bytes(forged))
    assert open_all(opener, good) == b"hello"


def test_a_replayed_or_missing_record_is_refused() -> None:
    sealer, opener = a_pair()
    first, _, third = (sealer.seal(bytes((n,))) for n in range(3))
    open_all(opener, first)
    for wrong in (first, third):
        with pytest.raises(TlsError, match="bad record MAC"):
            open_all(opener, wrong)


@pytest.mark.parametrize("padding", [0, 1, 300])
def test_padding_is_taken_off(padding: int) -> None:
    sealer, opener = a_pair()
    sealed = record(sealer, b"one\x17" + bytes(padding)) + record(sealer, b"two\x17")
    assert open_all(opener, sealed) == b"onetwo"


def test_data_may_end_in_zeros_and_in_what_looks_like_a_type() -> None:
    sealer, opener = a_pair()
    assert open_all(opener, sealer.seal(b"x\x17\x15\x00\x00")) == b"x\x17\x15\x00\x00"


@given(cuts=st.lists(st.integers(0, 300), max_size=12))
def test_a_stream_opens_the_same_however_it_is_cut(cuts: list[int]) -> None:
    sealer, opener = a_pair()
    wire = b"".join(
        (sealer.seal(b"a" * 30), record(sealer, TICKET + b"\x16"), sealer.seal(b"b" * 40),
         record(sealer, b"ccc\x17\0\0"), sealer.key_update(), sealer.seal(b"d" * 50))
    )  # fmt: skip
    edges = sorted({0, len(wire), *(min(cut, len(wire)) for cut in cuts)})
    rest, got = b"", b""
    for start, end in pairwise(edges):
        rest += wire[start:end]
        consumed, produced = opener.open(memoryview(rest), OUT)
        rest, got = rest[consumed:], got + bytes(OUT[:produced])
    assert got == b"a" * 30 + b"b" * 40 + b"ccc" + b"d" * 50
    assert rest == b""
    assert (opener.tickets, opener.updates) == (1, 1)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_only_tls_errors(raw: bytes) -> None:
    try:
        outcome = a_pair()[1].open(memoryview(raw), OUT)
    except TlsError as error:
        outcome = error.code
    assert outcome == (0, 0) or outcome in list(Alert)


@given(st.lists(st.binary(min_size=1, max_size=60), max_size=40))
def test_arbitrary_sealed_content_raises_only_tls_errors(inners: list[bytes]) -> None:
    sealer, opener = a_pair()
    for inner in inners:
        try:
            opener.open(memoryview(record(sealer, inner)), OUT)
        except TlsError:
            break


def test_a_ticket_in_pieces_is_counted_and_dropped() -> None:
    sealer, opener = a_pair()
    wire = record(sealer, TICKET[:3] + b"\x16") + record(sealer, TICKET[3:] + TICKET + b"\x16")
    assert open_all(opener, wire) == b""
    assert opener.tickets == 2


def test_nothing_may_come_between_the_pieces_of_a_message() -> None:
    sealer, opener = a_pair()
    open_all(opener, record(sealer, TICKET[:6] + b"\x16"))
    with pytest.raises(TlsError, match="interleaved"):
        open_all(opener, sealer.seal(b"data"))


@pytest.mark.parametrize("request_answer", [False, True])
def test_a_key_update_is_followed(request_answer: bool) -> None:
    sealer, opener = a_pair()
    wire = sealer.seal(b"old") + sealer.key_update(request=request_answer) + sealer.seal(b"new")
    assert open_all(opener, wire) == b"oldnew"
    assert opener.update_requested is request_answer


def test_records_under_the_old_key_are_refused_after_a_key_update() -> None:
    sealer, opener = a_pair()
    stale = Sealer(SECRET, SUITE, sequence=1)
    open_all(opener, sealer.key_update())
    with pytest.raises(TlsError, match="bad record MAC"):
        open_all(opener, stale.seal(b"old"))


BARREN = [
    pytest.param(lambda sealer: sealer.key_update(), id="KeyUpdate"),
    pytest.param(lambda sealer: record(sealer, b"\x17"), id="empty"),
    pytest.param(lambda sealer: record(sealer, b"\x17\0\0\0"), id="padding"),
    pytest.param(lambda sealer: record(sealer, TICKET + b"\x16"), id="ticket"),
    pytest.param(lambda sealer: sealer.alert(Alert.USER_CANCELED), id="user_canceled"),
]


@pytest.mark.parametrize("make", BARREN)
def test_a_peer_that_only_makes_work_is_cut_off(make) -> None:
    sealer, opener = a_pair()
    for _ in range(BARREN_RECORDS_MAX):
        assert open_all(opener, make(sealer)) == b""
    with pytest.raises(TlsError, match="without data"):
        open_all(opener, make(sealer))


@pytest.mark.parametrize("make", BARREN)
def test_records_without_data_between_records_with_data_are_fine(make) -> None:
    sealer, opener = a_pair()
    for _ in range(BARREN_RECORDS_MAX):
        assert open_all(opener, make(sealer) + sealer.seal(b"x") + make(sealer)) == b"x"
    wire = b"".join(make(sealer) + sealer.seal(b"y") for _ in range(2 * BARREN_RECORDS_MAX))
    assert open_all(opener, wire) == b"y" * 2 * BARREN_RECORDS_MAX


def test_close_notify_ends_reading_and_the_rest_is_ignored() -> None:
    sealer, opener = a_pair()
    wire = sealer.seal(b"last words") + sealer.alert(Alert.CLOSE_NOTIFY) + b"whatever follows"
    assert open_all(opener, wire) == b"last words"
    assert opener.closed
    assert opener.open(memoryview(b"more"), OUT) == (4, 0)


def test_a_fatal_alert_is_named_and_deserves_no_answer() -> None:
    sealer, opener = a_pair()
    with pytest.raises(TlsError, match=r"^peer sent alert: bad certificate \(42\)$") as caught:
        open_all(opener, sealer.alert(Alert.BAD_CERTIFICATE))
    assert caught.value.code is None


def test_a_successor_goes_on_in_the_middle_of_a_message() -> None:
    sealer, opener = a_pair()
    open_all(opener, sealer.seal(b"one") + record(sealer, TICKET[:6] + b"\x16"))
    successor = pickle.loads(pickle.dumps(opener))
    assert open_all(successor, record(sealer, TICKET[6:] + b"\x16") + sealer.seal(b"two")) == b"two"
    assert successor.tickets == 1

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, strategies as st

from tests.support.certs import (
    AUTHORITY,
    a_client_context,
    a_name,
    a_server_context,
    an_authority,
    an_established_pair,
)
from ztunnel.errors import CallError, IdentityError
from ztunnel.identity import ca
from ztunnel.identity.ca import ANSWER_BYTES_MAX, CALL_SECONDS, CaClient, accepted
from ztunnel.identity.dev_ca import DevelopmentCa
from ztunnel.tls.certificate import WorkloadCertificate
from ztunnel.tls.csr import make_signing_request
from ztunnel.wire.ca import CREATE_CERTIFICATE_PATH, decode_request, encode_response

BELOW = AUTHORITY.subordinate("upper").subordinate("lower")
REQUEST = make_signing_request(a_name())


class FakeCaller:
    """Answers with what `answer` makes of the signing request."""

    def __init__(self, answer: Callable[[bytes], Sequence[bytes]]) -> None:
        self.answer = answer
        self.calls: list[tuple[str, bytes, float]] = []
        self.shares = False

    async def unary(self, path: str, request: bytes, *, seconds: float) -> bytes:
        self.calls.append((path, request, seconds))
        return encode_response(self.answer(decode_request(request).csr_pem))

    async def share(self) -> None:
        self.shares = True
        try:
            await trio.sleep_forever()
        finally:
            self.shares = False


def a_client(answer: Callable[[bytes], Sequence[bytes]] = AUTHORITY.sign) -> CaClient:
    return CaClient(
        caller=FakeCaller(answer), address="https://ca:1", ttl_seconds=3600.4, impersonates=True
    )


def signed_by(authority: DevelopmentCa = AUTHORITY) -> list[bytes]:
    return authority.sign(REQUEST.csr_pem)


async def test_a_request_says_who_for_how_long_and_has_a_deadline() -> None:
    client = a_client()
    await client.issue(a_name("bank"))
    ((path, wire, seconds),) = client.caller.calls
    request = decode_request(wire)
    assert path == CREATE_CERTIFICATE_PATH
    assert (request.validity_seconds, request.impersonated) == (3600, str(a_name("bank")))
    assert seconds == CALL_SECONDS
    csr = x509.load_pem_x509_csr(request.csr_pem)
    (extension,) = csr.extensions
    assert extension.critical
    assert [name.value for name in extension.value] == [str(a_name("bank"))]


async def test_while_it_runs_its_calls_share_connections() -> None:
    client = a_client()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        await trio.testing.wait_all_tasks_blocked()
        assert client.caller.shares
        nursery.cancel_scope.cancel()
    assert not client.caller.shares


async def test_a_proxy_that_asks_for_itself_impersonates_nobody() -> None:
    client = replace(a_client(), impersonates=False)
    await client.issue(a_name())
    assert decode_request(client.caller.calls[0][1]).impersonated == ""


async def test_each_request_has_a_key_of_its_own() -> None:
    client = a_client()
    one, other = await client.issue(a_name()), await client.issue(a_name())
    assert one.key_pem != other.key_pem


class Turns(trio.abc.Instrument):
    """Counts the turns of the loop."""

    def __init__(self) -> None:
        self.count = 0

    def after_io_wait(self, timeout: float) -> None:
        self.count += 1


class AnswersTogether(FakeCaller):
    """Answers nobody until `count` have asked."""

    def __init__(self, count: int) -> None:
        super().__init__(AUTHORITY.sign)
        self.left = count
        self.all_asked = trio.Event()

    async def unary(self, path: str, request: bytes, *, seconds: float) -> bytes:
        answer = await super().unary(path, request, seconds=seconds)
        self.left -= 1
        if not self.left:
            self.all_asked.set()
        await self.all_asked.wait()
        return answer


async def test_answers_that_come_together_are_taken_one_in_each_turn_of_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns, taken_in = Turns(), []

    def noted(*arguments: Any) -> WorkloadCertificate:
        taken_in.append(turns.count)
        return accepted(*arguments)

    monkeypatch.setattr(ca, "accepted", noted)
    client = replace(a_client(), caller=AnswersTogether(8))
    trio.lowlevel.add_instrument(turns)
    try:
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(client.issue, a_name(f"account-{number}"))
    finally:
        trio.lowlevel.remove_instrument(turns)
    assert len(taken_in) == len(set(taken_in)) == 8


async def test_the_answer_works_in_a_handshake() -> None:
    made = await a_client(BELOW.sign).issue(a_name("client"))
    assert made.chain_pem.count(b"BEGIN") == 3
    _, other = an_established_pair(a_client_context(made), a_server_context())
    assert other.peer.identities == (a_name("client"),)


async def test_a_failed_call_names_status_cause_and_ca() -> None:
    class Down:
        async def unary(self, path: str, request: bytes, *, seconds: float) -> bytes:
            raise CallError("UNAVAILABLE: connection refused", status="UNAVAILABLE")

    client = replace(a_client(), caller=Down())
    with pytest.raises(IdentityError) as caught:
        await client.issue(a_name())
    assert str(caught.value) == (
        "signing gRPC error (UNAVAILABLE): connection refused (CA https://ca:1)"
    )


def a_leaf(*uris: str, own_key: bool = True, authority: DevelopmentCa = AUTHORITY) -> bytes:
    key = x509.load_pem_x509_csr(REQUEST.csr_pem).public_key()
    if not own_key:
        key = ec.generate_private_key(ec.SECP256R1()).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return authority.certify(key, uris).public_bytes(Encoding.PEM)


@pytest.mark.parametrize(
    ("chain", "text"),
    [
        pytest.param([], "chain returned from CA is empty", id="nothing"),
        pytest.param(signed_by()[:1], "no root", id="a leaf alone"),
        pytest.param([b"nonsense", AUTHORITY.roots_pem], "unreadable", id="no leaf"),
        pytest.param([signed_by()[0], b"nonsense"], "none of its roots", id="no readable root"),
        pytest.param(
            [a_leaf(str(a_name("mallory"))), AUTHORITY.roots_pem],
            f"did not find expected SAN: {a_name()}",
            id="another name",
        ),
        pytest.param(
            [a_leaf(), AUTHORITY.roots_pem], "did not find expected SAN", id="no name at all"
        ),
        pytest.param(
            [a_leaf(str(a_name()), own_key=False), AUTHORITY.roots_pem],
            "another key than ours",
            id="another key",
        ),
        pytest.param(
            [signed_by()[0], an_authority().roots_pem], "none of its roots", id="another root"
        ),
        pytest.param(
            [signed_by(BELOW)[0], AUTHORITY.roots_pem], "none of its roots", id="a gap in the chain"
        ),
        pytest.param(
            [signed_by()[0], AUTHORITY.roots_pem * (ANSWER_BYTES_MAX // 500)],
            "longer than",
            id="long",
        ),
    ],
)
def test_anything_but_what_was_asked_for_is_refused(chain: list[bytes], text: str) -> None:
    with pytest.raises(IdentityError, match=text):
        accepted(encode_response(chain), REQUEST, a_name())


def test_one_of_several_roots_is_enough() -> None:
    bundle = an_authority().roots_pem + AUTHORITY.roots_pem
    made = accepted(encode_response([signed_by()[0], bundle]), REQUEST, a_name())
    assert made.roots_pem.count(b"BEGIN") == 2


def test_a_leaf_under_an_anchor_that_is_no_root_is_fine() -> None:
    leaf, lower, *_ = signed_by(BELOW)
    assert accepted(encode_response([leaf, lower]), REQUEST, a_name()).roots_pem == lower


@given(data=st.binary(max_size=200))
def test_arbitrary_answers_raise_only_identity_errors(data: bytes) -> None:
    with pytest.raises(IdentityError):
        accepted(data, REQUEST, a_name())


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@given(at=st.integers(0, 100_000), junk=st.binary(min_size=1, max_size=4))
def test_a_damaged_answer_is_an_identity_error_or_harmless(at: int, junk: bytes) -> None:
    good = encode_response(signed_by(BELOW))
    damaged = bytearray(good)
    at %= len(damaged)
    damaged[at : at + len(junk)] = junk
    try:
        made = accepted(bytes(damaged), REQUEST, a_name())
    except IdentityError:
        return
    assert made.identity == a_name()

from __future__ import annotations

import os
import pickle
import tracemalloc

import pytest
from hypothesis import given, settings, strategies as st

from tests.support.certs import (
    a_client_context,
    a_name,
    a_server_context,
    an_established_pair,
)
from ztunnel.errors import TlsError
from ztunnel.tls.alerts import Alert
from ztunnel.tls.opener import Opener
from ztunnel.tls.records import RecordLayer, Tls13Records
from ztunnel.tls.sealer import SealBuffer, Sealer
from ztunnel.tls.ssl_records import SslObjectRecords

OUT = memoryview(bytearray(1 << 21))
RANDOM = os.urandom(1 << 18)
SUITE = "TLS_AES_256_GCM_SHA384"
BUFFER = SealBuffer()
OURS = pytest.mark.parametrize("ours", ["client", "server"])


def ours_and_oracle(ours: str) -> tuple[Tls13Records, SslObjectRecords]:
    """Give our record layer at one end and the ssl object's at the other."""
    client, server = an_established_pair(
        a_client_context(own_records=ours == "client"),
        a_server_context(own_records=ours == "server"),
    )
    mine, oracle = (client, server) if ours == "client" else (server, client)
    assert isinstance(mine.records, Tls13Records)
    assert isinstance(oracle.records, SslObjectRecords)
    return mine.records, oracle.records


def a_pair_of_ours() -> tuple[Tls13Records, Tls13Records]:
    one, other = os.urandom(48), os.urandom(48)
    return (
        Tls13Records(Sealer(one, SUITE), Opener(other, SUITE), BUFFER),
        Tls13Records(Sealer(other, SUITE), Opener(one, SUITE), BUFFER),
    )


def opened(records: RecordLayer, sealed: bytes | memoryview) -> bytes:
    raw = memoryview(sealed)
    consumed, produced = records.open(raw, OUT)
    assert consumed == len(raw)
    return bytes(OUT[:produced])


def sealed_bulk(records: RecordLayer, plaintext: bytes) -> memoryview:
    buffer = bytearray(plaintext + b"!")
    return records.seal_bulk(memoryview(buffer), len(plaintext))


@OURS
@settings(max_examples=25)
@given(
    parts=st.lists(
        st.tuples(st.sampled_from(["small", "bulk", "update", "request"]), st.integers(1, 50_000)),
        max_size=10,
    )
)
def test_the_oracle_understands_us_and_we_the_oracle(
    ours: str, parts: list[tuple[str, int]]
) -> None:
    mine, oracle = ours_and_oracle(ours)
    for way, size in parts:
        plaintext = RANDOM[:size]
        if way == "small":
            assert opened(oracle, mine.seal_small(plaintext)) == plaintext
        elif way == "bulk":
            assert opened(oracle, sealed_bulk(mine, plaintext)) == plaintext
        else:
            assert opened(oracle, mine.key_update(request=way == "request")) == b""
        assert opened(mine, oracle.take_reply() + oracle.seal_small(plaintext)) == plaintext
    assert mine.take_reply() == b""


@OURS
def test_close_notify_is_understood_both_ways(ours: str) -> None:
    mine, oracle = ours_and_oracle(ours)
    assert opened(oracle, mine.seal_small(b"bye") + mine.close_notify()) == b"bye"
    assert oracle.closed
    assert opened(mine, oracle.close_notify()) == b""
    assert mine.closed


@OURS
def test_our_alert_is_understood(ours: str) -> None:
    mine, oracle = ours_and_oracle(ours)
    with pytest.raises(TlsError, match="peer sent alert: bad certificate"):
        opened(oracle, mine.alert(Alert.BAD_CERTIFICATE))


@OURS
def test_a_forged_record_is_answered_with_an_alert_the_peer_understands(ours: str) -> None:
    mine, oracle = ours_and_oracle(ours)
    forged = bytearray(oracle.seal_small(b"hello"))
    forged[-1] ^= 1
    with pytest.raises(TlsError, match="bad record MAC") as caught:
        opened(mine, forged)
    with pytest.raises(TlsError, match="bad record mac"):
        opened(oracle, caught.value.alert)


def test_a_fatal_alert_is_not_answered() -> None:
    one, other = a_pair_of_ours()
    with pytest.raises(TlsError, match="unknown ca") as caught:
        opened(one, other.alert(Alert.UNKNOWN_CA))
    assert caught.value.alert == b""


def test_a_requested_key_update_is_owed_once() -> None:
    one, other = a_pair_of_ours()
    assert opened(one, other.key_update(request=True) + other.key_update(request=True)) == b""
    reply = one.take_reply()
    assert one.take_reply() == b""
    assert opened(other, reply + one.seal_small(b"under the new key")) == b"under the new key"
    assert other.take_reply() == b""


def test_parked_ends_go_on() -> None:
    one, other = a_pair_of_ours()
    for _ in range(3):
        assert opened(other, one.seal_small(b"x")) == b"x"
        one.park()
        other.park()


def test_a_connection_retires_before_peers_refuse_our_key_updates() -> None:
    one, other = a_pair_of_ours()
    updates = 0
    while not one.retire:
        assert opened(other, one.key_update() + one.seal_small(b"x")) == b"x"
        updates += 1
    assert 20 <= updates < 32


@OURS
def test_a_successor_process_goes_on_with_both_directions(ours: str) -> None:
    mine, oracle = ours_and_oracle(ours)
    opened(oracle, mine.seal_small(b"before"))
    sealer, opener = pickle.loads(pickle.dumps(mine.directions()))
    successor = Tls13Records(sealer, opener, SealBuffer())
    assert opened(oracle, successor.seal_small(b"after")) == b"after"
    assert opened(successor, oracle.seal_small(b"too")) == b"too"
    with pytest.raises(TlsError, match="handed over"):
        mine.seal_small(b"never")


def test_a_parked_idle_end_is_small() -> None:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        ends = [end for _ in range(100) for end in a_pair_of_ours()]
        for one, other in zip(ends[::2], ends[1::2], strict=True):
            opened(other, one.seal_small(b"x"))
            one.park()
            other.park()
        per_end = (tracemalloc.get_traced_memory()[0] - before) / len(ends)
    finally:
        tracemalloc.stop()
    assert per_end < 1024


def test_both_ends_know_each_other() -> None:
    client, server = an_established_pair()
    assert server.peer.identities == (a_name("client"),)
    assert client.peer.identities == (a_name("server"),)

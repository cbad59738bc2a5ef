from __future__ import annotations

import ssl

import pytest
from hypothesis import given, settings, strategies as st

from tests.support.certs import (
    AUTHORITY,
    a_certificate,
    a_client_context,
    a_name,
    a_server_context,
    an_authority,
    an_established_pair,
    shake_hands,
    talk_both_ways,
)
from ztunnel.errors import TlsError
from ztunnel.identity.dev_ca import Usage
from ztunnel.tls.alerts import Alert
from ztunnel.tls.handshake import RECEIVED_BYTES_MAX, Handshake
from ztunnel.tls.records import Tls13Records
from ztunnel.tls.ssl_records import SslObjectRecords

CLIENT, SERVER = a_client_context(), a_server_context()
OUT = memoryview(bytearray(1 << 18))


class Oracle:
    """A peer that is nothing but an ssl object."""

    def __init__(self, context: ssl.SSLContext, *, server_side: bool) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=server_side)
        self.done = False

    def receive(self, data: bytes) -> bytes:
        self.incoming.write(data)
        try:
            self.tls.do_handshake()
            self.done = True
        except ssl.SSLWantReadError:
            pass
        return self.outgoing.read()


def test_both_ends_agree_and_data_flows() -> None:
    client, server = an_established_pair(CLIENT, SERVER)
    assert isinstance(client.records, Tls13Records)
    assert isinstance(server.records, Tls13Records)
    for end in (client, server):
        assert (end.alpn, end.version, end.leftover) == ("h2", "TLSv1.3", b"")
        assert end.cipher == "TLS_AES_256_GCM_SHA384"
    assert client.peer.identities == (a_name("server"),)
    assert server.peer.identities == (a_name("client"),)
    talk_both_ways(client, server)


@settings(max_examples=30)
@given(cuts=st.lists(st.integers(1, 900), min_size=1, max_size=12))
def test_a_handshake_is_the_same_however_the_wire_is_cut(cuts: list[int]) -> None:
    cut_pair(cuts)


def test_a_handshake_works_byte_by_byte() -> None:
    cut_pair([1])


def cut_pair(cuts: list[int]) -> None:
    one, other = Handshake(CLIENT, server_side=False), Handshake(SERVER, server_side=True)
    wires = {other: one.receive(b""), one: b""}
    turn = 0
    while not (one.done and other.done):
        for end, peer in ((other, one), (one, other)):
            data, wires[end] = wires[end], b""
            while data and not end.done:
                size = cuts[turn % len(cuts)]
                turn += 1
                wires[peer] += end.receive(data[:size])
                data = data[size:]
            assert not data
    talk_both_ways(one.finish(), other.finish())


@pytest.mark.parametrize("tickets", [0, 1, 2])
def test_tickets_of_our_server_are_counted_into_the_sequence(tickets: int) -> None:
    server = a_server_context()
    server.ssl_context.num_tickets = tickets
    ours = Handshake(server, server_side=True)
    oracle = Oracle(CLIENT.ssl_context, server_side=False)
    data = ours.receive(oracle.receive(ours.receive(oracle.receive(b""))))
    assert ours.done is oracle.done is True
    oracle.incoming.write(data + ours.finish().records.seal_small(b"hello"))
    assert oracle.tls.read() == b"hello"
    assert len(data) > 0 or tickets == 0


@pytest.mark.parametrize("tickets", [0, 1, 2])
def test_tickets_and_data_behind_the_handshake_are_left_over_for_our_client(tickets: int) -> None:
    server = a_server_context().ssl_context
    server.num_tickets = tickets
    oracle = Oracle(server, server_side=True)
    ours = Handshake(CLIENT, server_side=False)
    flight = oracle.receive(ours.receive(b""))
    tail = oracle.receive(ours.receive(flight))
    oracle.tls.write(b"early")
    tail += oracle.outgoing.read()
    records = ours.finish().records
    assert records.open(memoryview(tail), OUT) == (len(tail), 5)
    assert isinstance(records, Tls13Records)
    assert records.directions()[1].tickets == tickets


@pytest.mark.parametrize("own_records", [True, False])
def test_data_right_behind_the_clients_finished_is_left_over(own_records: bool) -> None:
    ours = Handshake(a_server_context(own_records=own_records), server_side=True)
    oracle = Oracle(CLIENT.ssl_context, server_side=False)
    flight = ours.receive(oracle.receive(b""))
    finished = oracle.receive(flight)
    oracle.tls.write(b"early")
    ours.receive(finished + oracle.outgoing.read() + b"\x17\x03")
    established = ours.finish()
    consumed, produced = established.records.open(memoryview(established.leftover), OUT)
    assert bytes(OUT[:produced]) == b"early"
    assert len(established.leftover) - consumed in (0, 2)


def test_a_client_hello_may_be_split_over_records() -> None:
    ours = Handshake(SERVER, server_side=True)
    oracle = Oracle(CLIENT.ssl_context, server_side=False)
    hello = oracle.receive(b"")[5:]
    pieces = [hello[at : at + 20] for at in range(0, len(hello), 20)]
    wire = b"".join(b"\x16\x03\x01" + len(p).to_bytes(2, "big") + p for p in pieces)
    assert ours.receive(wire)[:1] == b"\x16"


def test_tls_12_is_served_by_the_ssl_object_if_enabled() -> None:
    client = a_client_context(tls12_enabled=True)
    client.ssl_context.maximum_version = ssl.TLSVersion.TLSv1_2
    ends = an_established_pair(client, a_server_context(tls12_enabled=True))
    for end in ends:
        assert isinstance(end.records, SslObjectRecords)
        assert end.version == "TLSv1.2"
        assert "GCM" in end.cipher
    talk_both_ways(*ends)


def test_tls_12_is_refused_otherwise() -> None:
    client = a_client_context(tls12_enabled=True)
    client.ssl_context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(TlsError, match="tls handshake error: unsupported protocol"):
        an_established_pair(client, SERVER)


def test_the_take_over_can_be_switched_off() -> None:
    ends = an_established_pair(
        a_client_context(own_records=False), a_server_context(own_records=False)
    )
    assert all(isinstance(end.records, SslObjectRecords) for end in ends)
    talk_both_ways(*ends)


OTHERS = an_authority()


@pytest.mark.parametrize(
    ("certificate", "text"),
    [
        pytest.param(a_certificate(ttl_seconds=-60), "certificate has expired", id="expired"),
        pytest.param(a_certificate(usage=Usage.SERVER), "certificate purpose", id="wrong usage"),
        pytest.param(
            a_certificate(authority=OTHERS, roots_pem=AUTHORITY.roots_pem),
            "unable to get local issuer certificate",
            id="another authority",
        ),
    ],
)
def test_a_client_with_a_bad_certificate_is_refused(certificate, text: str) -> None:
    client = Handshake(a_client_context(certificate), server_side=False)
    server = Handshake(SERVER, server_side=True)
    with pytest.raises(
        TlsError, match=r"^tls handshake error: certificate verify failed"
    ) as caught:
        shake_hands(client, server)
    assert text in str(caught.value)
    assert client.done, "in TLS 1.3 a client is done before it is judged"
    with pytest.raises(TlsError, match=r"^peer sent alert: "):
        client.finish().records.open(memoryview(caught.value.alert), OUT)


@pytest.mark.parametrize(
    ("certificate", "text"),
    [
        pytest.param(a_certificate(ttl_seconds=-60), "certificate has expired", id="expired"),
        pytest.param(a_certificate(usage=Usage.CLIENT), "certificate purpose", id="wrong usage"),
        pytest.param(
            a_certificate(authority=OTHERS, roots_pem=AUTHORITY.roots_pem),
            "unable to get local issuer certificate",
            id="another authority",
        ),
    ],
)
def test_a_server_with_a_bad_certificate_is_refused(certificate, text: str) -> None:
    client = Handshake(CLIENT, server_side=False)
    server = Handshake(a_server_context(certificate), server_side=True)
    with pytest.raises(
        TlsError, match=r"^tls handshake error: certificate verify failed"
    ) as caught:
        shake_hands(client, server)
    assert text in str(caught.value)
    assert client.data_to_send() == caught.value.alert
    with pytest.raises(TlsError, match=r"^tls handshake error: peer sent alert: "):
        server.receive(caught.value.alert)


@pytest.mark.parametrize("usage", [None, Usage.BOTH])
def test_a_certificate_without_the_usage_extension_may_do_both(usage: Usage | None) -> None:
    certificate = a_certificate(usage=usage)
    an_established_pair(a_client_context(certificate), a_server_context(certificate))


def test_a_client_without_a_certificate_is_refused() -> None:
    naked = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    naked.check_hostname = False
    naked.load_verify_locations(cadata=AUTHORITY.roots_pem.decode())
    naked.set_alpn_protocols(["h2"])
    oracle, ours = Oracle(naked, server_side=False), Handshake(SERVER, server_side=True)
    finished = oracle.receive(ours.receive(oracle.receive(b"")))
    with pytest.raises(TlsError, match="peer did not return a certificate") as caught:
        ours.receive(finished)
    oracle.incoming.write(caught.value.alert)
    with pytest.raises(ssl.SSLError, match=r"(?i)certificate.required"):
        oracle.tls.read()


def a_hello_with(protocols: list[str]) -> bytes:
    context = a_client_context().ssl_context
    context.set_alpn_protocols(protocols)
    return Oracle(context, server_side=False).receive(b"")


def test_a_client_that_wants_only_other_protocols_is_refused() -> None:
    ours = Handshake(SERVER, server_side=True)
    with pytest.raises(TlsError, match="does not offer h2") as caught:
        ours.receive(a_hello_with(["http/1.1"]))
    assert caught.value.alert == b"\x15\x03\x03\x00\x02\x02\x78"
    assert ours.data_to_send() == caught.value.alert


def test_a_client_that_also_wants_h2_gets_h2() -> None:
    assert Handshake(SERVER, server_side=True).receive(a_hello_with(["http/1.1", "h2"]))


def test_a_client_without_alpn_is_accepted() -> None:
    client = a_client_context()
    client.ssl_context.set_alpn_protocols([])
    one, other = an_established_pair(client, SERVER)
    assert one.alpn is other.alpn is None


def test_a_client_that_offers_only_chacha20_is_refused() -> None:
    hello = a_hello_with(["h2"])
    at = hello.index(b"\x13\x02\x13\x03\x13\x01")
    hello = hello[:at] + b"\x13\x03" * 3 + hello[at + 6 :]
    with pytest.raises(TlsError, match="does not offer AES-GCM") as caught:
        Handshake(SERVER, server_side=True).receive(hello)
    assert caught.value.alert[-1] == Alert.HANDSHAKE_FAILURE


@pytest.mark.parametrize("server_side", [False, True])
@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n", b"G", b"\x16\x02", b"\x16\x03\x01\xff\xff", b"\x80\x2e\x01"]
)
def test_a_peer_that_does_not_speak_tls_is_found_out_at_once(
    data: bytes,
    server_side: bool,
) -> None:
    ours = Handshake(SERVER if server_side else CLIENT, server_side=server_side)
    if not server_side:
        ours.receive(b"")
    with pytest.raises(TlsError, match=r"^tls handshake error: "):
        ours.receive(data)


def test_a_handshake_without_end_is_cut_off() -> None:
    ours = Handshake(SERVER, server_side=True)
    fragment = b"\x16\x03\x01\x40\x00" + b"\x01\x01\xff\x00" + bytes(16380)
    for _ in range(RECEIVED_BYTES_MAX // len(fragment)):
        ours.receive(fragment)
    with pytest.raises(TlsError, match="handshake too long"):
        ours.receive(fragment)


@settings(max_examples=60)
@given(data=st.binary(max_size=300), server_side=st.booleans())
def test_arbitrary_bytes_raise_only_tls_errors(data: bytes, server_side: bool) -> None:
    ours = Handshake(SERVER if server_side else CLIENT, server_side=server_side)
    if not server_side:
        ours.receive(b"")
    try:
        ours.receive(b"\x16\x03\x01" + len(data).to_bytes(2, "big") + data)
    except TlsError as error:
        assert str(error).startswith("tls handshake error: ")  # noqa: PT017
    assert not ours.done


@settings(max_examples=60)
@given(at=st.integers(0, 10_000), junk=st.binary(min_size=1, max_size=4), flight=st.integers(0, 2))
def test_damaged_flights_raise_only_tls_errors(at: int, junk: bytes, flight: int) -> None:
    one, other = Handshake(CLIENT, server_side=False), Handshake(SERVER, server_side=True)
    ends, data = [other, one, other], one.receive(b"")
    try:
        for number, end in enumerate(ends):
            if number == flight:
                damaged = bytearray(data)
                at %= len(damaged)
                damaged[at : at + len(junk)] = junk
                data = bytes(damaged)
            data = end.receive(data)
        if other.done:
            talk_both_ways(one.finish(), other.finish())
    except TlsError as error:
        assert error.alert is not None  # noqa: PT017


def test_settings_of_the_wrong_role_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        Handshake(CLIENT, server_side=True)


def test_the_name_of_the_host_a_client_asks_for_is_ignored() -> None:
    ours = Handshake(a_server_context(), server_side=True)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    oracle = CLIENT.ssl_context.wrap_bio(incoming, outgoing, server_hostname="who.knows.test")
    with pytest.raises(ssl.SSLWantReadError):
        oracle.do_handshake()
    hello = outgoing.read()
    assert b"who.knows.test" in hello
    incoming.write(ours.receive(hello))
    oracle.do_handshake()
    ours.receive(outgoing.read())
    assert ours.finish().peer.identities == (a_name("client"),)

from __future__ import annotations

import ssl

import pytest

from tests.support.certs import a_certificate, a_name, shake_hands
from ztunnel.errors import TlsError
from ztunnel.tls import resumption as module
from ztunnel.tls.context import TlsContext, TlsContexts
from ztunnel.tls.crl import Revocations
from ztunnel.tls.handshake import Established, Handshake
from ztunnel.tls.records import Tls13Records
from ztunnel.tls.resumption import Sessions

OUT = memoryview(bytearray(1 << 18))
KEY = "a peer"


def contexts(**settings: object) -> tuple[TlsContext, TlsContext]:
    both = TlsContexts(**({"resumption": True} | settings))  # type: ignore[arg-type]
    return both.client(a_certificate(a_name("client"))), both.server(
        a_certificate(a_name("server"))
    )


def connect(
    client: TlsContext, server: TlsContext, *, resume: str | None = KEY, said: bytes = b"settings"
) -> tuple[Established, Established]:
    """Connect, have the server say something behind its ticket, and the client read it."""
    one = Handshake(client, server_side=False, resume=resume)
    other = Handshake(server, server_side=True)
    to_client = other.receive(one.receive(b""))
    to_client = other.receive(one.receive(to_client))
    ends = one.finish(), other.finish()
    to_client += ends[1].records.seal_small(said)
    assert ends[0].records.open(memoryview(to_client), OUT) == (len(to_client), len(said))
    assert bytes(OUT[: len(said)]) == said
    return ends


def resumed(client: TlsContext, server: TlsContext, **more: str | None) -> bool:
    one, other = connect(client, server, **more)
    assert one.resumed is other.resumed
    return one.resumed


def test_the_second_connection_to_a_peer_is_resumed_and_so_is_the_third() -> None:
    ends = contexts()
    assert [resumed(*ends) for _ in range(3)] == [False, True, True]


def test_a_resumed_connection_has_the_peer_of_its_session() -> None:
    ends = contexts()
    connect(*ends)
    one, other = connect(*ends)
    assert one.resumed
    assert one.peer.identities == (a_name("server"),)
    assert one.peer.not_after == ends[1].certificate.not_after
    assert other.peer.identities == (a_name("client"),)
    assert other.peer.serial == ends[0].certificate.serial


def test_a_resumed_connection_has_keys_of_its_own_and_carries_data() -> None:
    ends = contexts()
    secrets = set()
    for _ in range(3):
        one, other = connect(*ends)
        assert isinstance(one.records, Tls13Records)
        secrets.add(one.records.directions()[0].secret)
        sealed = memoryview(one.records.seal_small(b"hello"))
        assert other.records.open(sealed, OUT) == (len(sealed), 5)
    assert len(secrets) == 3


def test_peers_do_not_share_sessions() -> None:
    ends = contexts()
    connect(*ends)
    assert not resumed(*ends, resume="another peer")
    assert not resumed(*ends, resume=None)


@pytest.mark.parametrize("renewed", ["client", "server"])
def test_a_renewed_certificate_ends_resumption(renewed: str) -> None:
    both = TlsContexts(resumption=True)
    names = {"client": a_certificate(a_name("client")), "server": a_certificate(a_name("server"))}

    def ends() -> tuple[TlsContext, TlsContext]:
        return both.client(names["client"]), both.server(names["server"])

    connect(*ends())
    assert resumed(*ends())
    names[renewed] = a_certificate(a_name(renewed))
    one, other = connect(*ends())
    assert not one.resumed
    assert one.peer.serial == names["server"].serial
    assert other.peer.serial == names["client"].serial
    assert resumed(*ends()), "with the new one it begins again"


def test_a_session_of_one_server_is_worth_nothing_at_another() -> None:
    client, server = contexts()
    _, impostor = contexts()
    connect(client, server)
    one, _ = connect(client, impostor)
    assert not one.resumed
    assert one.peer.serial == impostor.certificate.serial


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"resumption": False}, id="by default"),
        pytest.param({"own_records": False}, id="without our records"),
        pytest.param({"revocations": Revocations()}, id="with revocation lists"),
    ],
)
def test_there_is_no_resumption(settings: dict[str, object]) -> None:
    client, server = contexts(**settings)
    assert client.sessions is None
    assert server.ssl_context.num_tickets == 0
    assert [resumed(client, server) for _ in range(2)] == [False, False]


def test_a_ticket_that_comes_in_pieces_is_simply_not_taken() -> None:
    client, server = contexts()
    for _ in range(2):
        one = Handshake(client, server_side=False, resume=KEY)
        other = Handshake(server, server_side=True)
        to_client = other.receive(one.receive(b""))
        ticket = other.receive(one.receive(to_client))
        ends = one.finish(), other.finish()
        assert not ends[0].resumed
        assert ends[0].records.open(memoryview(ticket[:10]), OUT) == (0, 0)
        assert ends[0].records.open(memoryview(ticket), OUT) == (len(ticket), 0)


def test_a_forged_ticket_is_no_session_and_a_tls_error_as_ever() -> None:
    client, server = contexts()
    one = Handshake(client, server_side=False, resume=KEY)
    other = Handshake(server, server_side=True)
    ticket = bytearray(other.receive(one.receive(other.receive(one.receive(b"")))))
    ticket[-1] ^= 1
    with pytest.raises(TlsError):
        one.finish().records.open(memoryview(ticket), OUT)
    assert client.sessions is not None
    assert client.sessions.get(KEY) is None


def a_session(client: TlsContext, server: TlsContext) -> ssl.SSLSession:
    connect(client, server)
    assert client.sessions is not None
    found = client.sessions.get(KEY)
    assert found is not None
    return found


def test_there_are_only_so_many_sessions_and_the_oldest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SESSIONS_MAX", 2)
    session, sessions = a_session(*contexts()), Sessions()
    for key in ("one", "two", "one", "three"):
        sessions.put(key, session)
    assert [sessions.get(key) is session for key in ("one", "two", "three")] == [True, False, True]


def test_handshakes_without_a_name_for_the_peer_keep_nothing() -> None:
    client, server = contexts()
    one, other = Handshake(client, server_side=False), Handshake(server, server_side=True)
    shake_hands(one, other)
    assert client.sessions is not None
    assert not one.finish().resumed

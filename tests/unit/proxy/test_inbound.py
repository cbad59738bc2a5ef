from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.support.certs import a_certificate, a_name
from tests.support.flow import Pair, a_pair, connect
from tests.support.peers import echo
from tests.support.scripted import a_scripted_client
from ztunnel.errors import IdentityError
from ztunnel.telemetry.traffic import Reporter
from ztunnel.tls.certificate import WorkloadCertificate
from ztunnel.tls.context import TlsContexts

FRONTEND = a_name("frontend")


def known(pair: Pair) -> WorkloadCertificate:
    return a_certificate(FRONTEND, authority=pair.mesh.authority)


def sockets_open(pair: Pair) -> int:
    """What `istio_tcp_sockets_open{reporter="destination"}` shows."""
    return pair.mesh.node.metrics.sockets_open(Reporter.DESTINATION).value


async def until_end(stream: trio.SocketStream) -> None:
    with trio.fail_after(10):
        try:
            while await stream.receive_some(1000):
                pass
        except trio.BrokenResourceError:
            return


class Refuses:
    """A CA that issues nothing."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def issue(self, identity: object) -> WorkloadCertificate:
        await trio.lowlevel.checkpoint()
        raise self.error


async def test_a_tunnel_without_streams_is_known_and_says_nothing() -> None:
    async with a_pair() as pair:
        async with a_scripted_client(pair.hbone, known(pair)):
            assert len(pair.server.tunnels) == 1
            assert pair.mesh.node.handshakes.taken == 0
            assert sockets_open(pair) == 1
        with trio.fail_after(5):
            while len(pair.server.tunnels):
                await trio.lowlevel.checkpoint()
        assert sockets_open(pair) == 0
        assert pair.lines.ended() == []


async def test_what_tls_proved_is_a_fact_of_the_tunnel() -> None:
    async with a_pair() as pair, a_scripted_client(pair.hbone, known(pair)):
        [tunnel] = pair.server.tunnels._tunnels
        assert tunnel.facts.peer == FRONTEND
        assert (str(tunnel.facts.local.ip), tunnel.facts.local.port) == pair.hbone
        assert tunnel.facts.certificate.identity == pair.server_workload.identity


async def test_without_a_certificate_of_ours_nobody_is_served() -> None:
    async with a_pair() as pair:
        pair.mesh.node.certificates._issuer = Refuses(IdentityError("the CA is down"))
        async with connect(pair.hbone) as stream:
            await until_end(stream)
        [line] = await pair.lines.wait_for_ends(1)
        assert line["error"].startswith("signing error: ")
        assert "the CA is down" in line["error"]
        assert line["reason"] == "identity_error"


async def test_a_bug_in_one_handshake_ends_it_alone(monkeypatch) -> None:
    async with a_pair() as pair:
        pair.serve(echo)
        certificates = pair.mesh.node.certificates
        usual = certificates.certificate_for

        async def broken(identity: object) -> WorkloadCertificate:
            await trio.lowlevel.checkpoint()
            raise RuntimeError("a bug")

        monkeypatch.setattr(certificates, "certificate_for", broken)
        async with connect(pair.hbone) as stream:
            await until_end(stream)
        [line] = await pair.lines.wait_for_ends(1)
        assert (line["error"], line["reason"]) == ("internal error: a bug", "internal")
        assert pair.mesh.node.handshakes.taken == 0
        assert pair.lines.take_bugs() == 1
        monkeypatch.setattr(certificates, "certificate_for", usual)
        async with a_scripted_client(pair.hbone, known(pair)):
            pass


async def test_a_handshake_that_ends_after_the_drain_began_is_drained_too() -> None:
    async with a_pair() as pair:
        with connect(pair.hbone).socket as waiting:
            await trio.testing.wait_all_tasks_blocked()
            await pair.server.drain(1)
            tls = trio.SSLStream(
                trio.SocketStream(waiting),
                a_client_ssl(known(pair)),
                https_compatible=True,
            )
            with trio.fail_after(10):
                await tls.do_handshake()
                # Settings, goodbye, and then the end: it has no streams.
                while await tls.receive_some(1000):
                    pass
        await trio.testing.wait_all_tasks_blocked()
        assert len(pair.server.tunnels) == 0


def a_client_ssl(certificate: WorkloadCertificate):
    return TlsContexts(own_records=False).client(certificate).ssl_context


@pytest.mark.parametrize("cancelled", ["pod", "mesh"])
async def test_handshakes_under_way_end_with_the_pod(cancelled: str) -> None:
    async with a_pair() as pair:
        stream = connect(pair.hbone)
        await trio.testing.wait_all_tasks_blocked()
        assert pair.mesh.node.handshakes.taken == 1
        if cancelled == "pod":
            pair.mesh.running[pair.server].cancel()
            await pair.lines.wait_for_ends(1)
    await until_end(stream)
    await stream.aclose()
    assert pair.mesh.node.handshakes.taken == 0
    assert sockets_open(pair) == 0
    assert len(pair.lines.ended()) == 1

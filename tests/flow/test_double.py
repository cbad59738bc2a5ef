"""A tunnel within a tunnel: through a gateway that cannot read what it carries."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from tests.support import peers
from tests.support.builders import a_gateway, a_service, a_workload, an_identity
from tests.support.flow import Mesh, a_mesh, connect, expect_abort, loopback_address
from tests.support.handshakes import secure
from ztunnel.decide.authorize import Permit, authorize_outbound
from ztunnel.model.network import Endpoint
from ztunnel.model.workload import TunnelProtocol
from ztunnel.tls.crl import Revocations, parse_lists
from ztunnel.transport.dial import Dial
from ztunnel.transport.facts import TunnelFacts
from ztunnel.transport.relay import StreamRelay
from ztunnel.transport.sockets import SocketFactory
from ztunnel.transport.tunnel import Tunnel
from ztunnel.wire.hbone.connection import HboneConnection
from ztunnel.wire.headers import AUTHORITY, first_value

HOST = "cart.far.svc.cluster.local"
SERVER_ID = an_identity("cart", "far")
GATEWAY_ID = an_identity("gateway", "istio-system")
SOCKETS = SocketFactory(netns=None, mark=None, keepalive=None)


class Gateway:
    """Ends outer tunnels and passes their bytes on to one pod's tunnel port."""

    def __init__(self, mesh: Mesh, target: Endpoint) -> None:
        self.mesh = mesh
        self.target = target
        self.authorities: list[bytes | None] = []
        self.tunnels: list[Tunnel] = []

    async def serve(self, listener: trio.SocketListener) -> None:
        await trio.serve_listeners(self._accept, [listener])

    async def _accept(self, stream: trio.SocketStream) -> None:
        node = self.mesh.node
        certificate = self.mesh.authority.issue(GATEWAY_ID)
        sock = stream.socket._sock.dup()
        await stream.aclose()
        established = await secure(sock, node.tls.server(certificate), server_side=True)
        facts = TunnelFacts(
            local=self.target,
            remote=self.target,
            peer=established.peer.identities[0],
            peer_not_after=established.peer.not_after,
            certificate=certificate,
            cipher=established.cipher,
            version=established.version,
        )
        core = HboneConnection(client=False)
        tunnel = Tunnel(node.reactor, sock, established.records, core, self, facts)
        self.tunnels.append(tunnel)
        tunnel.start(established.leftover)

    def on_request(self, tunnel, request) -> None:
        self.authorities.append(first_value(request.headers, AUTHORITY))
        permit = authorize_outbound(self.target, illegal=())
        assert isinstance(permit, Permit)
        gateway, stream = self, request.stream

        class Connecting:
            def on_connected(self, sock) -> None:
                tunnel.core.respond(stream, 200)
                tunnel.flush_later()
                relay = StreamRelay(gateway.mesh.node.reactor, sock, tunnel, stream, ended)
                gateway.mesh.node.reactor.hand_over(sock, relay)

            def on_unreachable(self, error) -> None:
                tunnel.core.refuse(stream, 503)
                tunnel.flush_later()

        def ended(error) -> None:
            pass

        Dial(self.mesh.node.reactor, SOCKETS.dial(permit, self.target), Connecting())

    def on_settings(self, tunnel) -> None: ...

    def on_goaway(self, tunnel) -> None: ...

    def on_released(self, tunnel) -> None: ...

    def on_closed(self, tunnel, error) -> None: ...


@asynccontextmanager
async def two_networks(
    *, vouched: str, revocations: Revocations | None = None
) -> AsyncIterator[tuple[Mesh, Gateway, tuple[str, int]]]:
    """A client here, a server in network `far` behind a gateway; the service vouches for a name."""
    async with a_mesh(revocations=revocations) as mesh:
        client_ip, server_ip, gateway_ip = (loopback_address() for _ in range(3))
        app, app_port = await peers.listen(server_ip)
        outer, outer_port = await peers.listen(gateway_ip)
        client = await mesh.add_proxy(
            a_workload("client", sa="frontend", ips=[client_ip], protocol=TunnelProtocol.HBONE),
            hbone=0,
        )
        vip = (client_ip, client.addresses["outbound"].port)
        server = a_workload(
            "server",
            ns="far",
            sa="cart",
            ips=[server_ip],
            network="far",
            protocol=TunnelProtocol.HBONE,
            network_gateway=a_gateway(f"far/{gateway_ip}", outer_port),
            services={f"far/{HOST}": {vip[1]: app_port}},
            workload_name="cart",
            workload_type="deployment",
            cluster_id="other",
        )
        await mesh.add_proxy(server)
        mesh.put(
            a_workload("client", sa="frontend", ips=[], protocol=TunnelProtocol.HBONE),
            a_workload("gateway", ns="istio-system", sa="gateway", ips=[gateway_ip], network="far"),
            server,
            a_service(
                HOST,
                ns="far",
                vips=[client_ip],
                port_map={vip[1]: app_port},
                subject_alt_names=(vouched,),
            ),
        )
        gateway = Gateway(mesh, Endpoint.parse(f"{server_ip}:15008"))
        mesh.nursery.start_soon(gateway.serve, outer)
        mesh.nursery.start_soon(peers.serve, peers.echo, app)
        yield mesh, gateway, vip
        for tunnel in gateway.tunnels:
            tunnel.close()


async def test_bytes_and_both_identities_cross_the_gateway() -> None:
    async with two_networks(vouched=str(SERVER_ID)) as (mesh, gateway, vip):

        async def call() -> trio.SocketStream:
            await trio.lowlevel.checkpoint()
            return connect(vip)

        await peers.echo_and_check(call, streams=4, size=200_000)
        assert gateway.authorities == [f"{HOST}:{vip[1]}".encode()] * 4
        sent = await mesh.lines.wait_for("connection complete", 'direction="outbound"')
        assert f'dst.identity="{SERVER_ID}"' in sent
        assert 'dst.workload="cart"' in sent
        assert 'dst.cluster="other"' in sent
        taken = await mesh.lines.wait_for("connection complete", 'direction="inbound"')
        assert 'src.identity="spiffe://cluster.local/ns/shop/sa/frontend"' in taken


async def test_somebody_else_behind_the_gateway_is_refused() -> None:
    async with two_networks(vouched="spiffe://cluster.local/ns/far/sa/another") as (mesh, _, vip):
        async with connect(vip) as stream:
            await expect_abort(stream)
        line = await mesh.lines.wait_for("connection complete", 'direction="outbound"')
        assert "did not present the expected SAN" in line


async def test_a_server_that_is_revoked_behind_the_gateway_is_cut_off() -> None:
    revocations = Revocations()
    async with two_networks(vouched=str(SERVER_ID), revocations=revocations) as (mesh, _, vip):
        async with connect(vip) as stream:
            await stream.send_all(b"ping")
            assert await peers.read_exactly(stream, 4) == b"ping"
            shown = mesh.node.certificates.cached(SERVER_ID)
            assert shown is not None
            revocations.replace(parse_lists(mesh.authority.revoke(shown.serial)))
            await expect_abort(stream)
        (outbound,) = mesh.lines.ended("outbound")
        assert outbound["error"] == "connection closed: peer certificate revoked by CRL"
        assert outbound["reason"] == "revoked"
        async with connect(vip) as stream:
            await expect_abort(stream)
        outbound = mesh.lines.ended("outbound")[1]
        assert "tls handshake error: peer certificate revoked by CRL" in outbound["error"]
        text = "".join(mesh.node.metrics.text())
        assert 'istio_crl_policy_rejections_total{reporter="source"} 2' in text

"""SOCKS5 on the pod's loopback: an application asks for the tunnel itself (dataplane.md 5)."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import trio

from ztunnel.errors import (
    ConnectRefusedError,
    DeniedError,
    PeerError,
    RouteError,
    UnreachableError,
    ZtunnelError,
)
from ztunnel.model.network import Endpoint, HostPort
from ztunnel.proxy.outbound import OutboundConnection
from ztunnel.transport.conversation import receive, send
from ztunnel.transport.resolver import resolve
from ztunnel.wire.socks5 import MESSAGE_BYTES_MAX, Reply, Socks5Server, reply

if TYPE_CHECKING:
    from ztunnel.dns.server import DnsServer
    from ztunnel.proxy.context import ProxyContext
    from ztunnel.transport.pool import Pool
    from ztunnel.transport.sockets import Socket

HANDSHAKE_SECONDS = 10.0  # the reference waits for ever


class SocksConnection(OutboundConnection):
    """One connection of a program that speaks SOCKS5 to us."""

    __slots__ = ("_asked", "_dns")

    def __init__(
        self,
        context: ProxyContext,
        pool: Pool,
        sock: Socket,
        source: Endpoint,
        *,
        dns: DnsServer | None,
    ) -> None:
        super().__init__(context, pool, sock, source)
        self._asked = False
        self._dns = dns  # knows the names of the mesh; None if the DNS proxy is off

    def serve(self) -> None:
        """Begin; returns at once."""
        self.context.live.outbound[self] = None
        self.wait_for(self._converse)

    def greet(self) -> None:
        """Report success: only now there is a connection."""
        self._asked = False
        self._say(Reply.SUCCEEDED)

    def release(self, error: ZtunnelError | None) -> None:
        """Report failure if the client still waits for an answer."""
        if self._sock.fileno() >= 0:
            # Whoever still waits for it would be in the way of the next socket with its number.
            trio.lowlevel.notify_closing(self._sock)
        if self._asked:
            self._asked = False
            self._say(reply_for(error))
            # An orderly end, or the reset would overtake the answer.
            self._sock.close()
        super().release(error)

    async def _converse(self) -> None:
        server = Socks5Server()
        with trio.move_on_after(HANDSHAKE_SECONDS) as scope:
            try:
                await self._shake_hands(server)
            except trio.ClosedResourceError:
                return  # cut meanwhile
        if scope.cancelled_caught:
            raise PeerError(f"SOCKS5 handshake not finished within {HANDSHAKE_SECONDS:g}s")
        if server.rest:
            # Nothing may be said before our answer (RFC 1928 s3), and we keep no buffer for it.
            raise PeerError("SOCKS5 client sent data before the answer")
        assert server.target is not None
        self._asked = True
        target = await self._endpoint(server.target)
        if not self.is_over:
            self.go_to(target)

    async def _shake_hands(self, server: Socks5Server) -> None:
        try:
            while server.target is None:
                server.receive(await self._hear())
                await send(self._sock, server.data_to_send())
        except PeerError:
            with contextlib.suppress(OSError):
                self._sock.send(server.data_to_send())
            raise

    async def _hear(self) -> bytes:
        data = await receive(self._sock, MESSAGE_BYTES_MAX)
        if not data:
            raise PeerError("SOCKS5 client left in the middle of the handshake")
        return data

    async def _endpoint(self, target: Endpoint | HostPort) -> Endpoint:
        """Find the address of a name: what the mesh says, else what the resolver says.

        Raises:
            RouteError: there is none.
        """
        if isinstance(target, Endpoint):
            await trio.lowlevel.checkpoint()
            return target
        found = None if self._dns is None else self._dns.resolver.local_addresses(target.host)
        if not found:
            found = await resolve(target.host, ipv6=self.context.node.config.ipv6_enabled)
        await trio.lowlevel.checkpoint()
        if not found:
            raise RouteError(f"dns lookup: no address for {target.host}")
        same = [ip for ip in found if ip.version == self.source.ip.version]
        return Endpoint((same or found)[0], target.port)

    def _say(self, code: Reply) -> None:
        # Ten bytes into the empty buffer of a fresh socket; if even that fails, the client is gone.
        with contextlib.suppress(OSError):
            self._sock.send(reply(code))


def reply_for(error: ZtunnelError | None) -> Reply:
    """Choose what to tell the client."""
    match error:
        case DeniedError():
            return Reply.NOT_ALLOWED
        case RouteError():
            return Reply.HOST_UNREACHABLE
        case ConnectRefusedError() | UnreachableError():
            return Reply.CONNECTION_REFUSED
        case _:
            return Reply.GENERAL_FAILURE

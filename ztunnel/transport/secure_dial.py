"""Making a tunnel to a peer: TCP, TLS, the question who answered, then HTTP/2."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import trio

from ztunnel.errors import PeerIdentityError, PeerTimeoutError, TlsError, UnreachableError
from ztunnel.model.network import Endpoint
from ztunnel.tls.verify import verify_server
from ztunnel.transport.dial import CONNECT_SECONDS
from ztunnel.transport.facts import TunnelFacts
from ztunnel.transport.handshake import connected, refuse, secure
from ztunnel.transport.tunnel import Tunnel
from ztunnel.wire.hbone.connection import HboneConnection

if TYPE_CHECKING:
    from collections.abc import Collection

    from ztunnel.decide.authorize import Permit
    from ztunnel.model.identity import Identity
    from ztunnel.tls.context import TlsContext
    from ztunnel.transport.owners import TunnelOwner
    from ztunnel.transport.reactor import Reactor
    from ztunnel.transport.sockets import SocketFactory
    from ztunnel.wire.hbone.settings import HboneSettings


INNER = Endpoint.parse("0.0.0.0:0")


async def reach(sockets: SocketFactory, permit: Permit, peer: Endpoint) -> socket.socket:
    """Connect to a tunnel peer; the socket is the caller's.

    Raises:
        PeerTimeoutError: nobody answered.
        UnreachableError: the connect was refused or cannot be routed.
    """
    try:
        sock = sockets.dial(permit, peer)
    except OSError as error:
        raise UnreachableError(f"io error: {error.strerror}") from error
    try:
        with trio.move_on_after(CONNECT_SECONDS) as scope:
            await connected(sock)
    except BaseException:
        sock.close()
        raise
    if scope.cancelled_caught:
        sock.close()
        raise PeerTimeoutError(
            "connection timed out, maybe a NetworkPolicy is blocking HBONE port "
            f"{peer.port}: {peer}"
        )
    return sock


async def raise_tunnel(
    reactor: Reactor,
    sock: socket.socket,
    context: TlsContext,
    expected: Collection[Identity],
    owner: TunnelOwner,
    *,
    settings: HboneSettings,
) -> Tunnel:
    """Turn a connected socket into a started client tunnel; closes the socket on failure.

    Raises:
        TlsError: the handshake failed, or somebody else answered (`PeerIdentityError`).
    """
    try:
        remote = _endpoint(sock.getpeername())
        resume = None if remote is INNER else (tuple(expected), remote)
        established = await secure(sock, context, server_side=False, resume=resume)
        try:
            peer = verify_server(established.peer, expected)
        except PeerIdentityError as error:
            refuse(sock, established, error)
            raise
        facts = TunnelFacts(
            local=_endpoint(sock.getsockname()),
            remote=remote,
            peer=peer,
            peer_not_after=established.peer.not_after,
            certificate=context.certificate,
            cipher=established.cipher,
            version=established.version,
            peer_links=established.peer.links,
        )
    except OSError as error:
        sock.close()
        raise TlsError(f"tls handshake error: {error.strerror}") from error
    except BaseException:
        sock.close()
        raise
    core = HboneConnection(client=True, settings=settings)
    tunnel = Tunnel(reactor, sock, established.records, core, owner, facts)
    tunnel.start(established.leftover)
    return tunnel


def _endpoint(address: object) -> Endpoint:
    """Name one end; a tunnel within a tunnel runs over a socket pair, which has no address."""
    return Endpoint.of(address) if isinstance(address, tuple) else INNER

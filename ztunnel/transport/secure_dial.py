"""Making a tunnel to a peer: TCP, TLS, the question who answered, then HTTP/2.

Nothing here is a task but `raise_tunnel`, for the rare one within a stream of another tunnel.
"""

from __future__ import annotations

import socket
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import trio

from ztunnel.errors import PeerIdentityError, PeerTimeoutError, TlsError, UnreachableError
from ztunnel.model.identity import Identity
from ztunnel.model.network import Endpoint
from ztunnel.tls.context import TlsContext
from ztunnel.tls.handshake import Handshake
from ztunnel.tls.verify import verify_server
from ztunnel.transport.dial import CONNECT_SECONDS, Dial
from ztunnel.transport.facts import TunnelFacts
from ztunnel.transport.owners import TunnelOwner
from ztunnel.transport.reactor import Reactor
from ztunnel.transport.securing import Securing, refuse
from ztunnel.transport.tunnel import Tunnel
from ztunnel.wire.hbone.connection import HboneConnection
from ztunnel.wire.hbone.settings import HboneSettings

if TYPE_CHECKING:
    from ztunnel.tls.handshake import Established


INNER = Endpoint.parse("0.0.0.0:0")
"""The address of either end of a tunnel within a tunnel, which has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What kind of tunnel is wanted, and with whom."""

    reactor: Reactor
    context: TlsContext
    expected: Collection[Identity]
    owner: TunnelOwner
    settings: HboneSettings
    remote: Endpoint = INNER


class Raised(Protocol):
    """Who wants to know what became of it."""

    def on_raised(self, tunnel: Tunnel, seconds: float) -> None:
        """Take the tunnel, which has been started; TLS took so many seconds."""

    def on_not_raised(self, error: Exception) -> None:
        """Learn why there is none: a ZtunnelError, or a bug. The socket is closed."""


class Raising:
    """One tunnel on its way; ends in exactly one call to its listener, or in `cancel`.

    It takes the socket, connected or not. The listener sets the deadline for all of it.
    """

    __slots__ = ("_dial", "_listener", "_plan", "_securing", "_sock", "_started")

    def __init__(self, plan: Plan, sock: socket.socket, listener: Raised) -> None:
        self._plan = plan
        self._sock = sock
        self._listener: Raised | None = listener
        self._dial: Dial | None = None
        self._securing: Securing | None = None
        self._started = 0.0

    def connect(self) -> None:
        """Wait for a connect that is under way, then go on."""
        remote = self._plan.remote
        silence = PeerTimeoutError(
            "connection timed out, maybe a NetworkPolicy is blocking HBONE port "
            f"{remote.port}: {remote}"
        )
        reactor = self._plan.reactor
        self._dial = Dial(reactor, self._sock, self, seconds=CONNECT_SECONDS, silence=silence)

    def secure(self) -> None:
        """Shake hands."""
        plan = self._plan
        self._started = trio.current_time()
        resume = None if plan.remote is INNER else (tuple(plan.expected), plan.remote)
        handshake = Handshake(plan.context, server_side=False, resume=resume)
        self._securing = Securing(plan.reactor, self._sock, handshake, self)
        self._securing.start()

    def cancel(self) -> None:
        """Give up without telling the listener; nothing if it has been told."""
        if self._listener is None:
            return
        self._listener = None
        for step in (self._dial, self._securing):
            if step is not None:
                step.cancel()
        self._close()

    # The dial and the handshake tell how they went.

    def on_connected(self, sock: socket.socket) -> None:  # noqa: ARG002 - it is ours already
        """Go on with TLS."""
        try:
            self.secure()
        except Exception as error:  # noqa: BLE001 - told, like any other
            self._fail(error)

    def on_unreachable(self, error: UnreachableError) -> None:
        """Tell why nobody can be reached."""
        self._fail(error)

    def on_insecure(self, error: Exception) -> None:
        """Tell why the handshake failed."""
        self._fail(error)

    def on_secured(self, established: Established, unsent: bytes) -> None:
        """Ask who answered, and make a tunnel."""
        seconds = trio.current_time() - self._started
        try:
            tunnel = self._tunnel(established, unsent)
        except OSError as error:
            self._fail(TlsError(f"tls handshake error: {error.strerror}"))
            return
        except Exception as error:  # noqa: BLE001 - told, like any other
            self._fail(error)
            return
        listener, self._listener = self._listener, None
        assert listener is not None
        tunnel.start(established.leftover, unsent)
        listener.on_raised(tunnel, seconds)

    def _tunnel(self, established: Established, unsent: bytes) -> Tunnel:
        plan, sock = self._plan, self._sock
        try:
            peer = verify_server(established.peer, plan.expected)
        except PeerIdentityError as error:
            refuse(sock, established, error, unsent)
            raise
        facts = TunnelFacts(
            local=INNER if plan.remote is INNER else Endpoint.of(sock.getsockname()),
            remote=plan.remote,
            peer=peer,
            peer_not_after=established.peer.not_after,
            certificate=plan.context.certificate,
            cipher=established.cipher,
            version=established.version,
            peer_links=established.peer.links,
        )
        core = HboneConnection(client=True, settings=plan.settings)
        return Tunnel(plan.reactor, sock, established.records, core, plan.owner, facts)

    def _fail(self, error: Exception) -> None:
        listener, self._listener = self._listener, None
        self._close()
        if listener is not None:
            listener.on_not_raised(error)

    def _close(self) -> None:
        self._plan.reactor.forget(self._sock)
        self._sock.close()


class _Wait:
    """What a task waits for."""

    def __init__(self) -> None:
        self.over = trio.Event()
        self.tunnel: Tunnel | None = None
        self.error: Exception | None = None

    def on_raised(self, tunnel: Tunnel, seconds: float) -> None:  # noqa: ARG002 - nobody asks
        self.tunnel = tunnel
        self.over.set()

    def on_not_raised(self, error: Exception) -> None:
        self.error = error
        self.over.set()


async def raise_tunnel(plan: Plan, sock: socket.socket) -> Tunnel:
    """Turn a connected socket into a started client tunnel; closes the socket on failure.

    Raises:
        TlsError: the handshake failed, or somebody else answered (`PeerIdentityError`).
    """
    wait = _Wait()
    raising = Raising(plan, sock, wait)
    raising.secure()
    try:
        await wait.over.wait()
    except BaseException:
        raising.cancel()
        if wait.tunnel is not None:
            wait.tunnel.close()
        raise
    if wait.error is not None:
        raise wait.error
    assert wait.tunnel is not None
    return wait.tunnel

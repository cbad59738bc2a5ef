"""The link to the node agent: which pods this node serves (cni.md 6.5).

One task: connect, say hello, do what the agent asks one request at a time, answer. Pods that
cannot be started are refused to the agent, kept, and tried again; the link stays up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn, Protocol, assert_never

import structlog
import trio

from ztunnel.errors import PeerError, UnreachableError, ZtunnelError
from ztunnel.linux import fdpass
from ztunnel.linux.netns import PodNetns
from ztunnel.model.workload import PodUid
from ztunnel.wire.zds import (
    Nothing,
    PodInfo,
    ProxySession,
    Reconcile,
    Start,
    Stop,
    encode_ack,
)

CONNECT_DELAY_SECONDS_MIN = 0.02  # doubling, for ever; the reference waits up to 15 s
CONNECT_DELAY_SECONDS_MAX = 2.0
COMPLAIN_SECONDS = 10.0  # between two warnings that the agent is away
RETRY_SECONDS = 5.0  # how often pending pods are tried again
SEND_SECONDS = 5.0  # an agent that reads no answers for so long is gone

log = structlog.get_logger(component="zds")


class PodHandler(Protocol):
    """Whoever serves pods. Calls never overlap."""

    async def add(self, uid: PodUid, info: PodInfo, netns: PodNetns) -> None:
        """Serve a pod; returns when its listeners are bound, and then owns `netns`.

        Raises:
            ZtunnelError | OSError: it cannot be served now; `netns` stays the caller's.
        """

    async def remove(self, uid: PodUid) -> None:
        """Stop serving a pod at once; unknown pods are fine."""

    async def reconcile(self, keep: frozenset[PodUid]) -> None:
        """Stop serving every pod that is not in `keep`."""


@dataclass(frozen=True, slots=True)
class LinkState:
    """How far we are with the node agent."""

    connected: bool = False
    has_snapshot: bool = False
    pending: frozenset[PodUid] = frozenset()

    @property
    def is_ready(self) -> bool:
        """Whether every pod of this node is served, as far as the agent told us."""
        return self.connected and self.has_snapshot and not self.pending


class AgentLink:
    """The proxy's end of ZDS. `on_state` is called with every new state, never twice the same."""

    def __init__(
        self,
        path: str,
        handler: PodHandler,
        *,
        on_state: Callable[[LinkState], None],
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self._retry_seconds = retry_seconds
        self._path = path
        self._handler = handler
        self._on_state = on_state
        self._state = LinkState()
        self._session = ProxySession()
        self._held: dict[PodUid, PodNetns] = {}  # namespaces of pending pods
        self._retry_at = math.inf
        self._complain_at = -math.inf

    async def run(self) -> NoReturn:
        """Serve the node agent until cancelled; what the handler serves is left alone."""
        delays = _delays()
        try:
            while True:
                try:
                    await self._serve_once()
                except (OSError, ZtunnelError) as exc:
                    if self._state.has_snapshot:
                        delays = _delays()
                    delay = next(delays)
                    now = trio.current_time()
                    if self._state.connected or now >= self._complain_at:
                        self._complain_at = now + COMPLAIN_SECONDS
                        log.warning(
                            "node agent not reachable; is it running? INPOD_UDS says where",
                            path=self._path,
                            error=str(exc),
                            retry_seconds=delay,
                        )
                self._announce(connected=False)
                await trio.sleep(delay)
        finally:
            self._release(frozenset())

    async def _serve_once(self) -> NoReturn:
        with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_SEQPACKET) as sock:
            await sock.connect(self._path)
            await _send(sock, self._session.connected())
            self._release(frozenset())
            self._retry_at = math.inf
            log.info("connected to node agent", path=self._path)
            self._announce(connected=True)
            problem = await self._converse(sock)
            # The reference ends its process on some of these; other pods must not suffer here.
            await _send(sock, encode_ack(str(problem)))
            raise problem

    async def _converse(self, sock: trio.socket.SocketType) -> PeerError:
        """Answer the agent until it breaks the protocol; return how it did.

        Raises:
            UnreachableError | OSError: the connection ended.
        """
        while True:
            message = None
            try:
                with trio.move_on_at(self._retry_at) as waiting:
                    message = await _receive(sock)
                if waiting.cancelled_caught:
                    await self._retry_pending()
                    self._announce(connected=True)
                elif message is None:
                    raise UnreachableError("the node agent closed the connection")
                else:
                    answer = await self._digest(message)
                    self._announce(connected=True)  # before the agent can act on the answer
                    await _send(sock, answer)
            except PeerError as exc:
                return exc

    async def _digest(self, message: fdpass.Message) -> bytes:
        """Do what `message` asks and return the answer.

        Raises:
            PeerError: it makes no sense.
        """
        netns = PodNetns(message.fd) if message.fd is not None else None
        try:
            action = self._session.receive(message.data, netns.id if netns else None)
        except PeerError:
            if netns:
                netns.close()
            raise
        match action:
            case Start():
                assert netns is not None
                self._release(self._session.pending - {action.uid})
                self._held[action.uid] = netns
                return await self._start(action)
            case Stop(uid):
                await self._handler.remove(uid)
            case Reconcile(keep):
                await self._handler.reconcile(keep)
            case Nothing():
                if netns:
                    netns.close()
            case _:
                assert_never(action)
        self._release(self._session.pending)
        return self._session.succeeded()

    async def _start(self, start: Start) -> bytes:
        try:
            if start.replaces:
                await self._handler.remove(start.uid)
            await self._handler.add(start.uid, start.info, self._held[start.uid])
        except (ZtunnelError, OSError) as exc:
            log.warning("pod cannot be served yet", pod=start.uid, error=str(exc))
            if self._retry_at == math.inf:
                self._retry_at = trio.current_time() + self._retry_seconds
            return self._session.failed(str(exc))
        del self._held[start.uid]
        return self._session.succeeded()

    async def _retry_pending(self) -> None:
        self._retry_at = math.inf  # armed again by the first that fails again
        for uid in sorted(self._session.pending):
            start = self._session.retry(uid)
            assert start is not None
            await self._start(start)

    def _release(self, keep: frozenset[PodUid]) -> None:
        """Close the namespaces we hold of pods that are not in `keep`."""
        for uid in self._held.keys() - keep:
            self._held.pop(uid).close()

    def _announce(self, *, connected: bool) -> None:
        snapshot = connected and self._session.has_snapshot
        state = LinkState(connected, snapshot, self._session.pending)
        if state != self._state:
            self._state = state
            self._on_state(state)


async def _receive(sock: trio.socket.SocketType) -> fdpass.Message | None:
    data, control, flags, _ = await sock.recvmsg(
        fdpass.READ_BYTES, fdpass.ANCILLARY_BYTES, fdpass.RECEIVE_FLAGS
    )
    return fdpass.unpack(data, control, flags)


async def _send(sock: trio.socket.SocketType, data: bytes) -> None:
    with trio.move_on_after(SEND_SECONDS) as scope:
        await sock.send(data)
    if scope.cancelled_caught:
        raise UnreachableError("the node agent does not read our answers")


def _delays() -> Iterator[float]:
    delay = CONNECT_DELAY_SECONDS_MIN
    while True:
        yield delay
        delay = min(delay * 2, CONNECT_DELAY_SECONDS_MAX)

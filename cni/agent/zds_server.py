"""Tell the node proxies which pods to serve (cni.md 6.3 and 6.4).

How it works: the server remembers every pod with its namespace and replays them to each proxy that
connects. A new pod goes to the newest proxy that has had all pods; should it refuse, or be lost,
the next older one is asked. Deletions go to all.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import structlog
import trio
from structlog.contextvars import bind_contextvars

from cni.agent.errors import AgentError, NoProxyError, ProxyLostError
from cni.agent.unix_socket import listen_unix
from cni.agent.zds_connection import EnrolledPod, ProxyConnection
from ztunnel.errors import ZtunnelError
from ztunnel.linux import fdpass
from ztunnel.linux.netns import PodNetns
from ztunnel.model.workload import PodUid
from ztunnel.wire.zds import Add, Delete, Keep, PodInfo, Request, encode_request

CONNECTIONS_MAX = 16  # two during an upgrade; more means something is wrong
ACCEPT_SECONDS = 0.2  # five connections in a second, as the reference

log = structlog.get_logger(component="zds")


class ZdsServer:
    """What the rest of the node agent sees: pods in and out."""

    def __init__(self) -> None:
        self._pods: dict[PodUid, EnrolledPod] = {}
        self._connections: list[ProxyConnection] = []  # oldest first
        self._connected = trio.Event()
        self._change = trio.Event()

    @property
    def connections(self) -> int:
        """How many proxies are connected (the metric `ztunnel_connected`)."""
        return len(self._connections)

    async def wait_connected(self) -> None:
        """Wait until a proxy is connected and has been told about all pods."""
        while not any(connection.is_ready for connection in self._connections):
            await self._connected.wait()
        await trio.lowlevel.checkpoint()

    async def wait_change(self) -> None:
        """Wait until some proxy has been told about all pods, or is lost."""
        await self._change.wait()

    @property
    def is_ready(self) -> bool:
        """Whether a proxy is connected that has been told about all pods."""
        return any(connection.is_ready for connection in self._connections)

    def is_served(self, uid: PodUid) -> bool:
        """Whether a proxy that is connected has said that it serves the pod."""
        return any(item.is_ready and uid in item.served for item in self._connections)

    def remember(self, uid: PodUid, info: PodInfo, netns: PodNetns) -> None:
        """Have a pod in the snapshot for proxies that connect from now on.

        The caller keeps `netns`.

        Raises:
            AgentError: the pod's names are too long to be sent.
        """
        _check_size(Add(uid, info))
        self._forget(uid)
        self._pods[uid] = EnrolledPod(info, netns.duplicate())

    def keep(self, uid: PodUid) -> None:
        """Remember a pod whose namespace is not known (any more), so that no proxy drops it.

        Raises:
            AgentError: the uid is too long to be sent.
        """
        _check_size(Keep(uid))
        self._pods.setdefault(uid, EnrolledPod())

    async def add(self, uid: PodUid, info: PodInfo, netns: PodNetns) -> None:
        """Have a pod served; returns when a proxy has its listeners bound.

        The caller keeps `netns`. Also after an error the pod is remembered, and comes with the
        next proxy's snapshot, until `remove`.

        Raises:
            AgentError: the pod's names are too long to be sent; it is not remembered.
            NoProxyError: none is connected.
            ProxyRefusedError: the newest proxy said no, and so did the others.
            ProxyLostError: the newest proxy ended or did not answer in time; likewise.
        """
        self.remember(uid, info, netns)
        first: AgentError | None = None
        # Those that still receive their snapshot may have passed this pod: tell them as well.
        told = [item for item in self._connections if not item.is_ready]
        jobs = {item: item.submit(Add(uid, info)) for item in told}
        for connection in self._by_preference():
            job = jobs.get(connection) or connection.submit(Add(uid, info))
            await job.done.wait()
            if job.error is None:
                return
            first = first or job.error
        raise first or NoProxyError("no node proxy is connected")

    async def remove(self, uid: PodUid) -> None:
        """Have a pod no longer served by anyone; unknown pods are fine.

        Raises:
            ProxyLostError: a proxy ended or did not answer in time. It will not get the pod
                again, and drops it when it reconnects.
        """
        self._forget(uid)
        jobs = [connection.submit(Delete(uid)) for connection in self._connections]
        for job in jobs:
            await job.done.wait()
        for job in jobs:
            if isinstance(job.error, ProxyLostError):
                raise job.error
        await trio.lowlevel.checkpoint()

    async def run(self, listener: trio.socket.SocketType) -> None:
        """Serve whoever connects, until cancelled; `serve_zds` does this."""
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    sock, _ = await listener.accept()
                except OSError as exc:
                    # Out of descriptors, most likely; the proxy waits in the backlog.
                    log.warning("cannot accept a node proxy", error=str(exc))
                else:
                    self._admit(sock, nursery)
                await trio.sleep(ACCEPT_SECONDS)

    def _admit(self, sock: trio.socket.SocketType, connections: trio.Nursery) -> None:
        if self.connections < CONNECTIONS_MAX:
            connections.start_soon(self._serve, sock)
        else:
            log.warning("too many node proxies", limit=CONNECTIONS_MAX)
            sock.close()

    def _connected_now(self) -> None:
        self._connected.set()
        self._changed()

    def _changed(self) -> None:
        self._change.set()
        self._change = trio.Event()

    async def _serve(self, sock: trio.socket.SocketType) -> None:
        connection = ProxyConnection(sock, self._pods, on_ready=self._connected_now)
        self._connections.append(connection)
        bind_contextvars(conn_uuid=str(uuid4()))  # also for the tasks that it will have
        log.info("node proxy connected", connections=self.connections)
        try:
            await connection.run()
        except* (ZtunnelError, OSError, trio.TooSlowError) as group:
            log.info("node proxy lost", error=_first_text(group))
        finally:
            self._connections.remove(connection)
            connection.close()
            ready = any(item.is_ready for item in self._connections)
            if self._connected.is_set() and not ready:
                self._connected = trio.Event()  # only a set one: nobody waits on it any more
            self._catch_up()
            self._changed()

    def _catch_up(self) -> None:
        """Tell the proxy that is now the newest about pods only its successor knew."""
        for connection in self._by_preference()[:1]:
            for uid, pod in self._pods.items():
                if pod.info is not None and connection.is_ready and uid not in connection.told:
                    connection.submit(Add(uid, pod.info))

    def _by_preference(self) -> list[ProxyConnection]:
        """Order by readiness, then newest first."""
        newest_first = self._connections[::-1]
        return sorted(newest_first, key=lambda connection: not connection.is_ready)

    def _forget(self, uid: PodUid) -> None:
        pod = self._pods.pop(uid, None)
        if pod is not None and pod.netns is not None:
            pod.netns.close()

    def close(self) -> None:
        """Let go of all namespaces."""
        for uid in list(self._pods):
            self._forget(uid)


@asynccontextmanager
async def serve_zds(path: str, server: ZdsServer | None = None) -> AsyncIterator[ZdsServer]:
    """Listen for node proxies while the block runs; its errors come in a group.

    `server` may already know pods, for the first snapshot.

    Raises:
        SocketPathError: the path is too long, in use, or is no socket.
    """
    server = server or ZdsServer()
    with listen_unix(Path(path), kind=socket.SOCK_SEQPACKET) as listener:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.run, listener)  # noqa: ASYNC113 - it listens already
                yield server
                nursery.cancel_scope.cancel(reason="node agent stops")
        finally:
            server.close()


def _check_size(request: Request) -> None:
    try:
        fdpass.check_size(encode_request(request))
    except ValueError as exc:
        raise AgentError(f"cannot tell a proxy about pod {request}: {exc}") from exc


def _first_text(group: BaseExceptionGroup[BaseException]) -> str:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or "no answer in time"

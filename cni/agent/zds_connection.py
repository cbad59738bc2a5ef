"""One node proxy's connection: strictly one request at a time (cni.md 6.3).

How it works: one task asks, one reads. A proxy that does not answer in time is cut off, because
nothing on the wire says which request a late answer is for. However a connection ends, whoever
waits for an answer gets an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import structlog
import trio

from cni.agent.errors import AgentError, ProxyLostError, ProxyRefusedError
from ztunnel.linux import fdpass
from ztunnel.linux.netns import PodNetns
from ztunnel.model.workload import PodUid
from ztunnel.wire.zds import Add, AgentSession, Delete, Keep, PodInfo, Request, SnapshotSent

ANSWER_SECONDS = 5.0  # for the hello and for each answer, as the reference
SEND_SECONDS = 5.0
BACKLOG_MAX = 100  # requests that wait for one connection, as the reference

log = structlog.get_logger(component="zds")


@dataclass(frozen=True, slots=True)
class EnrolledPod:
    """A pod to serve; without `info` and `netns` the proxy can only keep it."""

    info: PodInfo | None = None
    netns: PodNetns | None = None


@dataclass(eq=False, slots=True)
class Job:
    """A request on its way; `done` is set in every outcome, `error` before it."""

    request: Request
    done: trio.Event = field(default_factory=trio.Event)
    error: AgentError | None = None


class ProxyConnection:
    """One proxy. `pods` stays the server's; `on_ready` is called once the proxy knows them all."""

    def __init__(
        self,
        sock: trio.socket.SocketType,
        pods: Mapping[PodUid, EnrolledPod],
        *,
        on_ready: Callable[[], None],
    ) -> None:
        self.is_ready = False  # it has had the snapshot
        self.told: set[PodUid] = set()  # pods it was asked to add
        self.served: set[PodUid] = set()  # pods it said it serves
        self._sock = sock
        self._pods = pods
        self._on_ready = on_ready
        self._session = AgentSession()
        self._jobs, self._waiting = trio.open_memory_channel[Job](BACKLOG_MAX)
        self._unfinished: set[Job] = set()

    def submit(self, request: Request) -> Job:
        """Queue a request."""
        job = Job(request)
        try:
            self._jobs.send_nowait(job)
            self._unfinished.add(job)
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            job.error = ProxyLostError("the node proxy does not keep up or is gone")
            job.done.set()
        return job

    async def run(self) -> None:
        """Serve the proxy until it ends; errors come in a group."""
        answers_in, answers = trio.open_memory_channel[str | None](1)
        async with answers_in, answers, trio.open_nursery() as nursery:
            nursery.start_soon(self._read, answers_in)
            with trio.fail_after(ANSWER_SECONDS):
                await answers.receive()
            log.info("node proxy said hello", version=self._session.version)
            await self._snapshot(answers)
            async for job in self._waiting:
                job.error = await self._ask(job.request, answers)
                self._finish(job)

    def close(self) -> None:
        """Fail what was not answered, and let go of the socket."""
        self.is_ready = False
        for job in list(self._unfinished):
            job.error = ProxyLostError("the node proxy was lost before it answered")
            self._finish(job)
        self._jobs.close()
        self._waiting.close()
        self._sock.close()

    def _finish(self, job: Job) -> None:
        self._unfinished.discard(job)
        job.done.set()

    async def _snapshot(self, answers: trio.MemoryReceiveChannel[str | None]) -> None:
        for uid, pod in list(self._pods.items()):
            request = Add(uid, pod.info) if pod.info is not None else Keep(uid)
            error = await self._ask(request, answers)
            if error is not None:
                log.warning("node proxy cannot serve a pod", uid=uid, error=str(error))
        await self._ask(SnapshotSent(), answers)
        self.is_ready = True
        self._on_ready()

    async def _ask(
        self, request: Request, answers: trio.MemoryReceiveChannel[str | None]
    ) -> AgentError | None:
        """Send a request and wait for its answer; return why it was refused, None if not.

        Raises:
            trio.TooSlowError: no answer in time, so answers can no longer be told apart.
        """
        if isinstance(request, Add | Delete):
            self.served.discard(request.uid)
        if isinstance(request, Add):
            self.told.add(request.uid)
        elif isinstance(request, Delete):
            self.told.discard(request.uid)
        if not await self._send(request):
            return ProxyRefusedError("the pod was removed meanwhile")
        with trio.fail_after(ANSWER_SECONDS):
            text = await answers.receive()
        what = type(request).__name__
        uid = None if isinstance(request, SnapshotSent) else request.uid
        log.debug("node proxy answered", to=what, uid=uid, refusal=text or None)
        if text:
            return ProxyRefusedError(f"the node proxy refused: {text}")
        if isinstance(request, Add):
            self.served.add(request.uid)
        return None

    async def _send(self, request: Request) -> bool:
        """Send a request with the pod's namespace; False if the pod is gone."""
        fd = None
        if isinstance(request, Add):
            pod = self._pods.get(request.uid)
            if pod is None or pod.netns is None:
                return False
            # Our own copy: while we wait to send, the pod may be removed and the number reused.
            fd = os.dup(pod.netns.fileno())
        try:
            data = self._session.send(request)
            with trio.fail_after(SEND_SECONDS):
                await self._sock.sendmsg([data], fdpass.ancillary(fd))
        finally:
            if fd is not None:
                os.close(fd)
        return True

    async def _read(self, answers: trio.MemorySendChannel[str | None]) -> None:
        while True:
            data, control, flags, _ = await self._sock.recvmsg(
                fdpass.READ_BYTES, fdpass.ANCILLARY_BYTES, fdpass.RECEIVE_FLAGS
            )
            message = fdpass.unpack(data, control, flags)
            if message is None:
                raise ProxyLostError("the node proxy closed the connection")
            if message.fd is not None:
                os.close(message.fd)
                raise ProxyLostError("the node proxy sent a descriptor")
            await answers.send(self._session.receive(message.data))

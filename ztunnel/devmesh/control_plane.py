"""A small control plane: delta ADS and the certificate authority on one TLS port.

Real gRPC, so that a proxy runs the code it runs in a cluster. What it serves is given to `publish`,
or comes from one file in Kubernetes terms that `follow` watches. It breaks on demand: streams can
be cut, answers held up, kept stale, or replaced by garbage; and it counts what clients refuse.

How it works: grpcio serves each call in a thread of its own. A stream's thread takes what happens
to that stream (a request, a change, a fault) from one queue and answers; the protocol itself is
`wire.delta_server`. Run it in another process than a proxy under load: threads share one
interpreter.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TypeAlias, assert_never

import grpc
import structlog
import trio

from ztunnel.devmesh.ca_server import MeshCa, server_credentials
from ztunnel.devmesh.kubernetes_terms import parse_manifests
from ztunnel.errors import PeerError, ResourceError
from ztunnel.identity.dev_ca import DevelopmentCa
from ztunnel.wire.delta import ADS_PATH
from ztunnel.wire.delta_server import ServerStream, Snapshot
from ztunnel.wire.resources import Resource, key_of

STREAMS_MAX = 64  # each has a thread
MESSAGE_BYTES_MAX = 200 * 1024 * 1024
WATCH_SECONDS = 0.3  # how often the file is looked at; a person who saves it does not notice

_OPTIONS = (
    ("grpc.so_reuseport", 0),  # two servers on one port would each get half of the clients
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    # As istiod; grpcio's own limit of one ping in five minutes is meant for idle clients.
    ("grpc.http2.min_ping_interval_without_data_ms", 15_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 15_000),
    ("grpc.keepalive_permit_without_calls", 1),
)

log = structlog.get_logger(component="control plane")


@dataclass(frozen=True, slots=True)
class _Changed:
    """There is something new to send; one name if it is known to be no more than that."""

    name: str | None = None


@dataclass(frozen=True, slots=True)
class _Raw:
    """Send these bytes, whatever they are."""

    data: bytes


@dataclass(frozen=True, slots=True)
class _End:
    """End the stream; without a status in good order."""

    status: grpc.StatusCode | None = None


_Happening: TypeAlias = bytes | _Changed | _Raw | _End
_Inbox: TypeAlias = "queue.SimpleQueue[_Happening]"


@dataclass(slots=True)
class Counts:
    """What clients did so far, for all streams together."""

    streams: int = 0
    acks: int = 0
    refusals: list[str] = field(default_factory=list)


class ControlPlane:
    """The server. Methods may be called from any thread; `port` is set by `start`."""

    def __init__(
        self,
        authority: DevelopmentCa,
        *,
        names: Iterable[str] = ("localhost", "127.0.0.1"),
        token: str | None = None,
    ) -> None:
        self.counts = Counts()
        self.port = 0
        self.delay_seconds = 0.0  # a fault: hold up every answer
        self.ca = MeshCa(authority, token=token)
        self._names = tuple(names)
        self._token = token
        self._lock = threading.Condition()
        self._snapshot = Snapshot()
        self._withheld: Snapshot | None = None
        self._is_stale = False
        self._inboxes: set[_Inbox] = set()
        self._stopping = threading.Event()
        self._server: grpc.Server | None = None

    @property
    def open_streams(self) -> int:
        """How many clients are connected now."""
        return len(self._inboxes)

    def wait_for(self, is_so: Callable[[], bool], *, seconds: float) -> bool:
        """Block until `is_so` about counts or streams; False if it was not in time."""
        with self._lock:
            return self._lock.wait_for(is_so, seconds)

    def start(self, address: str = "127.0.0.1:0") -> int:
        """Listen and return the port. After `stop` it may be started again."""
        self._stopping.clear()
        self._server = grpc.server(ThreadPoolExecutor(STREAMS_MAX), options=_OPTIONS)
        self._server.add_generic_rpc_handlers((_ads_handler(self._serve),))
        self.ca.register(self._server)
        credentials = server_credentials(self.ca.authority, self._names)
        self.port = self._server.add_secure_port(address, credentials)
        self._server.start()
        return self.port

    def stop(self) -> None:
        """Cut every connection and free the port; blocks until that is done."""
        self._stopping.set()
        self._tell(_End(grpc.StatusCode.UNAVAILABLE))
        if self._server is not None:
            self._server.stop(grace=None).wait()
            self._server = None

    def publish(self, resources: Iterable[Resource]) -> None:
        """Replace what there is to know; every client is sent what differs."""
        snapshot = Snapshot(resources)
        with self._lock:
            if self._is_stale:
                self._withheld = snapshot
                return
            self._snapshot = snapshot
        self._tell(_Changed())

    def publish_one(self, resource: Resource) -> None:
        """Add or replace one resource, without looking at all the others."""
        with self._lock:
            self._snapshot = self._snapshot.with_one(resource)
        self._tell(_Changed(key_of(resource)))

    def be_stale(self, *, stale: bool) -> None:
        """Withhold what is published from now on, or tell it after all."""
        with self._lock:
            self._is_stale = stale
            if stale or self._withheld is None:
                return
            self._snapshot, self._withheld = self._withheld, None
        self._tell(_Changed())

    def disconnect(self, status: grpc.StatusCode | None = grpc.StatusCode.UNAVAILABLE) -> None:
        """End every stream with a status, or in good order with None."""
        self._tell(_End(status))

    def send_raw(self, message: bytes) -> None:
        """Send every client a message that need not make sense."""
        self._tell(_Raw(message))

    def _tell(self, happening: _Happening) -> None:
        with self._lock:
            inboxes = tuple(self._inboxes)
        for inbox in inboxes:
            inbox.put(happening)

    def _serve(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        self._authenticate(context)
        inbox: _Inbox = queue.SimpleQueue()
        threading.Thread(target=_read, args=(requests, inbox), daemon=True).start()
        stream = ServerStream()
        with self._lock:
            self._inboxes.add(inbox)
            self.counts.streams += 1
            self._lock.notify_all()
        try:
            while not self._stopping.is_set():
                match inbox.get():
                    case _Changed(name):
                        answers = stream.push(self._snapshot, only=name)
                    case _Raw(data):
                        answers = [data]
                    case _End(status):
                        if status is not None:
                            context.abort(status, "ended on purpose")
                        return
                    case bytes() as request:
                        answers = self._answer(stream, request, context)
                    case happening:
                        assert_never(happening)
                for answer in answers:
                    self._stopping.wait(self.delay_seconds)
                    yield answer
        finally:
            with self._lock:
                self._inboxes.discard(inbox)
                self._lock.notify_all()

    def _answer(
        self, stream: ServerStream, request: bytes, context: grpc.ServicerContext
    ) -> list[bytes]:
        acks, refusals = stream.acks, len(stream.refusals)
        try:
            answers = stream.receive(request, self._snapshot)
        except PeerError as exc:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(exc))
        with self._lock:
            self.counts.acks += stream.acks - acks
            # Logged by `follow`: our log belongs to the one thread that runs trio.
            self.counts.refusals.extend(stream.refusals[refusals:])
            self._lock.notify_all()
        return answers

    def _authenticate(self, context: grpc.ServicerContext) -> None:
        shown = dict(context.invocation_metadata()).get("authorization")
        if self._token is not None and shown != f"Bearer {self._token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is not known here")


async def follow(
    control_plane: ControlPlane, path: Path, *, poll_seconds: float = WATCH_SECONDS
) -> NoReturn:
    """Publish what a file of manifests says, now and whenever it changes.

    A file that cannot be read or understood is logged, and what it said before stays true. What
    clients refuse is logged too.
    """
    last: str | None = None
    seen = 0
    while True:
        for refusal in control_plane.counts.refusals[seen:]:
            log.warning("client refused", error=refusal)
            seen += 1
        try:
            text = await trio.Path(path).read_text(encoding="utf-8")
            if text != last:
                last = text
                resources = await trio.to_thread.run_sync(parse_manifests, text)
                await trio.to_thread.run_sync(control_plane.publish, resources)
                log.info("published", path=str(path), resources=len(resources))
        except (OSError, ValueError, ResourceError) as exc:
            log.error("manifests are not used", path=str(path), error=str(exc))  # noqa: TRY400
        await trio.sleep(poll_seconds)


def _read(requests: Iterator[bytes], inbox: _Inbox) -> None:
    """Move requests into the inbox until the client is gone."""
    # grpcio's iterator raises whatever it likes when a call is cancelled.
    with contextlib.suppress(Exception):
        for request in requests:
            inbox.put(request)
    inbox.put(_End())


def _ads_handler(
    serve: Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]],
) -> grpc.GenericRpcHandler:
    _, service, name = ADS_PATH.split("/")
    method: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(serve)
    return grpc.method_handlers_generic_handler(service, {name: method})

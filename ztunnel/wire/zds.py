"""ZDS: how the node agent hands pods to the node proxy (cni.md 6). No I/O.

How it works: the proxy says hello; then the agent sends requests strictly one at a time and the
proxy answers each with an acknowledgement, an empty error meaning success. Nothing on the wire
says which request an answer is for, so a peer that loses count must be cut off. First come all
pods the agent knows (add, or keep where it lost the namespace), then `SnapshotSent`, then changes.
Descriptors travel beside the bytes; here a namespace is only whatever identifies it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import assert_never

from google.protobuf.message import DecodeError

from ztunnel.errors import PeerError
from ztunnel.model.identity import Namespace, ServiceAccount
from ztunnel.model.workload import PodUid
from ztunnel.wire.pb import zds_pb2

# A packet must fit the reader's 1024-byte buffer; the rest of a nack is its envelope.
ERROR_BYTES_MAX = 900
# Far more than a node can run (the kubelet's default is 110): a bound, not a policy.
PODS_MAX = 10_000


@dataclass(frozen=True, slots=True)
class PodInfo:
    """How the control plane knows the pod: the key of its workload (dataplane.md 0)."""

    name: str
    namespace: Namespace
    service_account: ServiceAccount


@dataclass(frozen=True, slots=True)
class Add:
    """Serve this pod; its namespace comes as a descriptor with the message."""

    uid: PodUid
    info: PodInfo


@dataclass(frozen=True, slots=True)
class Keep:
    """Go on serving this pod, if you do; the agent knows it but not its namespace."""

    uid: PodUid


@dataclass(frozen=True, slots=True)
class Delete:
    """Stop serving this pod."""

    uid: PodUid


@dataclass(frozen=True, slots=True)
class SnapshotSent:
    """That was all there is; what you serve beyond it is gone."""


Request = Add | Keep | Delete | SnapshotSent


def encode_hello() -> bytes:
    """Make the proxy's first message."""
    return zds_pb2.ZdsHello(version=zds_pb2.V1).SerializeToString()


def decode_hello(data: bytes) -> int:
    """Read the proxy's protocol version, which the reference agent only logs.

    Raises:
        PeerError: `data` is not a hello.
    """
    try:
        return int(zds_pb2.ZdsHello.FromString(data).version)
    except DecodeError as exc:
        raise PeerError(f"not a ZDS hello: {exc}") from exc


def encode_ack(error: str = "") -> bytes:
    """Make an answer: empty `error` for success; a long one is cut to fit a packet."""
    text = error.encode("utf-8", "replace")[:ERROR_BYTES_MAX].decode("utf-8", "ignore")
    return zds_pb2.WorkloadResponse(ack=zds_pb2.Ack(error=text)).SerializeToString()


def decode_ack(data: bytes) -> str:
    """Read an answer's error; empty means success.

    Raises:
        PeerError: `data` is not an answer.
    """
    try:
        response = zds_pb2.WorkloadResponse.FromString(data)
    except DecodeError as exc:
        raise PeerError(f"not a ZDS response: {exc}") from exc
    if response.WhichOneof("payload") != "ack":
        raise PeerError("ZDS response without an ack")
    return str(response.ack.error)


def encode_request(request: Request) -> bytes:
    """Make one message of the agent."""
    match request:
        case Add(uid, info):
            workload = zds_pb2.WorkloadInfo(
                name=info.name, namespace=info.namespace, service_account=info.service_account
            )
            add = zds_pb2.AddWorkload(uid=uid, workload_info=workload)
            message = zds_pb2.WorkloadRequest(add=add)
        case Keep(uid):
            message = zds_pb2.WorkloadRequest(keep=zds_pb2.KeepWorkload(uid=uid))
        case Delete(uid):
            message = zds_pb2.WorkloadRequest()
            getattr(message, "del").uid = uid  # a Python keyword, so no attribute access
        case SnapshotSent():
            message = zds_pb2.WorkloadRequest(snapshot_sent=zds_pb2.SnapshotSent())
        case _:
            assert_never(request)
    return message.SerializeToString()


def decode_request(data: bytes) -> Request:
    """Read one message of the agent.

    Raises:
        PeerError: `data` is none, names no pod, or adds one without saying who it is.
    """
    try:
        message = zds_pb2.WorkloadRequest.FromString(data)
    except DecodeError as exc:
        raise PeerError(f"not a ZDS request: {exc}") from exc
    match message.WhichOneof("payload"):
        case "add":
            return _decode_add(message.add)
        case "keep":
            return Keep(_uid(message.keep.uid))
        case "del":
            return Delete(_uid(getattr(message, "del").uid))
        case "snapshot_sent":
            return SnapshotSent()
        case _:
            raise PeerError("ZDS request of an unknown kind")


def _decode_add(add: zds_pb2.AddWorkload) -> Add:
    if not add.HasField("workload_info"):
        raise PeerError("ZDS add without workload_info")
    info = add.workload_info
    account = ServiceAccount(info.service_account)
    return Add(_uid(add.uid), PodInfo(info.name, Namespace(info.namespace), account))


def _uid(text: str) -> PodUid:
    if not text:
        raise PeerError("ZDS request without a pod uid")
    return PodUid(text)


@dataclass(frozen=True, slots=True)
class Start:
    """Serve this pod in the namespace that came with the message (or that you kept of it).

    `replaces`: an older namespace of the same pod is still served; stop that first.
    """

    uid: PodUid
    info: PodInfo
    replaces: bool


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop serving this pod now."""

    uid: PodUid


@dataclass(frozen=True, slots=True)
class Reconcile:
    """Stop serving every pod that is not in `keep`."""

    keep: frozenset[PodUid]


@dataclass(frozen=True, slots=True)
class Nothing:
    """Only answer."""


Action = Start | Stop | Reconcile | Nothing


class ProxySession:
    """The proxy's side, across reconnects (cni.md 6.5).

    Feed it a message, do the action it returns, report how that went, send the answer.
    """

    def __init__(self) -> None:
        self.has_snapshot = False
        self._running: dict[PodUid, Hashable] = {}
        self._pending: dict[PodUid, tuple[PodInfo, Hashable]] = {}
        self._seen: set[PodUid] = set()
        self._current: tuple[Start, Hashable] | None = None

    @property
    def running(self) -> frozenset[PodUid]:
        """The pods that were started and not stopped."""
        return frozenset(self._running)

    @property
    def pending(self) -> frozenset[PodUid]:
        """The pods that could not be started and are to be tried again."""
        return frozenset(self._pending)

    def connected(self) -> bytes:
        """Begin a new connection, with the hello to send; what runs goes on."""
        self.has_snapshot = False
        self._pending.clear()
        self._seen.clear()
        self._current = None
        return encode_hello()

    def receive(self, data: bytes, netns: Hashable | None) -> Action:
        """Digest one message and the identity of the namespace that came with it.

        Raises:
            PeerError: the agent broke the protocol: send `encode_ack(<error>)` and reconnect.
                The reference ends its process on some of these; we never stop serving pods.
        """
        assert self._current is None
        request = decode_request(data)
        if (netns is not None) != isinstance(request, Add):
            raise PeerError(f"{'missing' if netns is None else 'unexpected'} descriptor")
        match request:
            case Add():
                assert netns is not None
                return self._add(request, netns)
            case Keep(uid):
                if self.has_snapshot:
                    raise PeerError("ZDS keep after the snapshot")
                self._see(uid)
                return Nothing()
            case Delete(uid):
                return self._delete(uid)
            case SnapshotSent():
                return self._snapshot()
            case _:
                assert_never(request)

    def succeeded(self) -> bytes:
        """Note that the action was done; returns the answer to send."""
        if self._current is not None:
            start, netns = self._current
            self._running[start.uid] = netns
            self._pending.pop(start.uid, None)
            self._current = None
        return encode_ack()

    def failed(self, reason: str) -> bytes:
        """Note that a start failed: the pod is pending; returns the answer to send."""
        assert self._current is not None, "only a start can fail"
        start, netns = self._current
        self._pending[start.uid] = (start.info, netns)
        self._current = None
        return encode_ack(f"failed to start proxy : {reason}")

    def retry(self, uid: PodUid) -> Start | None:
        """Try a pending pod again; None if it is not pending any more.

        Report with `succeeded` or `failed` and drop the answer: nobody waits for it.
        """
        assert self._current is None
        if uid not in self._pending:
            return None
        info, netns = self._pending[uid]
        return self._start(Add(uid, info), netns)

    def _add(self, request: Add, netns: Hashable) -> Action:
        if not self.has_snapshot:
            self._see(request.uid)
        if self._running.get(request.uid) == netns:
            self._pending.pop(request.uid, None)
            return Nothing()
        if len(self._running) + len(self._pending) >= PODS_MAX:
            raise PeerError(f"more than {PODS_MAX} pods on one node")
        return self._start(request, netns)

    def _start(self, request: Add, netns: Hashable) -> Start:
        replaces = self._running.pop(request.uid, None) is not None
        start = Start(request.uid, request.info, replaces)
        self._current = (start, netns)
        return start

    def _see(self, uid: PodUid) -> None:
        if len(self._seen) >= PODS_MAX:
            raise PeerError(f"more than {PODS_MAX} pods in one snapshot")
        self._seen.add(uid)

    def _delete(self, uid: PodUid) -> Action:
        self._pending.pop(uid, None)
        if not self.has_snapshot:
            # Stopped when the snapshot is complete, as it may yet be added again.
            self._seen.discard(uid)
            return Nothing()
        return Stop(uid) if self._running.pop(uid, None) is not None else Nothing()

    def _snapshot(self) -> Reconcile:
        if self.has_snapshot:
            raise PeerError("ZDS snapshot sent twice")
        self.has_snapshot = True
        keep = frozenset(self._seen)
        for uid in self._running.keys() - keep:
            del self._running[uid]
        self._seen.clear()
        return Reconcile(keep)


class AgentSession:
    """The agent's side of one connection (cni.md 6.3): strictly one request at a time.

    The shell keeps the deadlines. When one passes it must close the connection: a late answer
    would be taken for that of the next request (cni.md 11, C1; the reference goes on).
    """

    def __init__(self) -> None:
        self.version: int | None = None  # None until the proxy has said hello
        self._awaits_ack = False

    @property
    def may_send(self) -> bool:
        """Whether hello was said and every request has been answered."""
        return self.version is not None and not self._awaits_ack

    def send(self, request: Request) -> bytes:
        """Make the packet for `request`; only when `may_send`."""
        assert self.may_send
        self._awaits_ack = True
        return encode_request(request)

    def receive(self, data: bytes) -> str | None:
        """Digest one packet: None for the hello, else the answer's error, empty for success.

        Raises:
            PeerError: the packet makes no sense, or nobody asked for it; close the connection.
        """
        if self.version is None:
            self.version = decode_hello(data)
            return None
        if not self._awaits_ack:
            raise PeerError("unexpected ZDS packet")
        self._awaits_ack = False
        return decode_ack(data)

"""CRI: what a container runtime says of the sandboxes it runs, and their namespaces. No I/O.

The namespace's path has no field of its own. containerd and CRI-O both give it in the verbose part
of a status, which is JSON, as the OCI specification of the sandbox's first process.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from google.protobuf.message import DecodeError

from ztunnel.errors import PeerError
from ztunnel.model.workload import PodUid
from ztunnel.wire.pb import cri_pb2

LIST_PATH = "/runtime.v1.RuntimeService/ListPodSandbox"
STATUS_PATH = "/runtime.v1.RuntimeService/PodSandboxStatus"
_INFO = "info"
_NETWORK = "network"


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A sandbox that runs; `created`: in nanoseconds, by the runtime's clock."""

    id: str
    uid: PodUid
    created: int


class _Namespace(msgspec.Struct):
    type: str = ""
    path: str = ""


class _Linux(msgspec.Struct):
    namespaces: list[_Namespace] = []


class _Spec(msgspec.Struct):
    linux: _Linux = msgspec.field(default_factory=_Linux)


class _Info(msgspec.Struct, rename="camel"):
    runtime_spec: _Spec = msgspec.field(default_factory=_Spec)


def encode_list() -> bytes:
    """Ask for all sandboxes that run."""
    state = cri_pb2.PodSandboxStateValue(state=cri_pb2.SANDBOX_READY)
    wanted = cri_pb2.PodSandboxFilter(state=state)
    return cri_pb2.ListPodSandboxRequest(filter=wanted).SerializeToString()


def decode_list(data: bytes) -> list[Sandbox]:
    """Read the sandboxes that run; those of no pod, and those that do not run, are left out.

    Raises:
        PeerError: `data` is no such list.
    """
    try:
        items = cri_pb2.ListPodSandboxResponse.FromString(data).items
    except DecodeError as exc:
        raise PeerError(f"container runtime: not a list of sandboxes: {exc}") from exc
    return [
        Sandbox(item.id, PodUid(item.metadata.uid), item.created_at)
        for item in items
        if item.state == cri_pb2.SANDBOX_READY and item.id and item.metadata.uid
    ]


def encode_status(sandbox: str) -> bytes:
    """Ask for all about a sandbox."""
    request = cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=sandbox, verbose=True)
    return request.SerializeToString()


def decode_netns(data: bytes) -> str | None:
    """Read the path of a sandbox's network namespace; None if it has none, as on the host's.

    Raises:
        PeerError: `data` is no status, or one whose verbose part is not as all runtimes have it.
    """
    try:
        text = cri_pb2.PodSandboxStatusResponse.FromString(data).info[_INFO]
        info = msgspec.json.decode(text, type=_Info)
    except (DecodeError, msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise PeerError(f"container runtime: not a sandbox's status: {exc}") from exc
    paths = (one.path for one in info.runtime_spec.linux.namespaces if one.type == _NETWORK)
    return next(filter(None, paths), None)

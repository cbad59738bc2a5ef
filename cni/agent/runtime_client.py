"""Ask the container runtime for the namespaces of pods, by the socket that kubelet uses (CRI).

The runtime knows what processes only hint at: which sandbox is a pod's, also where none of its
processes is named after it or runs on this kernel at all. It is asked if its socket is mounted;
where that leads nowhere, there still are the processes (`pod_netns`).
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from pathlib import Path

import trio

from ztunnel.errors import CallError, PeerError
from ztunnel.model.workload import PodUid
from ztunnel.wire import cri
from ztunnel.wire.grpc import GrpcCall

# Where containerd, CRI-O and k3s listen, below the root of the host.
KNOWN_SOCKETS = (
    "run/containerd/containerd.sock",
    "run/crio/crio.sock",
    "run/k3s/containerd/containerd.sock",
)
CALL_SECONDS = 2.0
ANSWER_BYTES_MAX = 16 * 1024 * 1024  # of a few KiB for each of a node's pods
_READ_BYTES = 65536


class RuntimeClient:
    """The container runtime at the first of these sockets that is there."""

    def __init__(self, sockets: tuple[Path, ...]) -> None:
        self._sockets = sockets

    async def paths_of(self, uids: AbstractSet[PodUid]) -> tuple[dict[PodUid, str], list[str]]:
        """Give the paths, on the host, of these pods' namespaces, and why they are not all."""
        await trio.lowlevel.checkpoint()
        found: dict[PodUid, str] = {}
        socket = next((path for path in self._sockets if path.is_socket()), None)
        if not uids or socket is None:
            return found, []
        try:
            await _ask(socket, uids, found)
        except (CallError, PeerError, OSError, trio.BrokenResourceError) as exc:
            return found, [f"container runtime at {socket}: {exc}"]
        except trio.TooSlowError:
            return found, [f"container runtime at {socket}: no answer in time"]
        return found, []


async def _ask(socket: Path, uids: AbstractSet[PodUid], found: dict[PodUid, str]) -> None:
    sandboxes = cri.decode_list(await _call(socket, cri.LIST_PATH, cri.encode_list()))
    # Of several the latest: it replaced the others.
    latest = {one.uid: one.id for one in sorted(sandboxes, key=lambda one: one.created)}
    for uid in uids & latest.keys():
        answer = await _call(socket, cri.STATUS_PATH, cri.encode_status(latest[uid]))
        path = cri.decode_netns(answer)
        if path is not None:
            found[uid] = path


async def _call(socket: Path, path: str, request: bytes) -> bytes:
    """Make one call, on a connection of its own.

    Raises:
        CallError: it failed; what it says begins with gRPC's status.
        OSError: nobody listens.
        trio.BrokenResourceError: whoever listens hung up on us.
        trio.TooSlowError: there is no answer.
    """
    call = GrpcCall("localhost", path, (), seconds=CALL_SECONDS)
    call.send(request)
    call.finish()
    received = 0
    with trio.fail_after(CALL_SECONDS):
        async with await trio.open_unix_socket(socket) as stream:
            while not call.is_over:
                while piece := call.data_to_send():
                    await stream.send_all(piece)
                data = await stream.receive_some(_READ_BYTES)
                received += len(data)
                if not data:
                    call.close()
                elif received > ANSWER_BYTES_MAX:
                    call.fail("RESOURCE_EXHAUSTED", f"an answer over {ANSWER_BYTES_MAX} bytes")
                else:
                    call.receive(memoryview(data))
    answer = call.take()
    if call.failure is not None:
        raise call.failure
    if answer is None:
        raise CallError("UNKNOWN: an answer without a message", status="UNKNOWN")
    return bytes(answer)

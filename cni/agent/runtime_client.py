"""Ask the container runtime for the namespaces of pods, by the socket that kubelet uses (CRI).

The runtime knows what processes only hint at: which sandbox is a pod's, also where none of its
processes is named after it or runs on this kernel at all. It is asked if its socket is mounted;
where that leads nowhere, there still are the processes (`pod_netns`).
"""

from __future__ import annotations

from collections.abc import Callable, Set as AbstractSet
from pathlib import Path
from typing import cast

import trio

from ztunnel.errors import PeerError
from ztunnel.model.workload import PodUid
from ztunnel.wire import cri

# Where containerd, CRI-O and k3s listen, below the root of the host.
KNOWN_SOCKETS = (
    "run/containerd/containerd.sock",
    "run/crio/crio.sock",
    "run/k3s/containerd/containerd.sock",
)
CALL_SECONDS = 2.0
MESSAGE_BYTES_MAX = 16 * 1024 * 1024  # of a few KiB for each of a node's pods

_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.default_authority", "localhost"),
)


class RuntimeClient:
    """The container runtime at the first of these sockets that is there."""

    def __init__(self, sockets: tuple[Path, ...]) -> None:
        self._sockets = sockets

    async def paths_of(self, uids: AbstractSet[PodUid]) -> tuple[dict[PodUid, str], list[str]]:
        """Give the paths, on the host, of these pods' namespaces, and why they are not all."""
        found: dict[PodUid, str] = {}
        if not uids or not self._sockets:
            await trio.lowlevel.checkpoint()
            return found, []
        try:
            await trio.to_thread.run_sync(self._ask, uids, found)
        except PeerError as exc:
            return found, [str(exc)]
        return found, []

    def _ask(self, uids: AbstractSet[PodUid], found: dict[PodUid, str]) -> None:
        socket = next((path for path in self._sockets if path.is_socket()), None)
        if socket is None:
            return
        # Loading it takes 20 MB, which an agent without such a socket can do without.
        import grpc  # noqa: PLC0415

        with grpc.insecure_channel(f"unix:{socket}", _OPTIONS) as channel:

            def call(path: str, request: bytes) -> bytes:
                # Messages are bytes both ways, which grpcio's types do not know.
                ask = cast("Callable[..., bytes]", channel.unary_unary(path))
                return ask(request, timeout=CALL_SECONDS)

            try:
                sandboxes = cri.decode_list(call(cri.LIST_PATH, cri.encode_list()))
                # Of several the latest: it replaced the others.
                latest = {one.uid: one.id for one in sorted(sandboxes, key=lambda one: one.created)}
                for uid in uids & latest.keys():
                    path = cri.decode_netns(call(cri.STATUS_PATH, cri.encode_status(latest[uid])))
                    if path is not None:
                        found[uid] = path
            except grpc.RpcError as exc:
                # What grpcio raises is both, which its types cannot say.
                failed = cast("grpc.Call", exc)
                reason = f"{failed.code().name}: {failed.details()}"
                raise PeerError(f"container runtime at {socket}: {reason}") from exc

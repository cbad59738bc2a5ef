"""The cluster around nodes with a real runtime: API server, istiod, and what kubelet does.

API server and istiod run in a thread of their own, because the runtime is driven by calls that
block. Each node reaches them by an address on its loopback interface.
"""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import h11
import trio

from tests.support.builders import a_workload
from tests.support.kube import FakeKube
from ztunnel.devmesh.control_plane import ControlPlane
from ztunnel.devmesh.forward import forward
from ztunnel.devmesh.kube_mesh import ISTIOD_IP, ISTIOD_PORT, links
from ztunnel.identity.dev_ca import DevelopmentCa
from ztunnel.linux.netns import PodNetns
from ztunnel.model.workload import TunnelProtocol, Workload

T = TypeVar("T")

API_PORT = 6443
SYSTEM = "istio-system"
STATUS = "ambient.istio.io/redirection"
_DAEMONSET = f"/apis/apps/v1/namespaces/{SYSTEM}/daemonsets/"
_NODES = "/api/v1/nodes/"


class Api(FakeKube):
    """The API server; `changed` is called after each change.

    `wants_agents`: on every node, by a DaemonSet; else there is none.
    """

    changed: Callable[[], None] = staticmethod(lambda: None)
    wants_agents = True

    def put(self, *objects: dict[str, Any]) -> None:
        super().put(*objects)
        self.changed()

    def remove(self, name: str, ns: str = "shop") -> None:
        super().remove(name, ns)
        self.changed()

    def report(self, name: str, *ips: str) -> None:
        """Do as kubelet does once a pod has addresses, or none any more."""
        pod = self.pod(name)
        shown = {"podIP": ips[0], "podIPs": [{"ip": ip} for ip in ips]} if ips else {}
        pod["status"] = {"phase": "Running" if ips else "Pending", **shown}
        self.put(pod)

    def uninstall(self, is_gone: bool) -> None:
        """Delete the agents' DaemonSet, or put it back."""
        self.wants_agents = not is_gone

    def set_mode(self, name: str, mode: str | None) -> None:
        """Put a label on a pod that says whether it is in the mesh, or take it off."""
        pod = self.pod(name)
        pod["metadata"]["labels"] = {"istio.io/dataplane-mode": mode} if mode else {}
        self.put(pod)

    def workloads(self) -> list[Workload]:
        """Give what istiod makes of the pods."""
        return [
            a_workload(
                pod["metadata"]["name"],
                sa=pod["spec"]["serviceAccountName"],
                ips=[one["ip"] for one in pod["status"]["podIPs"]],
                node=pod["spec"]["nodeName"],
                protocol=TunnelProtocol.HBONE if is_captured(pod) else TunnelProtocol.NONE,
            )
            for pod in self.objects["pods"].values()
            if "podIPs" in pod["status"]
        ]

    async def _answer(self, exchange: Any, head: h11.Request, body: bytes) -> None:
        target = head.target.decode()
        if target.startswith(_DAEMONSET) and not self.wants_agents:
            await exchange.send(404, {"message": "not found"})
        elif target.startswith(_DAEMONSET):
            await exchange.send(200, {"metadata": {}, "spec": {"template": {"spec": {}}}})
        elif target.startswith(_NODES):
            await exchange.send(200, {"metadata": {"name": target.removeprefix(_NODES)}})
        else:
            await super()._answer(exchange, head, body)


def is_captured(pod: dict[str, Any]) -> bool:
    """Whether the node agent says so."""
    annotations = pod["metadata"].get("annotations") or {}
    return bool(annotations.get(STATUS) == "enabled")


@dataclass
class Doors:
    """Where one node reaches API server and istiod."""

    scope: trio.CancelScope


class Outside:
    """API server and istiod. Use as a context manager; its methods may be called from any thread
    but the one they run in."""

    def __init__(self) -> None:
        self.api = Api()
        self.authority = DevelopmentCa.create()
        self.token = secrets.token_urlsafe()
        self._plane = ControlPlane(self.authority, names=(ISTIOD_IP,), token=self.token)
        self._started = threading.Event()
        self._undo = ExitStack()
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None

    def proxy_settings(self) -> dict[str, str]:
        """Tell a node proxy where istiod is."""
        return links(self.authority, self.token)

    def do(self, action: Callable[[Api], T]) -> T:
        """Look at the API server's objects, or change them."""
        return trio.from_thread.run_sync(action, self.api, trio_token=self._token)

    def open_doors(self, node: PodNetns) -> Doors:
        """Listen on a node, in whose loopback interface our address is."""
        return trio.from_thread.run(self._open_doors, node, trio_token=self._token)

    def close_doors(self, doors: Doors) -> None:
        """Be out of reach for a node, as after its end."""
        trio.from_thread.run_sync(doors.scope.cancel, trio_token=self._token)

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            self._plane.start()
            undo.callback(self._plane.stop)
            thread = threading.Thread(target=trio.run, args=(self._run,))
            thread.start()
            undo.callback(thread.join)
            self._started.wait()
            assert self._nursery is not None
            stop = self._nursery.cancel_scope.cancel
            undo.callback(partial(trio.from_thread.run_sync, stop, trio_token=self._token))
            self.do(self._follow)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._undo.close()

    async def _run(self) -> None:
        async with trio.open_nursery() as self._nursery:
            self._token = trio.lowlevel.current_trio_token()
            self._started.set()
            await trio.sleep_forever()

    def _follow(self, api: Api) -> None:
        api.changed = lambda: self._plane.publish(api.workloads())

    async def _open_doors(self, node: PodNetns) -> Doors:
        assert self._nursery is not None
        doors: Doors = await self._nursery.start(self._serve, node)
        return doors

    async def _serve(self, node: PodNetns, *, task_status: trio.TaskStatus[Doors]) -> None:
        with trio.CancelScope() as scope:
            api, istiod = _listen(node, API_PORT), _listen(node, ISTIOD_PORT)
            async with trio.open_nursery() as nursery:
                await nursery.start(forward, istiod, self._plane.port)
                await nursery.start(trio.serve_listeners, self.api.serve, [api])
                task_status.started(Doors(scope))


def _listen(node: PodNetns, port: int) -> trio.SocketListener:
    sock = node.call(lambda: socket.create_server((ISTIOD_IP, port)))
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))

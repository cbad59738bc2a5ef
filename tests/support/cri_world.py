"""Two nodes with a real runtime, our agent and our proxy on each, and pods that call each other."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from tests.support.cri import wait_until
from tests.support.cri_cluster import Outside
from tests.support.cri_generations import Generation
from tests.support.cri_node import APP, AppPod, CriNode, join, running_node
from tests.support.namespaces import connect
from ztunnel.linux.netns import PodNetns

PAUSE_SECONDS = 0.02  # between the calls of background traffic
# Connections that the nodes see begin: to applications in the clear, and to proxies. Tunnels end
# within pods. Of older connections there may be stragglers.
_WATCH = f"""add table inet watch
delete table inet watch
table inet watch {{
  counter bare {{}}
  counter tunnelled {{}}
  chain forward {{
    type filter hook forward priority 0;
    tcp dport {APP} tcp flags & (syn | ack) == syn counter name bare
    tcp dport 15008 tcp flags & (syn | ack) == syn counter name tunnelled
  }}
}}"""


class World:
    """Both nodes, and the pods of the test that runs."""

    def __init__(self, outside: Outside, a: CriNode, b: CriNode) -> None:
        self.outside = outside
        self.a = a
        self.b = b
        self.apps: list[AppPod] = []
        self.server: AppPod

    def connect_nodes(self) -> None:
        """Lay the cable, after a boot of either node; count what goes through from now on."""
        join(self.a, self.b)
        for node in (self.a, self.b):
            node.nft("-f", "-", rules=_WATCH)

    def pod(self, node: CriNode, name: str, *, starts: bool = True) -> AppPod:
        """Have Kubernetes schedule a pod to a node, and kubelet start it if it is to."""
        app = node.schedule(name, str(uuid.uuid4()))
        self.apps.append(app)
        if starts:
            self.start(app)
        return app

    def start(self, app: AppPod) -> None:
        """Make a pod's sandbox, as kubelet does: again and again until nobody refuses it.

        Raises:
            TimeoutError: it is refused for too long; says why.
        """
        reasons: list[str] = []

        def has_started() -> bool:
            try:
                app.node.run_pod(app)
            except grpc.RpcError as exc:
                reasons[:] = [str(exc)]
            return app.sandbox is not None

        try:
            wait_until(has_started, "a pod")
        except TimeoutError as exc:
            raise TimeoutError(f"the pod {app.name} is refused: {reasons}") from exc

    def serve(self, app: AppPod) -> None:
        """Run a container that sends back what it gets; all proxies know of the pod."""
        runtime = app.node.containerd
        echo = ("/bin/busybox", "cat")
        words = ("/bin/busybox", "nc", "-ll", "-p", str(APP), "-e", *echo)
        container = runtime.start(app.pod, *words)
        port = f":{APP:04X} "
        wait_until(
            lambda: port in runtime.execute(container, "cat", "/proc/net/tcp6", "/proc/net/tcp"),
            "the server",
        )
        for node in (self.a, self.b):
            wait_until(partial(node.sees_captured, app.pod.ip), "the control plane")

    def say_hello(self, app: AppPod, target: AppPod, *, family: int = 0) -> tuple[int, str]:
        """Run a container that calls another pod at once and ends; its exit status and answer."""
        call = f"/bin/busybox nc -w 10 {target.pod.ips[family]} {APP}"
        words = ("/bin/busybox", "sh", "-c", f"/bin/busybox echo hello | {call}")
        runtime = app.node.containerd
        return runtime.wait_exit(runtime.start(app.pod, *words))

    def call(self, app: AppPod, target: AppPod) -> Call:
        """Call another pod, as an application that keeps its connection."""
        return Call(app, target)

    def forget(self, app: AppPod) -> None:
        """Delete a pod."""
        self.apps.remove(app)
        app.node.delete(app)

    def forget_all(self) -> None:
        """Delete the pods of the test."""
        for app in [*self.apps]:
            self.forget(app)

    def status(self, app: AppPod) -> str | None:
        """Give what the node agent says of a pod."""
        return self.outside.do(lambda api: api.status(app.name))

    def bare_connections(self) -> int:
        """Count the connections to applications that began in the clear, on both nodes."""
        return sum(self._count(node, "bare") for node in (self.a, self.b))

    def tunnels(self) -> int:
        """Count the connections from proxy to proxy, on both nodes."""
        return sum(self._count(node, "tunnelled") for node in (self.a, self.b))

    def _count(self, node: CriNode, name: str) -> int:
        listed = node.nft("-j", "list", "counter", "inet", "watch", name)["nftables"]
        (found,) = (entry["counter"] for entry in listed if "counter" in entry)
        packets: int = found["packets"]
        return packets


class Call:
    """An established connection to a server. Use as a context manager."""

    def __init__(self, app: AppPod, target: AppPod) -> None:
        with PodNetns.open(app.pod.netns) as space:
            self._sock = connect(space, target.pod.ip, APP)

    def is_answered(self, text: bytes = b"hello") -> bool:
        """Whether bytes arrive in both directions.

        Raises:
            OSError: the connection broke.
        """
        self._sock.sendall(text)
        answer = b""
        while len(answer) < len(text) and (piece := self._sock.recv(len(text))):
            answer += piece
        return answer == text

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._sock.close()


class Traffic:
    """Calls a server again and again, each time anew, while the block runs."""

    def __init__(self, app: AppPod, target: AppPod) -> None:
        self.failures: list[str] = []
        self.done = 0
        self._pair = app, target
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def more(self, count: int = 3) -> None:
        """Wait until so many calls that begin from now on have succeeded.

        Raises:
            TimeoutError: they have not.
        """
        wanted = self.done + count + 1  # one may be under way
        wait_until(lambda: self.done >= wanted, f"traffic; the last failures: {self.failures[-3:]}")

    def __enter__(self) -> Self:
        self._thread.start()
        self.more(1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(PAUSE_SECONDS):
            try:
                with Call(*self._pair) as call:
                    answered = call.is_answered()
            except OSError as exc:
                self.failures.append(repr(exc))
                continue
            if answered:
                self.done += 1
            else:
                self.failures.append("no answer")


@contextmanager
def running_world(generation: Generation) -> Iterator[World]:
    """Have two nodes in the mesh, all of which is ready, and a server on the second."""
    with ExitStack() as stack:
        outside = stack.enter_context(Outside())
        outside.do(lambda api: api.label("shop", "ambient"))
        nodes = [
            stack.enter_context(running_node(name, subnets, outside, generation))
            for name, subnets in (
                ("node-a", ("10.233.1.0/24", "fd00:233:1::/64")),
                ("node-b", ("10.233.2.0/24", "fd00:233:2::/64")),
            )
        ]
        world = World(outside, *nodes)
        world.connect_nodes()
        world.a.tells = True  # and on the other the agent has to look through the processes
        for node in nodes:
            node.start_agent()
            node.start_proxy()
        for node in nodes:
            node.wait_agent()
            node.wait_proxy()
        world.server = nodes[1].schedule("server", str(uuid.uuid4()))
        nodes[1].run_pod(world.server)
        world.serve(world.server)
        yield world


def descriptors_of(pid: int) -> int:
    """Count the descriptors of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))

"""A node with a real runtime on which our agent and our proxy run, and which can lose its power.

The agent is a container on that runtime (`cri_agent`), the proxy a process of this machine.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.cri import (
    SOCKET,
    Containerd,
    Pod,
    connected_containerd,
    containerd_folder,
    containerd_process,
    import_image,
    wait_until,
)
from tests.support.cri_agent import AGENT, ROOT, agent_container
from tests.support.cri_cluster import SYSTEM, Outside
from tests.support.cri_generations import Generation
from tests.support.cri_pages import answers, fetch
from tests.support.kube import a_pod
from ztunnel.devmesh.kube_mesh import ISTIOD_IP
from ztunnel.devmesh.node_proxy import PASSED_ON
from ztunnel.linux import netns
from ztunnel.linux.netns import PodNetns

APP = 8080
CHAIN_NAME = "10-pods.conflist"
STOP_SECONDS = 20
LINES_SHOWN = 60


@dataclass(eq=False)
class AppPod:
    """A pod of an application, as the API server has it; `sandbox` once the runtime made it."""

    name: str
    uid: str
    node: CriNode
    sandbox: Pod | None = None

    @property
    def pod(self) -> Pod:
        assert self.sandbox is not None
        return self.sandbox


class CriNode:
    """A node; `name` is what Kubernetes calls it. Made by `running_node`.

    `tells`: its agent may ask the runtime which namespace is whose.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        subnets: tuple[str, ...],
        outside: Outside,
        generation: Generation,
    ) -> None:
        self.tells = False
        self.settings: dict[str, str] = {}  # more of the agent's, from its next start on
        self.name = name
        self.folder = folder
        self.generation = generation
        self.subnets = subnets
        self.netns_name = folder.name
        self._outside = outside
        self._power = ExitStack()
        self._running = ExitStack()  # the runtime
        self._boots = 0
        self.containerd: Containerd
        self.netns: PodNetns
        self.agent_pod: Pod
        self.agent = ""  # the container
        self.proxy: subprocess.Popen[bytes] | None = None
        self._runtime: subprocess.Popen[bytes] | None = None

    # The node itself.

    def boot(self) -> None:
        """Make the network and start the runtime; neither agent nor proxy."""
        self._boots += 1
        self.agent = ""
        with ExitStack() as stack:
            run("ip", "netns", "add", self.netns_name)
            stack.callback(run, "ip", "netns", "del", self.netns_name)
            self.ip("link", "set", "lo", "up")
            self.ip("address", "add", f"{ISTIOD_IP}/32", "dev", "lo")
            self.netns = stack.enter_context(PodNetns.open(f"/run/netns/{self.netns_name}"))
            stack.callback(self._outside.close_doors, self._outside.open_doors(self.netns))
            self.run_dir.mkdir(parents=True)
            self.zds_dir.mkdir()
            place = self.folder, self.generation
            stack.callback(self._stop_runtime)
            self._start_runtime()
            self.containerd = stack.enter_context(connected_containerd(*place))
            if self._boots == 1:
                import_image(*place)
                (self.containerd.confs / CHAIN_NAME).write_bytes(
                    self.containerd.primary(*self.subnets)
                )
            stack.callback(self.stop_proxy)
            self._power = stack.pop_all()

    def _start_runtime(self) -> None:
        process = containerd_process(self.folder, self.generation)
        self._runtime = self._running.enter_context(process)

    def _stop_runtime(self) -> None:
        self._running.close()

    def restart_runtime(self) -> None:
        """Kill the runtime and start it again; pods live on."""
        assert self._runtime is not None
        self._runtime.kill()
        self._stop_runtime()
        self._start_runtime()
        self.containerd.wait_ready()
        self.containerd.wait_for_chain("istio-cni")

    def shut_down(self) -> None:
        """Stop all in good order."""
        self._power.close()

    def lose_power(self, pods: list[Pod]) -> None:
        """End everything at once, and lose what a node has in memory only."""
        assert self._runtime is not None
        self._runtime.kill()
        self._runtime.wait()
        if self.proxy is not None:
            self.proxy.kill()
        for pid in self._own_processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self._own_processes(), "the end of all containers")
        for pod in pods:
            netns.unpin(Path(pod.netns))
        for point in self._mounts():
            run("umount", "-l", point)
        shutil.rmtree(self.folder / "state")
        shutil.rmtree(self.folder / "memory")
        with suppress(Exception):  # It asks the runtime, which is gone.
            self._power.close()

    def ip(self, *words: str) -> None:
        """Run the program `ip` on the node."""
        run("ip", "-n", self.netns_name, *words)

    def nft(self, *words: str, rules: str = "") -> Any:
        """Run the program `nft` on the node; give what it lists."""
        command = ["nsenter", f"--net=/run/netns/{self.netns_name}", "nft", *words]
        done = subprocess.run(command, input=rules, check=True, capture_output=True, text=True)
        return json.loads(done.stdout) if done.stdout else None

    @property
    def run_dir(self) -> Path:
        return self.folder / "memory/run"

    @property
    def zds_dir(self) -> Path:
        return self.folder / "memory/zds"

    def chain(self) -> bytes:
        """Read the configuration of the runtime's network."""
        return (self.folder / "net.d" / CHAIN_NAME).read_bytes()

    def _own_processes(self) -> list[int]:
        """Name the shims of our runtime and everything in our pods' control groups."""
        found = []
        address, group = bytes(self.folder / SOCKET), f":/{self.folder.name}/"
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                is_shim = b"containerd-shim" in words[0] and address in words
                if (is_shim or group in (folder / "cgroup").read_text()) and _lives(folder):
                    found.append(int(folder.name))
        return found

    def _mounts(self) -> list[str]:
        table = Path("/proc/self/mounts").read_text().splitlines()
        points = [line.split(" ")[1] for line in table]
        return [point for point in reversed(points) if point.startswith(f"{self.folder}/state/")]

    # The node agent.

    def start_agent(self) -> None:
        """Run the agent's container, in a pod of its own after a boot; it need not be ready."""
        if not self.agent:
            self.agent_pod = self.containerd.run_pod("agent", namespace=SYSTEM, on_host=True)
        container = agent_container(
            self.name,
            folder=self.folder,
            run_dir=self.run_dir,
            zds_dir=self.zds_dir,
            tells=self.tells,
            settings=self.settings,
        )
        self.agent = self.containerd.start(self.agent_pod, *AGENT, **container)

    def stop_agent(self, *, grace_seconds: int = STOP_SECONDS) -> None:
        """Stop the agent by SIGTERM; without grace by SIGKILL."""
        self.containerd.end(self.agent, grace_seconds=grace_seconds)

    def agent_is_ready(self) -> bool:
        """Ask as kubelet does."""
        return answers(self.netns, 8000, "/readyz")

    def wait_agent(self) -> None:
        """Wait until the agent is ready, which includes the plugin's installation."""
        wait_until(self.agent_is_ready, "the node agent")
        self.containerd.wait_for_chain("istio-cni")

    def agent_pid(self) -> int:
        return self.containerd.process_of(self.agent)

    # The node proxy.

    def start_proxy(self) -> None:
        """Run the proxy; it need not be ready."""
        env = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        env |= self._outside.proxy_settings()
        env |= {
            "NODE_NAME": self.name,
            "INPOD_UDS": str(self.zds_dir / "ztunnel.sock"),
            "CONNECTION_TERMINATION_DEADLINE": "1s",
        }
        node = ["nsenter", f"--net=/run/netns/{self.netns_name}"]
        words = [sys.executable, "-m", "ztunnel", "proxy", "ztunnel"]
        with self._proxy_log.open("ab") as log:
            self.proxy = subprocess.Popen(
                [*node, *words], cwd=ROOT, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def stop_proxy(self, *, with_signal: signal.Signals = signal.SIGTERM) -> None:
        """End the proxy, if it runs."""
        if self.proxy is not None:
            self.proxy.send_signal(with_signal)
            self.proxy.wait(STOP_SECONDS)
            self.proxy = None

    def wait_proxy(self) -> None:
        """Wait until the proxy is ready, which it is once it serves all pods of this node."""
        wait_until(lambda: answers(self.netns, 15021, "/healthz/ready"), "the node proxy")

    @property
    def _proxy_log(self) -> Path:
        return self.folder / "proxy.log"

    def proxy_lines(self, *parts: str) -> list[str]:
        """Find the lines of the proxy that hold all of these."""
        lines = self._proxy_log.read_text(errors="replace").splitlines()
        return [line for line in lines if all(part in line for part in parts)]

    def wait_proxy_line(self, *parts: str) -> str:
        """Wait for such a line and give it."""
        wait_until(lambda: bool(self.proxy_lines(*parts)), f"a line of the proxy with {parts}")
        return self.proxy_lines(*parts)[0]

    def sees_captured(self, ip: str) -> bool:
        """Whether the proxy knows an address, and that it is to be reached by a tunnel."""
        known = json.loads(fetch(self.netns, 15000, "/config_dump")[1])["workloads"]
        return any(ip in one["workloadIps"] and one["protocol"] == "HBONE" for one in known)

    def show(self) -> None:
        """Print what agent and proxy said last."""
        print(f"--- {self.name}: agent")  # noqa: T201 - pytest shows it with the failure
        with suppress(Exception):
            print(*self.containerd.log_of(self.agent).splitlines()[-LINES_SHOWN:], sep="\n")  # noqa: T201
        print(f"--- {self.name}: proxy")  # noqa: T201
        with suppress(Exception):
            print(*self.proxy_lines()[-LINES_SHOWN:], sep="\n")  # noqa: T201

    # What kubelet does.

    def schedule(self, name: str, uid: str) -> AppPod:
        """Have the API server know a pod of this node, whose account has its name."""
        wanted = a_pod(name, uid=uid, account=name, node=self.name, ip=None, phase="Pending")
        self._outside.do(lambda api: api.put(wanted))
        return AppPod(name, uid, self)

    def run_pod(self, app: AppPod, *, group: str = "") -> Pod:
        """Make a pod's sandbox and report its address; `group` as in `Containerd.run_pod`.

        Raises:
            grpc.RpcError: the runtime, or a plugin, refused.
        """
        app.sandbox = None  # an earlier one is of no use any more
        pod = app.sandbox = self.containerd.run_pod(
            app.name, namespace="shop", uid=app.uid, group=group
        )
        self._outside.do(lambda api: api.report(app.name, *pod.ips))
        return pod

    def delete(self, app: AppPod) -> None:
        """Delete a pod: first its sandbox, then the object."""
        if app.sandbox is not None:
            self.containerd.remove(app.sandbox)
        self._outside.do(lambda api: api.remove(app.name))


def run(*words: str) -> None:
    """Run a program, which must succeed."""
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"{' '.join(words)}: {done.stderr}")


def join(node: CriNode, other: CriNode) -> None:
    """Lay a cable between two nodes, with routes to each other's pods."""
    run("ip", "link", "add", "peer", "netns", node.netns_name,
        "type", "veth", "peer", "name", "peer", "netns", other.netns_name)  # fmt: skip
    pairs = (
        (node, ("10.240.0.1/24", "fd00:240::1/64"), other),
        (other, ("10.240.0.2/24", "fd00:240::2/64"), node),
    )
    for here, addresses, _ in pairs:
        for address in addresses:
            here.ip("address", "add", address, "dev", "peer", "nodad")
        here.ip("link", "set", "peer", "up")
    for (here, _, there), (_, gateways, _) in zip(pairs, reversed(pairs), strict=True):
        for subnet, gateway in zip(there.subnets, gateways, strict=True):
            here.ip("route", "add", subnet, "via", gateway.partition("/")[0])


def _lives(folder: Path) -> bool:
    return (folder / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"


def inodes_held(pid: int) -> set[int]:
    """Name what a process keeps open, by inode; those of namespaces differ from all others."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found.add(link.stat().st_ino)
    return found


@contextmanager
def running_node(
    name: str, subnets: tuple[str, ...], outside: Outside, generation: Generation
) -> Iterator[CriNode]:
    """Have a node that is switched on; on failure print what agent and proxy said."""
    with containerd_folder(generation) as folder:
        (folder / "logs").mkdir()
        node = CriNode(name, folder, subnets, outside, generation)
        node.boot()
        try:
            yield node
        except BaseException:
            node.show()
            raise
        finally:
            node.shut_down()

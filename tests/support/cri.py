"""A real container runtime of one's own: containerd with private folders, driven over the CRI.

It runs in a network namespace that stands for the node, so that neither the host ends of the pods'
links nor what the primary plugin does to the node's settings is seen outside. Images are made by
`tarfile`: there is no registry.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cri_api.v1 import api_pb2 as cri, api_pb2_grpc

from tests.support.cri_generations import Generation

BUSYBOX = Path("/bin/busybox")
IMAGE = "localhost/test:1"
SOCKET = Path("api/containerd.sock")  # in a folder of its own, which can be mounted
START_SECONDS = 60.0
CALL_SECONDS = 60.0
STOP_SECONDS = 20.0
POLL_SECONDS = 0.02
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

# Without CAP_SYS_RESOURCE nobody may lower oom_score_adj, and the pause container would like to.
_CONFIG = """version = 2
root = "{0}/root"
state = "{0}/state"
[grpc]
  address = "{0}/api/containerd.sock"
[ttrpc]
  address = "{0}/api/containerd.sock.ttrpc"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{1}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{0}/bin"
    conf_dir = "{0}/net.d"
"""


@dataclass(frozen=True, slots=True)
class Pod:
    """A sandbox that the runtime has made; `ips` are in the order of the chain's subnets."""

    id: str
    uid: str
    ips: tuple[str, ...]
    netns: str

    @property
    def ip(self) -> str:
        return self.ips[0]


class Containerd:
    """A running containerd. Errors of its answers are `grpc.RpcError`."""

    def __init__(self, folder: Path, runtime: Any, generation: Generation) -> None:
        self.folder = folder
        self.generation = generation
        self.confs = folder / "net.d"
        self.plugins = folder / "bin"
        self._runtime = runtime
        self._configs: dict[str, Any] = {}
        self._numbers = itertools.count()

    def primary(self, *subnets: str) -> bytes:
        """Give a chain of one plugin that joins each pod to the node, by a link or a bridge.

        A pod gets an address of each subnet.
        """
        chosen = subnets or ("10.233.77.0/24",)
        ipam = {
            "type": "host-local",
            "dataDir": f"{self.folder}/ipam",
            "ranges": [[{"subnet": subnet}] for subnet in chosen],
            "routes": [{"dst": "::/0" if ":" in subnet else "0.0.0.0/0"} for subnet in chosen],
        }
        kind = self.generation.primary
        more = {"bridge": "pods0", "isGateway": True} if kind == "bridge" else {}
        first = {"type": kind, "ipMasq": False, "ipam": ipam, **more}
        spec = self.generation.spec
        return json.dumps({"cniVersion": spec, "name": "pods", "plugins": [first]}).encode()

    def run_pod(
        self,
        name: str,
        *,
        namespace: str = "default",
        uid: str = "",
        on_host: bool = False,
        group: str = "",
    ) -> Pod:
        """Make a sandbox, which runs the chain of plugins unless the pod is in the host's network.

        As kubelet does, it has a control group named after the pod, unless `group` is given.
        """
        uid = uid or str(uuid.uuid4())
        parent = f"/{self.folder.name}/{group or f'pod{uid}'}"
        kind = cri.NODE if on_host else cri.POD
        security = cri.LinuxSandboxSecurityContext(
            namespace_options=cri.NamespaceOption(network=kind, pid=cri.CONTAINER)
        )
        config = cri.PodSandboxConfig(
            metadata=cri.PodSandboxMetadata(name=name, uid=uid, namespace=namespace),
            log_directory=str(self.folder / "logs" / uid),
            linux=cri.LinuxPodSandboxConfig(
                cgroup_parent=parent,
                security_context=security,
            ),
        )
        request = cri.RunPodSandboxRequest(config=config)
        sandbox = self._runtime.RunPodSandbox(request, timeout=CALL_SECONDS).pod_sandbox_id
        status = self._runtime.PodSandboxStatus(
            cri.PodSandboxStatusRequest(pod_sandbox_id=sandbox, verbose=True), timeout=CALL_SECONDS
        )
        self._configs[sandbox] = config
        spaces = json.loads(status.info["info"])["runtimeSpec"]["linux"]["namespaces"]
        paths = (space.get("path", "") for space in spaces if space["type"] == "network")
        network = status.status.network
        ips = network.ip, *(more.ip for more in network.additional_ips)
        return Pod(sandbox, uid, ips, next(paths, ""))

    def start(self, pod: Pod, *command: str, **more: Any) -> str:
        """Start a container of the pod and give its id; `more` are fields of `ContainerConfig`."""
        name = f"c{next(self._numbers)}"
        config = cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name=name),
            image=cri.ImageSpec(image=IMAGE),
            command=command,
            log_path=f"{pod.id}-{name}",  # its folder is that of all sandboxes of the pod
            **more,
        )
        request = cri.CreateContainerRequest(
            pod_sandbox_id=pod.id, config=config, sandbox_config=self._configs[pod.id]
        )
        container: str = self._runtime.CreateContainer(request, timeout=CALL_SECONDS).container_id
        start = cri.StartContainerRequest(container_id=container)
        self._runtime.StartContainer(start, timeout=CALL_SECONDS)
        return container

    def execute(self, container: str, *command: str) -> str:
        """Run a command of the image in a running container and give what it prints."""
        execute = cri.ExecSyncRequest(container_id=container, cmd=["/bin/busybox", *command])
        result = self._runtime.ExecSync(execute, timeout=CALL_SECONDS)
        output: bytes = result.stdout
        return output.decode()

    def run(self, pod: Pod, *command: str, mounts: Mapping[str, Path] | None = None) -> str:
        """Run a command of the image in a container of the pod and give what it prints.

        `mounts` says which of our folders the container sees, by where it sees them.
        """
        seen = [
            cri.Mount(container_path=inside, host_path=str(ours))
            for inside, ours in (mounts or {}).items()
        ]
        return self.execute(self.start(pod, "/bin/busybox", "sleep", "600", mounts=seen), *command)

    def process_of(self, container: str) -> int:
        """Give the process id of a container, as we see it."""
        info = self._status(container).info["info"]
        pid: int = json.loads(info)["pid"]
        return pid

    def wait_exit(self, container: str) -> tuple[int, str]:
        """Wait until a container has ended; give its exit status and what it wrote.

        Raises:
            TimeoutError: it did not end.
        """

        def has_ended() -> bool:
            state: int = self._status(container).status.state
            return bool(state == cri.CONTAINER_EXITED)

        wait_until(has_ended, "a container's end")
        status = self._status(container).status
        return status.exit_code, self.log_of(container)

    def log_of(self, container: str) -> str:
        """Give what a container wrote so far, without the runtime's own words in each line."""
        path = Path(self._status(container).status.log_path)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "\n".join(line.split(" ", 3)[-1] for line in lines)

    def end(self, container: str, *, grace_seconds: int) -> None:
        """Send SIGTERM, and SIGKILL after that time; with no time at all the latter only."""
        request = cri.StopContainerRequest(container_id=container, timeout=grace_seconds)
        self._runtime.StopContainer(request, timeout=CALL_SECONDS + grace_seconds)

    def _status(self, container: str) -> Any:
        request = cri.ContainerStatusRequest(container_id=container, verbose=True)
        return self._runtime.ContainerStatus(request, timeout=CALL_SECONDS)

    def stop(self, pod: Pod) -> None:
        """Stop a pod: its network goes."""
        request = cri.StopPodSandboxRequest(pod_sandbox_id=pod.id)
        self._runtime.StopPodSandbox(request, timeout=CALL_SECONDS)

    def remove(self, pod: Pod) -> None:
        """Stop a pod and forget it."""
        self.stop(pod)
        request = cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id)
        self._runtime.RemovePodSandbox(request, timeout=CALL_SECONDS)

    def pods(self) -> list[str]:
        """Name the sandboxes there are."""
        answer = self._runtime.ListPodSandbox(cri.ListPodSandboxRequest(), timeout=CALL_SECONDS)
        return [item.id for item in answer.items]

    def wait_ready(self) -> None:
        """Wait until it answers, and make sure that it is the one we mean."""
        asked = self._runtime.Version(
            cri.VersionRequest(), timeout=START_SECONDS, wait_for_ready=True
        )
        major = int(asked.runtime_version.lstrip("v").partition(".")[0])
        assert major == self.generation.major or self.generation.major is None

    def network_is_ready(self) -> bool:
        """Whether the runtime says that pods can have a network."""
        answer = self._runtime.Status(cri.StatusRequest(), timeout=CALL_SECONDS)
        (found,) = (one for one in answer.status.conditions if one.type == "NetworkReady")
        return bool(found.status)

    def plugins_in_use(self) -> list[str]:
        """Name the chain that the next pod will get; empty as long as there is none."""
        answer = self._runtime.Status(cri.StatusRequest(verbose=True), timeout=CALL_SECONDS)
        networks = json.loads(answer.info["cniconfig"]).get("Networks") or []
        chains = [network["Config"] for network in networks if network["IFName"] != "lo"]
        return [plugin["Network"]["type"] for chain in chains for plugin in chain["Plugins"]]

    def wait_for_chain(self, *others: str) -> None:
        """Wait until the runtime has noticed a chain of the primary plugin and these.

        Raises:
            TimeoutError: it has not.
        """
        wanted = [self.generation.primary, *others]
        wait_until(lambda: self.plugins_in_use() == wanted, f"the chain {wanted}")

    def close(self) -> None:
        """Remove the pods that are left."""
        for sandbox in self.pods():
            with suppress(grpc.RpcError):  # Whoever looks at the folder afterwards sees it.
                self.remove(Pod(sandbox, "", (), ""))


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Look again and again until something holds.

    Raises:
        TimeoutError: it never does.
    """
    end = time.monotonic() + START_SECONDS
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"waited in vain for {what}")
        time.sleep(POLL_SECONDS)


@contextmanager
def running_containerd(generation: Generation) -> Iterator[Containerd]:
    """Start a containerd on a node of its own; there are no plugins configured yet."""
    with containerd_folder(generation) as folder:
        node = folder.name
        subprocess.run(["ip", "netns", "add", node], check=True)
        try:
            with (
                containerd_process(folder, generation),
                connected_containerd(folder, generation) as containerd,
            ):
                import_image(folder, generation)
                yield containerd
        finally:
            subprocess.run(["ip", "netns", "del", node], check=True)


@contextmanager
def containerd_folder(generation: Generation) -> Iterator[Path]:
    """Make the folder of a containerd; its name is that of the node, too."""
    # A short path: sockets, and the first lines of programs, have little room for one.
    folder = Path(tempfile.mkdtemp(prefix="cri"))
    try:
        for name in ("net.d", "bin"):
            (folder / name).mkdir()
        for program in generation.plugins.iterdir():
            (folder / "bin" / program.name).symlink_to(program)
        (folder / "config.toml").write_text(_CONFIG.format(folder, IMAGE))
        yield folder
    finally:
        _remove_cgroups(folder.name)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def connected_containerd(folder: Path, generation: Generation) -> Iterator[Containerd]:
    """Call a containerd; the pods that are left at the end are removed."""
    with grpc.insecure_channel(f"unix://{folder / SOCKET}") as to:
        stub: Any = api_pb2_grpc.RuntimeServiceStub  # not typed, if there at all
        runtime = stub(to)
        containerd = Containerd(folder, runtime, generation)
        containerd.wait_ready()
        try:
            yield containerd
        finally:
            containerd.close()


@contextmanager
def containerd_process(folder: Path, generation: Generation) -> Iterator[subprocess.Popen[bytes]]:
    """Run the containerd of a folder in the namespace of its node."""
    # Not `ip netns exec`: in the mount namespace it makes, the pods' namespaces would be invisible
    # to us.
    node = ["nsenter", f"--net=/run/netns/{folder.name}"]
    command = ["containerd", "-c", f"{folder}/config.toml", "-l", "warn"]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [*node, *command], stdout=log, stderr=log, env=generation.environment
        )
        try:
            yield process
        except BaseException:
            log.flush()
            print((folder / "log").read_text(errors="replace")[-4000:])  # noqa: T201, pytest shows it
            raise
        finally:
            process.terminate()
            process.wait(STOP_SECONDS)


def _remove_cgroups(name: str) -> None:
    """Remove the groups that the pods' own were in: one tree, or one of each kind in version 1."""
    root = Path("/sys/fs/cgroup")
    for top in (root / name, *root.glob(f"*/{name}")):
        for folder, _, _ in os.walk(top, topdown=False):
            with suppress(OSError):  # Some kinds are links to others.
                Path(folder).rmdir()


def import_image(folder: Path, generation: Generation) -> None:
    """Give a running containerd the image of all containers."""
    archive = folder / "image.tar"
    write_image(archive)
    command = ["ctr", "-a", str(folder / SOCKET), "-n", "k8s.io", "images", "import"]
    subprocess.run(
        [*command, str(archive)],
        check=True,
        stdout=subprocess.DEVNULL,
        env=generation.environment,
    )


def write_image(path: Path) -> None:
    """Write an archive, as Docker does, of an image with nothing in it but a static busybox."""
    layer = _tar({"bin/busybox": BUSYBOX.read_bytes()})
    config = {
        "architecture": _ARCHITECTURES[platform.machine()],
        "os": "linux",
        "config": {"Entrypoint": ["/bin/busybox", "sleep", "86400"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]
    contents = {
        "layer.tar": layer,
        "config.json": json.dumps(config).encode(),
        "manifest.json": json.dumps(manifest).encode(),
    }
    path.write_bytes(_tar(contents))


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o755
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()

"""The reference's node agent and plugin, as far as somebody gives their programs, on a `Scene`.

The agent expects what its DaemonSet mounts: `/host/proc`, `/host/run` and two folders for the
installer. It gets them in a mount namespace of its own, on a copy of this machine's root that
keeps its changes in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from tests.support import peers
from tests.support.agent_scene import APP, IPS, Scene, uid_of
from tests.support.kube import FakeKube, FakeProc, running
from tests.support.programs import Program, running_program
from ztunnel.devmesh.cluster import Cluster
from ztunnel.devmesh.forward import forward
from ztunnel.devmesh.mesh import DevMesh

API_IP, API_PORT = "203.0.113.251", 8001  # documentation range, RFC 5737
READY = "CNI ambient server marking ready"
ENROL = {"istio.io/dataplane-mode": "ambient"}
SELECTORS: list[dict[str, Any]] = [
    {"podSelector": {"matchLabels": ENROL}},
    {
        "podSelector": {
            "matchExpressions": [
                {"key": "istio.io/dataplane-mode", "operator": "NotIn", "values": ["none"]}
            ]
        },
        "namespaceSelector": {"matchLabels": ENROL},
    },
]
WITH_MOUNTS = """
set -e
root=$1 proc=$2; shift 2
mount --make-rprivate /
mkdir "$root"; mount -t tmpfs none "$root"; mkdir "$root/up" "$root/work" "$root/all"
mount -t overlay none -o "lowerdir=/,upperdir=$root/up,workdir=$root/work" "$root/all"
cd "$root/all"
for one in proc sys dev tmp; do mount --rbind "/$one" "$one"; done
account=run/secrets/kubernetes.io/serviceaccount
mkdir -p $account; echo none | tee $account/token > $account/ca.crt
mkdir -p host/proc host/run host/etc/cni/net.d host/opt/cni/bin opt/cni/bin
mount --bind "$proc" host/proc
mount --rbind /run host/run
exec chroot . "$@"
"""


def kubeconfig() -> str:
    """How both programs find the API server."""
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": f"http://{API_IP}:{API_PORT}"}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "c",
        }
    )


@asynccontextmanager
async def reference_scene(folder: Path) -> AsyncIterator[Scene]:
    """A scene whose API server can be reached from its node, with processes 1 and kubelet."""
    (folder / "proc").mkdir()
    (folder / "run").mkdir()
    (folder / "run" / "istio-cni-kubeconfig").write_text(kubeconfig())
    async with running(FakeKube(page=500)) as kube, trio.open_nursery() as nursery:
        with Cluster() as cluster:
            assert kube.server is not None
            scene = Scene(
                folder, cluster, cluster.add_node("node-a"), kube, FakeProc(folder / "proc")
            )
            add_system_processes(scene)
            kube.label("shop", None)
            for name in IPS:
                scene.add_pod(name)
                scene.announce(name)
            api = cluster.add_outside("api", API_IP)
            listener = await DevMesh.listen(None, api, API_PORT)  # type: ignore[arg-type]
            await nursery.start(forward, listener, kube.server.port)
            app = await DevMesh.listen(None, scene.pods["server"], APP)  # type: ignore[arg-type]
            await nursery.start(peers.serve, peers.echo, app)
            yield scene
            nursery.cancel_scope.cancel()


def add_system_processes(scene: Scene) -> None:
    """Have a first process, and a kubelet that root runs."""
    netns = scene.node.netns.fileno()
    scene.proc.add_raw("0::/init.scope", netns, name="init").rename(scene.proc.root / "1")
    kubelet = scene.proc.add_raw("0::/system.slice/kubelet.service", netns, name="kubelet")
    lines = ["Name:\tkubelet", f"Pid:\t{kubelet.name}", "Uid:\t0\t0\t0\t0", "Gid:\t0\t0\t0\t0"]
    (kubelet / "status").write_text("\n".join([*lines, ""]))


@asynccontextmanager
async def running_reference_agent(
    scene: Scene, program: str, **settings: str
) -> AsyncIterator[Program]:
    """Run the reference's node agent; it is killed at the end, and so cleans nothing up."""
    config = scene.folder / "kubeconfig"
    config.write_text(kubeconfig())
    environment = {
        "KUBECONFIG": str(config),
        "NODE_NAME": "node",
        "KUBERNETES_SERVICE_HOST": API_IP,
        "KUBERNETES_SERVICE_PORT": str(API_PORT),
        "POD_NAMESPACE": "istio-system",
        "AMBIENT_ENABLED": "true",
        "AMBIENT_IPV6": "true",
        "AMBIENT_ENABLEMENT_SELECTOR": json.dumps(SELECTORS),
        "ZTUNNEL_UDS_ADDRESS": str(scene.zds_path),
        "CNI_AGENT_RUN_DIR": str(scene.run_dir),
        "REPAIR_ENABLED": "false",
        "NATIVE_NFTABLES": "true",
        **settings,
    }
    root = scene.folder / f"root-{os.urandom(4).hex()}"
    words = ("sh", "-c", WITH_MOUNTS, "sh", str(root), str(scene.proc.root), program)
    async with running_program(
        scene.node, "unshare", "--mount", *words, ready=READY, environment=environment
    ) as agent:
        yield agent
        agent.process.kill()


async def call_plugin(
    scene: Scene, *words: str, netns: str, environment: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    """Do as a runtime that adds the pod `client`; give the exit status and what was printed."""
    ips = [{"interface": 0, "address": f"{ip}/24"} for ip in (IPS["client"],)]
    conf = {
        "cniVersion": "1.0.0",
        "name": "net",
        "type": "istio-cni",
        "cni_agent_run_dir": str(scene.run_dir),
        "ambient_enabled": True,
        "agent_decides": True,
        "enablement_selectors": SELECTORS,
        "pod_namespace": "istio-system",
        "prevResult": {
            "cniVersion": "1.0.0",
            "interfaces": [{"name": "eth0", "sandbox": netns}],
            "ips": ips,
            "dns": {},
        },
    }
    call = {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "c1",
        "CNI_NETNS": netns,
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/opt/cni/bin",
        "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=client;"
        f"K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID={uid_of('client')}",
    }
    with trio.fail_after(20):
        done = await trio.run_process(
            scene.node.command(*words),
            stdin=json.dumps(conf).encode(),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env={**os.environ, **(environment or {}), **call},
        )
    return done.returncode, json.loads(done.stdout)

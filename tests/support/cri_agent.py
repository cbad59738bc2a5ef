"""Our node agent as a container on a real runtime, with the mounts and capabilities of the chart.

In place of an image it sees this machine's interpreter and libraries.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cri_api.v1 import api_pb2 as cri

from tests.support.cri import SOCKET
from tests.support.cri_cluster import API_PORT, SYSTEM
from ztunnel.devmesh.kube_mesh import ISTIOD_IP

ROOT = Path(__file__).parents[2]
AGENT = (sys.executable, "-m", "cni.agent")
# daemonset.md, the node agent's container.
CAPABILITIES = ("NET_ADMIN", "NET_RAW", "SYS_PTRACE", "SYS_ADMIN", "DAC_OVERRIDE")


def agent_container(
    node: str,
    *,
    folder: Path,
    run_dir: Path,
    zds_dir: Path,
    tells: bool,
    settings: Mapping[str, str],
) -> dict[str, Any]:
    """Describe the container of the node's agent: fields of the CRI's `ContainerConfig`.

    `folder`: of the runtime. `tells`: the agent sees the runtime's socket.
    """
    security = cri.LinuxContainerSecurityContext(
        capabilities=cri.Capability(drop_capabilities=["ALL"], add_capabilities=CAPABILITIES),
        namespace_options=cri.NamespaceOption(network=cri.NODE, pid=cri.CONTAINER),
        readonly_rootfs=True,
    )
    env = {
        "NODE_NAME": node,
        "POD_NAMESPACE": SYSTEM,
        "AMBIENT_ENABLED": "true",
        "KUBERNETES_SERVICE_HOST": ISTIOD_IP,
        "KUBERNETES_SERVICE_PORT": str(API_PORT),
        "KUBERNETES_SERVICE_PROTOCOL": "http",
        "ZTUNNEL_CNI_TOKEN_FILE": "",
        "CNI_AGENT_RUN_DIR": str(run_dir),
        "ZTUNNEL_UDS_ADDRESS": str(zds_dir / "ztunnel.sock"),
        "PYTHONDONTWRITEBYTECODE": "1",
        **settings,
    }
    places = {
        "/host/etc/cni/net.d": folder / "net.d",
        "/host/opt/cni/bin": folder / "bin",
        **({"/host/run/containerd": folder / SOCKET.parent} if tells else {}),
        str(run_dir): run_dir,
        str(zds_dir): zds_dir,
    }
    return {
        "working_dir": str(ROOT),
        "mounts": [
            *_image(),
            _mount("/proc", "/host/proc"),
            _mount("/run/netns", "/host/var/run/netns", follows=True),
            *(_mount(str(path), inside, readonly=False) for inside, path in places.items()),
        ],
        "envs": [cri.KeyValue(key=key, value=value) for key, value in env.items()],
        "linux": cri.LinuxContainerConfig(security_context=security),
    }


def _image() -> list[Any]:
    paths = {
        "/usr",
        "/lib",
        "/lib64",
        "/sbin",
        "/etc/ld.so.cache",
        str(ROOT),
        sys.base_prefix,
        sys.prefix,
    }
    return [
        _mount(path, path)
        for path in sorted(paths)
        if Path(path).exists() and not (path != "/usr" and path.startswith("/usr/"))
    ]


def _mount(path: str, inside: str, *, readonly: bool = True, follows: bool = False) -> Any:
    """Have a folder of the node seen; `follows`: with whatever is mounted there later."""
    return cri.Mount(
        container_path=inside,
        host_path=path,
        readonly=readonly,
        propagation=cri.PROPAGATION_HOST_TO_CONTAINER if follows else cri.PROPAGATION_PRIVATE,
    )

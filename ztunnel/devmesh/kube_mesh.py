"""A mesh whose node proxies have a control plane and a CA, both real, in this process.

Built from one file of manifests: its pods become pods here, and the control plane serves what
follows from the file, also after it has changed.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from ztunnel.devmesh.cluster import Cluster, Node
from ztunnel.devmesh.control_plane import ControlPlane, follow
from ztunnel.devmesh.forward import forward
from ztunnel.devmesh.kubernetes_terms import parse_manifests
from ztunnel.devmesh.mesh import DevMesh, populate
from ztunnel.devmesh.node_proxy import OURS, NodeProxy, running_node_proxy
from ztunnel.errors import ConfigError, ResourceError
from ztunnel.identity.dev_ca import DevelopmentCa
from ztunnel.model.service import Service
from ztunnel.model.workload import Workload
from ztunnel.state.store import Update

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

ISTIOD_IP = "203.0.113.250"  # documentation range, RFC 5737
ISTIOD_PORT = 15012


@asynccontextmanager
async def kube_mesh(
    manifests: Path,
    *,
    prefix: str = "ztdemo",
    keep: bool = False,
    settings: Mapping[str, str] | None = None,
    programs: Mapping[str, Sequence[str]] | None = None,
) -> AsyncIterator[tuple[DevMesh, ControlPlane]]:
    """Build the mesh of a file of manifests; everything is gone when the block ends.

    `programs` names the proxies that are not ours, by node.
    The mesh works on a copy, `mesh.path`: what is written there takes effect at once.

    Raises:
        ZtunnelError: it could not be built; the message says what and why.
        OSError: the kernel refused something that no message of ours covers.
    """
    config = read(manifests)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{prefix}-")))
        path = Path(shutil.copy(manifests, folder / "mesh.yaml"))
        cluster = stack.enter_context(Cluster(prefix, keep=keep))
        mesh = DevMesh(cluster, config, DevelopmentCa.create(), path)
        token = secrets.token_urlsafe()
        plane = ControlPlane(mesh.authority, names=(ISTIOD_IP,), token=token)
        stack.callback(plane.stop)
        plane.start()
        tasks = await stack.enter_async_context(trio.open_nursery())
        stack.callback(tasks.cancel_scope.cancel)
        tasks.start_soon(follow, plane, path)
        istiod = mesh.outside["istiod"] = cluster.add_outside("istiod", ISTIOD_IP)
        await tasks.start(forward, await mesh.listen(istiod, ISTIOD_PORT), plane.port)
        environment = links(mesh.authority, token) | dict(settings or {})

        def start(node: Node, *, agent_socket: Path) -> AbstractAsyncContextManager[NodeProxy]:
            program = (programs or {}).get(node.name, OURS)
            return running_node_proxy(
                node, agent_socket=agent_socket, settings=environment, program=program
            )

        await populate(mesh, folder, stack, start)
        yield mesh, plane


def links(authority: DevelopmentCa, token: str) -> dict[str, str]:
    """Tell a node proxy where its control plane and CA are, and how to trust them."""
    address = f"https://{ISTIOD_IP}:{ISTIOD_PORT}"
    root = authority.roots_pem.decode()
    return {
        "XDS_ADDRESS": address,
        "CA_ADDRESS": address,
        "XDS_ROOT_CA": root,
        "CA_ROOT_CA": root,
        "AUTH_TOKEN": token,
        "GRPC_VERBOSITY": "NONE",  # it prints connection errors on stderr, which we log ourselves
    }


def read(manifests: Path) -> Update:
    """Read what a mesh is made of.

    Raises:
        ConfigError: the file cannot be read, or something in it is wrong.
    """
    try:
        resources = parse_manifests(manifests.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{manifests}: cannot be read: {error}") from error
    except ResourceError as error:
        raise ConfigError(f"{manifests.name}: {error}") from error
    return Update(
        workloads=[one for one in resources if isinstance(one, Workload)],
        services=[one for one in resources if isinstance(one, Service)],
    )

"""Meshes for end-to-end tests: real namespaces, real redirection, real node proxies."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
import yaml

from tests.support.envoy_config import Credentials
from ztunnel.devmesh.cluster import Member
from ztunnel.devmesh.mesh import DevMesh, dev_mesh
from ztunnel.model.identity import Identity

HOST = "cart.shop.svc.cluster.local"


def a_pod(name: str, ip: str, *, ns: str = "shop", node: str = "node-a", **more: Any) -> Any:
    """A workload of the static configuration; its account has its name."""
    return {
        "uid": f"test//Pod/{ns}/{name}",
        "name": name,
        "namespace": ns,
        "serviceAccount": name,
        "trustDomain": "cluster.local",
        "node": node,
        "workloadIps": [ip, f"fd00::{ip.replace('.', ':')}"],
        "protocol": "HBONE",
        "services": {},
        **more,
    }


@asynccontextmanager
async def running_mesh(
    folder: Path,
    workloads: Iterable[Any],
    services: Iterable[Any] = (),
    policies: Iterable[Any] = (),
    **settings: str,
) -> AsyncIterator[DevMesh]:
    """Run a mesh of these; on failure print what the proxies said."""
    path = folder / "mesh.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "workloads": list(workloads),
                "services": list(services),
                "policies": list(policies),
            }
        )
    )
    async with dev_mesh(path, prefix=f"zt{os.getpid()}", settings=settings) as mesh:
        try:
            yield mesh
        except BaseException:
            for name, proxy in mesh.proxies.items():
                print(f"--- {name}", *proxy.lines.all[-40:], sep="\n")  # noqa: T201
            raise


def credentials(mesh: DevMesh, identity: str) -> Credentials:
    """A certificate of the mesh's own authority, for a peer that is not ours."""
    issued = mesh.authority.issue(Identity.parse(identity))
    return Credentials(chain=issued.chain_pem, key=issued.key_pem, roots=issued.roots_pem)


def namespace_file(member: Member) -> Path:
    """A path by which another program can enter a member's namespace while we live."""
    return Path(f"/proc/{os.getpid()}/fd/{member.netns.fileno()}")


async def call_refused(mesh: DevMesh, pod: str, ip: str, port: int) -> bool:
    """Whether a pod's call is refused, be it so fast that its connect already fails."""
    try:
        stream = await mesh.connect(mesh.pods[pod], ip, port)
    except ConnectionResetError:
        return True
    return await refused(stream)


async def refused(stream: trio.SocketStream) -> bool:
    """Whether the connection ends in a reset or an end before any answer."""
    async with stream:
        with trio.fail_after(5):
            try:
                await stream.send_all(b"anybody there?")
                return await stream.receive_some() == b""
            except trio.BrokenResourceError:
                return True

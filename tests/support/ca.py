"""A CA that runs, and clients of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio

from tests.support.certs import AUTHORITY
from ztunnel.devmesh.ca_server import MeshCa, serving_ca
from ztunnel.identity.ca import CaClient
from ztunnel.identity.dev_ca import DAY_SECONDS, DevelopmentCa
from ztunnel.model.settings import ServerUrl, Source, SourceKind
from ztunnel.transport.grpc import GrpcClient
from ztunnel.transport.grpc_access import GrpcAccess


@dataclass
class RunningCa:
    """A CA on a port of this machine."""

    ca: MeshCa
    port: int

    def client(
        self, *, ttl_seconds: float = DAY_SECONDS, call_seconds: float = 5.0, **access: Any
    ) -> CaClient:
        """Make a client; `access` replaces fields of its `GrpcAccess`."""
        server = ServerUrl("localhost", self.port)
        root = Source(SourceKind.LITERAL, AUTHORITY.roots_pem.decode())
        caller = GrpcClient(GrpcAccess(**{"server": server, "root": root, **access}))
        return CaClient(
            caller=caller,
            address=str(server),
            ttl_seconds=ttl_seconds,
            impersonates=True,
            call_seconds=call_seconds,
        )


@asynccontextmanager
async def a_running_ca(
    authority: DevelopmentCa = AUTHORITY, **options: Any
) -> AsyncIterator[RunningCa]:
    """Run one whose server certificate `AUTHORITY` has signed, whoever signs for workloads."""
    ca = MeshCa(authority, **options)
    serving = serving_ca(ca, root=AUTHORITY)
    port = await trio.to_thread.run_sync(serving.__enter__)
    running = RunningCa(ca, port)
    try:
        yield running
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(serving.__exit__, None, None, None)

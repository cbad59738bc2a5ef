"""Meshes whose certificates come and go: a steady stream of calls, and what to do meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from tests.support.flow import Mesh, Pair
from tests.support.peers import read_exactly, read_to_end
from ztunnel.identity.dev_ca import DAY_SECONDS, DevelopmentCa, wall_clock
from ztunnel.identity.manager import CertificateManager
from ztunnel.model.identity import Identity
from ztunnel.proxy.context import NodeContext
from ztunnel.proxy.workload_proxy import WorkloadProxy
from ztunnel.tls.certificate import WorkloadCertificate

PAUSE_SECONDS = 0.02  # between two calls of a stream


@dataclass
class ChangeableIssuer:
    """An authority in this process that may be exchanged; `by_identity` sets exceptions."""

    authority: DevelopmentCa
    ttl_seconds: float = DAY_SECONDS
    by_identity: dict[Identity, DevelopmentCa] = field(default_factory=dict)
    issued: int = 0

    async def issue(self, identity: Identity) -> WorkloadCertificate:
        await trio.lowlevel.checkpoint()
        self.issued += 1
        authority = self.by_identity.get(identity, self.authority)
        return authority.issue(identity, ttl_seconds=self.ttl_seconds)


@dataclass
class Calls:
    """A steady stream of short calls."""

    made: int = 0
    failures: list[str] = field(default_factory=list)
    goes_on: bool = True

    async def run(self, pair: Pair) -> None:
        while self.goes_on:
            try:
                with trio.fail_after(10):
                    await a_call(pair)
            except (trio.BrokenResourceError, trio.TooSlowError, AssertionError, OSError) as exc:
                self.failures.append(f"call {self.made}: {exc!r}")
            self.made += 1
            await trio.sleep(PAUSE_SECONDS)


async def a_call(pair: Pair) -> None:
    """Make a short call to the echo application and see it end in good order."""
    async with await pair.call() as stream:
        await stream.send_all(b"ping")
        assert await read_exactly(stream, 4) == b"ping"
        await stream.send_eof()
        assert await read_to_end(stream) == b""


@asynccontextmanager
async def a_stream_of_calls(pair: Pair) -> AsyncIterator[Calls]:
    """Call from now to the end of the block, and then see that none failed."""
    calls = Calls()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(calls.run, pair)
        yield calls
        calls.goes_on = False
    assert calls.failures == []
    assert [one for one in pair.lines.ended() if "error" in one] == []


def identity_of(proxy: WorkloadProxy) -> Identity:
    workload = proxy.context.workload()
    assert workload is not None
    return proxy.context.identity(workload)


def manager_of(node: NodeContext) -> CertificateManager:
    """Give who really holds the certificates."""
    found = node.certificates
    assert isinstance(found, CertificateManager)
    return found


def certificate_of(proxy: WorkloadProxy) -> WorkloadCertificate:
    """Give the certificate that a proxy shows now."""
    found = manager_of(proxy.context.node).cached(identity_of(proxy))
    assert found is not None
    return found


async def renewed(mesh: Mesh, proxy: WorkloadProxy) -> WorkloadCertificate:
    """Have the certificate of a proxy renewed, and wait for the new one."""
    certificates, identity = manager_of(mesh.node), identity_of(proxy)
    old = certificates.cached(identity)
    certificates.renew(identity)
    with trio.fail_after(5):
        # The manager tells nobody but those who have no certificate at all.
        while certificates.cached(identity) in (old, None):  # noqa: ASYNC110
            await trio.sleep(0.001)
    return certificate_of(proxy)


async def sleep_until(unix_seconds: float) -> None:
    await trio.sleep(max(0.0, unix_seconds - wall_clock()))

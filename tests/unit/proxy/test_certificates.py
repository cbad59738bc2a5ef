from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.certs import AUTHORITY, a_certificate, a_name
from ztunnel.errors import RevokedError, TlsError, ZtunnelError
from ztunnel.identity.manager import Standing
from ztunnel.model.network import Endpoint
from ztunnel.proxy.certificates import (
    LOOK_SECONDS,
    TunnelWarden,
    count_untracked,
    cut_if_revoked,
    is_current,
    refuse_expired,
    watch_for_revocation,
)
from ztunnel.telemetry.metrics import Metrics
from ztunnel.telemetry.traffic import Reporter
from ztunnel.tls.certificate import WorkloadCertificate, parse_bundle
from ztunnel.tls.context import TlsContexts
from ztunnel.tls.crl import Revocations, parse_lists
from ztunnel.transport.facts import TunnelFacts

PEER, OTHER = a_certificate(a_name("peer")), a_certificate(a_name("other"))


class FakeCertificates:
    """A manager that has made up its mind."""

    def __init__(self, standing: Standing = Standing.CURRENT) -> None:
        self.answer = standing

    def standing(self, certificate: WorkloadCertificate, peer_not_after: float) -> Standing:
        return self.answer


@dataclass
class FakeNode:
    """As much of a node as certificates are about."""

    certificates: FakeCertificates = field(default_factory=FakeCertificates)
    tls: TlsContexts = field(default_factory=lambda: TlsContexts(revocations=Revocations()))
    metrics: Metrics = field(default_factory=Metrics)

    def counted(self, name: str, reporter: str) -> int:
        line = f'{name}_total{{reporter="{reporter}"}} '
        found = [one for one in "".join(self.metrics.text()).splitlines() if one.startswith(line)]
        return int(found[0].removeprefix(line)) if found else 0


class FakeCore:
    def __init__(self) -> None:
        self.streams: dict[int, object] = {}
        self.goodbyes = 0

    def goaway(self) -> None:
        self.goodbyes += 1


class FakeTunnel:
    """Stands on a handshake with `peer`; its chain is known unless `links` says otherwise."""

    def __init__(self, peer: WorkloadCertificate = PEER, *, links: Any = None) -> None:
        chain = [*parse_bundle(peer.chain_pem)[0], *parse_bundle(peer.roots_pem)[0]]
        self.facts = TunnelFacts(
            local=Endpoint.parse("192.0.2.1:1"),
            remote=Endpoint.parse("192.0.2.2:15008"),
            peer=peer.identity,
            peer_not_after=peer.not_after,
            certificate=a_certificate(),
            cipher="",
            version="",
            peer_links=Revocations().links(chain) if links is None else links,
        )
        self.core = FakeCore()
        self.closed = False
        self.reason: ZtunnelError | None = None

    def close(self, error: ZtunnelError | None = None) -> None:
        assert not self.closed
        self.closed, self.reason = True, error


class FakeOwner:
    """A pool, or what holds the inbound tunnels."""

    def __init__(self, *tunnels: FakeTunnel) -> None:
        self.held = list(tunnels)
        self.looks = 0

    def tunnels(self) -> list[FakeTunnel]:
        return self.held

    all = tunnels

    def leave_old(self) -> None:
        self.looks += 1

    drain_old = leave_old


def take_back(node: FakeNode, *certificates: WorkloadCertificate) -> None:
    assert node.tls.revocations is not None
    pem = AUTHORITY.revoke(*(one.serial for one in certificates))
    node.tls.revocations.replace(parse_lists(pem))


@pytest.mark.parametrize("standing", Standing)
@pytest.mark.parametrize("is_revoked", [False, True])
def test_a_tunnel_is_current_if_its_certificates_are_and_none_is_revoked(
    standing: Standing,
    is_revoked: bool,
) -> None:
    node = FakeNode(FakeCertificates(standing))
    if is_revoked:
        take_back(node, PEER)
    wanted = standing is Standing.CURRENT and not is_revoked
    assert is_current(node, FakeTunnel()) is wanted


def test_without_lists_nothing_is_revoked_or_untracked() -> None:
    node = FakeNode(tls=TlsContexts())
    assert is_current(node, FakeTunnel(links=()))
    count_untracked(node, FakeTunnel(links=()), Reporter.SOURCE)
    cut_if_revoked(node, FakeTunnel(), Reporter.SOURCE)
    watch_for_revocation(node, FakeTunnel())()
    assert node.counted("istio_crl_untracked_connections", "source") == 0


def test_a_tunnel_that_no_list_can_find_is_counted() -> None:
    node = FakeNode()
    count_untracked(node, FakeTunnel(links=()), Reporter.DESTINATION)
    count_untracked(node, FakeTunnel(), Reporter.DESTINATION)
    assert node.counted("istio_crl_untracked_connections", "destination") == 1


@pytest.mark.parametrize(
    ("reporter", "goodbyes"), [(Reporter.SOURCE, 0), (Reporter.DESTINATION, 1)]
)
def test_a_tunnel_to_a_revoked_peer_is_cut_once_and_counted_once(
    reporter: Reporter, goodbyes: int
) -> None:
    node, tunnel, fine = FakeNode(), FakeTunnel(), FakeTunnel(OTHER)
    take_back(node, PEER)
    for one in (tunnel, fine, tunnel):
        cut_if_revoked(node, one, reporter)
    assert isinstance(tunnel.reason, RevokedError)
    assert str(tunnel.reason) == "connection closed: peer certificate revoked by CRL"
    assert tunnel.core.goodbyes == goodbyes
    assert not fine.closed
    assert node.counted("istio_crl_policy_rejections", str(reporter)) == 1


@pytest.mark.parametrize("standing", Standing)
def test_a_new_tunnel_to_a_peer_that_has_expired_is_refused(standing: Standing) -> None:
    node, tunnel = FakeNode(FakeCertificates(standing)), FakeTunnel()
    if standing is Standing.EXPIRED:
        with pytest.raises(TlsError, match="certificate has expired"):
            refuse_expired(node, tunnel)
    else:
        refuse_expired(node, tunnel)
    assert tunnel.closed is (standing is Standing.EXPIRED)


def test_a_tunnel_outside_the_pools_is_watched_until_told_otherwise() -> None:
    node, watched, released = FakeNode(), FakeTunnel(), FakeTunnel()
    watch_for_revocation(node, watched)
    watch_for_revocation(node, released)()
    take_back(node, PEER)
    assert (watched.closed, released.closed) == (True, False)


@asynccontextmanager
async def a_warden(
    node: FakeNode, pools: list[FakeOwner], inbound: FakeOwner
) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(TunnelWarden(node, pools, inbound).run)
        await wait_all_tasks_blocked()
        yield
        nursery.cancel_scope.cancel()


async def test_new_lists_cut_the_revoked_tunnels_of_all_owners(autojump_clock: MockClock) -> None:
    node = FakeNode()
    owners = [FakeOwner(FakeTunnel(), FakeTunnel(OTHER)) for _ in range(3)]
    async with a_warden(node, owners[:2], owners[2]):
        take_back(node, PEER)
        await wait_all_tasks_blocked()
        for owner in owners:
            assert [tunnel.closed for tunnel in owner.held] == [True, False]
        take_back(node, PEER, OTHER)
        await wait_all_tasks_blocked()
        assert all(tunnel.closed for owner in owners for tunnel in owner.held)
    assert node.counted("istio_crl_policy_rejections", "source") == 4
    assert node.counted("istio_crl_policy_rejections", "destination") == 2


async def test_old_tunnels_are_looked_for_from_time_to_time(autojump_clock: MockClock) -> None:
    owners = [FakeOwner() for _ in range(3)]
    async with a_warden(FakeNode(tls=TlsContexts()), owners[:2], owners[2]):
        await trio.sleep(3 * LOOK_SECONDS + 1)
    assert [owner.looks for owner in owners] == [3, 3, 3]


async def test_many_tunnels_do_not_stop_the_others(autojump_clock: MockClock) -> None:
    node, pool = FakeNode(), FakeOwner(*(FakeTunnel() for _ in range(450)))
    turns = 0
    async with a_warden(node, [pool], FakeOwner()):
        take_back(node, PEER)
        while not pool.held[-1].closed:
            await trio.lowlevel.checkpoint()
            turns += 1
    assert turns >= 3


async def test_a_warden_that_has_stopped_hears_nothing(autojump_clock: MockClock) -> None:
    node, pool = FakeNode(), FakeOwner(FakeTunnel())
    async with a_warden(node, [pool], FakeOwner()):
        pass
    take_back(node, PEER)
    assert not pool.held[0].closed

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import structlog.testing
import trio
import trio.testing

from tests.support.builders import a_workload
from tests.support.ca import a_running_ca
from tests.support.certs import AUTHORITY, a_certificate, a_name
from ztunnel.config import Config
from ztunnel.identity.dev_ca import DevelopmentIssuer
from ztunnel.identity.manager import CertificateIssuer
from ztunnel.identity.node import NodeCredentials, is_revoked
from ztunnel.model.settings import ProxyMode
from ztunnel.model.workload import TunnelProtocol
from ztunnel.state.store import Store, Update
from ztunnel.telemetry.metrics import Metrics
from ztunnel.tls.crl import Revocations, parse_lists

CONFIG = Config(fake_ca=True, node_name="node-1")


def in_force(pem: bytes) -> Revocations:
    revocations = Revocations()
    revocations.replace(parse_lists(pem))
    return revocations


@asynccontextmanager
async def running(
    config: Config = CONFIG,
    *,
    store: Store | None = None,
    metrics: Metrics | None = None,
    issuer: CertificateIssuer | None = None,
) -> AsyncIterator[NodeCredentials]:
    issuer = issuer or DevelopmentIssuer(AUTHORITY)
    node = NodeCredentials(config, store or Store(), metrics or Metrics(), issuer)
    async with trio.open_nursery() as nursery:
        await nursery.start(node.run)
        yield node
        nursery.cancel_scope.cancel()


async def renewed(node: NodeCredentials, old: object) -> None:
    with trio.fail_after(5):
        while node.certificates.cached(a_name()) is old:
            await trio.lowlevel.checkpoint()


async def test_what_a_node_needs_at_its_start_comes_over_one_connection() -> None:
    names = [a_name(f"cart-{number}") for number in range(12)]
    async with a_running_ca() as ca, running(issuer=ca.client()) as node:
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(node.certificates.certificate_for, name)
        assert {call.request.impersonated for call in ca.ca.calls} == set(map(str, names))
        assert len({call.peer for call in ca.ca.calls}) == 1


async def test_pods_of_the_node_have_certificates_before_anyone_asks() -> None:
    store = Store(node="node-1")
    pod = a_workload(sa="cart", node="node-1", protocol=TunnelProtocol.HBONE)
    async with running(store=store) as node:
        store.apply(Update(workloads=[pod]))
        with trio.fail_after(5):
            while node.certificates.cached(pod.identity) is None:
                await trio.lowlevel.checkpoint()


async def test_a_dedicated_proxy_fetches_for_nobody_else() -> None:
    store = Store(node="node-1")
    config = replace(CONFIG, mode=ProxyMode.DEDICATED)
    async with running(config, store=store) as node:
        store.apply(Update(workloads=[a_workload(node="node-1", protocol=TunnelProtocol.HBONE)]))
        await trio.testing.wait_all_tasks_blocked()
        assert node.certificates.snapshot() == []


async def test_our_own_revoked_certificate_is_noticed_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "ca.crl"
    async with running(replace(CONFIG, crl_path=path)) as node:
        assert node.revocations is not None
        assert node.contexts.revocations is node.revocations
        revoked = await node.certificates.certificate_for(a_name())
        other = await node.certificates.certificate_for(a_name("other"))
        with structlog.testing.capture_logs() as logs:
            node.revocations.replace(parse_lists(AUTHORITY.revoke(revoked.serial)))
        assert [(line["event"], line["log_level"]) for line in logs] == [
            ("own certificate revoked by CRL, fetching another", "warning")
        ]
        assert node.certificates.cached(a_name()) is revoked, "better than none until then"
        await renewed(node, revoked)
        assert node.certificates.cached(a_name("other")) is other


async def test_a_ca_that_issues_what_is_revoked_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "ca.crl"
    below = AUTHORITY.subordinate()
    path.write_bytes(AUTHORITY.revoke(below.signer.serial_number))
    config = replace(CONFIG, crl_path=path)
    node = NodeCredentials(config, Store(), Metrics(), DevelopmentIssuer(below))
    with structlog.testing.capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            await nursery.start(node.run)
            await node.certificates.certificate_for(a_name())
            nursery.cancel_scope.cancel()
    assert "the CA issues certificates that are revoked" in [line["event"] for line in logs]


def test_a_certificate_is_revoked_by_its_own_authority_only() -> None:
    made = a_certificate()
    assert is_revoked(made, in_force(AUTHORITY.revoke(made.serial)))
    assert not is_revoked(made, in_force(AUTHORITY.revoke(1)))
    assert not is_revoked(replace(made, roots_pem=b""), in_force(AUTHORITY.revoke(made.serial)))


async def test_metrics_tell_the_seconds_left_and_how_requests_went() -> None:
    metrics = Metrics()
    async with running(metrics=metrics) as node:
        made = await node.certificates.certificate_for(a_name())
        text = "".join(metrics.text())
        (line,) = [one for one in text.splitlines() if one.startswith("ztunnel_certificate_sec")]
        name, value = line.split()
        assert name == f'ztunnel_certificate_seconds_left{{identity="{a_name()}"}}'
        assert float(value) == pytest.approx(made.not_after - AUTHORITY.clock(), abs=5)
        assert 'ztunnel_certificate_requests_total{result="success"} 1' in text
        node.certificates.forget(a_name())
        assert "ztunnel_certificate_seconds_left{" not in "".join(metrics.text())


def test_loading_the_lists_is_counted(tmp_path: Path) -> None:
    metrics = Metrics()
    config = replace(CONFIG, crl_path=tmp_path / "missing")
    NodeCredentials(config, Store(), metrics, DevelopmentIssuer(AUTHORITY))
    assert 'ztunnel_crl_loads_total{result="failure"} 1' in "".join(metrics.text())


async def test_what_comes_and_who_is_forgotten_is_passed_on(
    autojump_clock: trio.testing.MockClock,
) -> None:
    heard: list[tuple[str, bool]] = []
    store = Store()
    credentials = NodeCredentials(CONFIG, store, Metrics(), DevelopmentIssuer(AUTHORITY))
    credentials.on_certificate = lambda identity, one: heard.append((str(identity), one is None))
    pod = a_workload(node="node-1", protocol=TunnelProtocol.HBONE)
    async with trio.open_nursery() as nursery:
        await nursery.start(credentials.run)
        store.apply(Update(workloads=[pod]))
        await trio.sleep(1)
        assert heard == [(str(pod.identity), False)]
        store.apply(Update(removed_workloads=[pod.uid]))
        await trio.sleep(120)
        assert heard[1:] == [(str(pod.identity), True)]
        nursery.cancel_scope.cancel()

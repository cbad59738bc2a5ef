from __future__ import annotations

import contextlib
from pathlib import Path

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse

from ztunnel.telemetry.exposition import Family, Kind
from ztunnel.telemetry.metrics import Metrics
from ztunnel.telemetry.traffic import Labels, Reporter
from ztunnel.telemetry.writer import LineWriter


def scrape(metrics: Metrics) -> dict[str, float]:
    return {
        sample.name + "".join(f",{k}={v}" for k, v in sample.labels.items()): sample.value
        for family in parse("".join(metrics.text()))
        for sample in family.samples
    }


def test_the_text_ends_as_openmetrics_demands() -> None:
    assert "".join(Metrics().text()).endswith("\n# EOF\n")


def test_the_build_is_named() -> None:
    assert scrape(Metrics(version="1.29.0"))["istio_build,component=ztunnel,tag=1.29.0"] == 1


def test_sockets_are_counted_up_and_down() -> None:
    metrics = Metrics()
    metrics.sockets_open(Reporter.SOURCE).add(1)
    metrics.sockets_open(Reporter.SOURCE).add(1)
    metrics.sockets_open(Reporter.SOURCE).add(-1)
    assert scrape(metrics)["istio_tcp_sockets_open,reporter=source"] == 1


def test_every_family_has_the_name_and_labels_of_the_reference() -> None:
    metrics = Metrics()
    dns = ("a", "udp", "cart", "v1")
    metrics.dns_requests.count(*dns).add()
    metrics.dns_upstream_requests.count(*dns).add()
    metrics.dns_upstream_failures.count(*dns).add()
    metrics.dns_upstream_seconds.histogram(*dns).observe(0.02)
    metrics.on_demand_dns.count(*"abcdefghi").add()
    metrics.crl_rejections.count("source").add()
    metrics.crl_untracked.count("destination").add()
    metrics.xds_terminations.count("Complete").add()
    metrics.xds_messages.count("t").add()
    metrics.xds_bytes.count("t").add(100)
    metrics.proxies_started.add()
    found = scrape(metrics)
    labels = (
        ",request_query_type=a,request_protocol=udp,source_canonical_service=cart"
        ",source_canonical_revision=v1"
    )
    expected = {
        f"istio_dns_requests_total{labels}": 1,
        f"istio_dns_upstream_requests_total{labels}": 1,
        f"istio_dns_upstream_failures_total{labels}": 1,
        f"istio_dns_upstream_request_duration_seconds_bucket{labels},le=0.01": 0,
        f"istio_dns_upstream_request_duration_seconds_bucket{labels},le=0.1": 1,
        "istio_crl_policy_rejections_total,reporter=source": 1,
        "istio_crl_untracked_connections_total,reporter=destination": 1,
        "istio_xds_connection_terminations_total,reason=Complete": 1,
        "istio_xds_message_total,url=t": 1,
        "istio_xds_message_bytes_total,url=t": 100,
        "workload_manager_active_proxy_count": 0,
        "workload_manager_pending_proxy_count": 0,
        "workload_manager_proxies_started_total": 1,
        "workload_manager_proxies_stopped_total": 0,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert any(name.startswith("istio_on_demand_dns_total,source_workload=a") for name in found)


def test_the_process_is_measured() -> None:
    found = scrape(Metrics())
    assert 3 <= found["process_open_fds"] <= found["process_max_fds"]
    with contextlib.ExitStack() as opened:
        for _ in range(10):
            opened.enter_context(Path("/dev/null").open())
        assert scrape(Metrics())["process_open_fds"] == found["process_open_fds"] + 10
    assert found["process_resident_memory_bytes"] > 2**20
    assert found["process_cpu_seconds_total"] > 0


def test_traffic_is_part_of_the_whole() -> None:
    metrics = Metrics()
    metrics.traffic.traffic(Labels(Reporter.SOURCE)).opened()
    assert any(name.startswith("istio_tcp_connections_opened_total") for name in scrape(metrics))


def test_lost_log_lines_are_counted() -> None:
    writer = LineWriter(-1)
    writer.dropped = 5
    assert scrape(Metrics(log_writer=writer))["ztunnel_log_lines_dropped_total"] == 5


def test_overflow_anywhere_is_seen() -> None:
    metrics = Metrics()
    metrics.traffic.overflowed = 2
    metrics.xds_messages.overflowed = 3
    assert scrape(metrics)["ztunnel_metrics_overflowed_total"] == 5


def test_families_of_others_can_be_published() -> None:
    metrics = Metrics()
    family = Family("own", "Own", kind=Kind.GAUGE)
    family.count().set(4)
    metrics.register([family])
    assert scrape(metrics)["own"] == 4

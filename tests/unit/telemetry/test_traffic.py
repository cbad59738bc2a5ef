from __future__ import annotations

import pytest
from hypothesis import given, strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse

from ztunnel.model.identity import Namespace, ServiceAccount, TrustDomain
from ztunnel.model.workload import Locality, Workload
from ztunnel.telemetry.exposition import END, OVERFLOW
from ztunnel.telemetry.traffic import (
    Labels,
    Party,
    Reporter,
    ServiceName,
    TrafficMetrics,
)

WEB = Workload(
    workload_name="web",
    canonical_name="web-app",
    canonical_revision="v1",
    namespace=Namespace("shop"),
    trust_domain=TrustDomain("cluster.local"),
    service_account=ServiceAccount("web"),
    cluster_id="lab",
    locality=Locality("r1", "z1"),
)
NAMES = [
    "reporter", "source_workload", "source_canonical_service", "source_canonical_revision",
    "source_workload_namespace", "source_principal", "source_app", "source_version",
    "source_cluster", "destination_service", "destination_service_namespace",
    "destination_service_name", "destination_workload", "destination_canonical_service",
    "destination_canonical_revision", "destination_workload_namespace", "destination_principal",
    "destination_app", "destination_version", "destination_cluster", "request_protocol",
    "response_flags", "connection_security_policy", "source_region", "source_zone",
    "destination_region", "destination_zone",
]  # fmt: skip


def samples(metrics: TrafficMetrics) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in parse("".join(metrics.text()) + END):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def a_call() -> Labels:
    party = Party.of_workload(WEB, WEB.identity)
    service = ServiceName("cart.shop.svc.cluster.local", "shop", "cart")
    return Labels(Reporter.SOURCE, party, party, service, mutual_tls=True)


def test_labels_have_the_names_order_and_values_of_the_reference() -> None:
    metrics = TrafficMetrics()
    metrics.traffic(a_call()).opened()
    ((labels, value),) = samples(metrics)["istio_tcp_connections_opened_total"]
    assert list(labels) == NAMES
    assert value == 1
    assert (
        labels
        | {
            "reporter": "source",
            "source_workload": "web",
            "source_canonical_service": "web-app",
            "source_canonical_revision": "v1",
            "source_workload_namespace": "shop",
            "source_principal": "spiffe://cluster.local/ns/shop/sa/web",
            "source_app": "web-app",
            "source_version": "v1",
            "source_cluster": "lab",
            "destination_service": "cart.shop.svc.cluster.local",
            "destination_service_namespace": "shop",
            "destination_service_name": "cart",
            "request_protocol": "tcp",
            "response_flags": "-",
            "connection_security_policy": "mutual_tls",
            "source_region": "r1",
            "destination_zone": "z1",
        }
        == labels
    )


def test_what_is_not_known_is_unknown_and_has_no_place() -> None:
    metrics = TrafficMetrics()
    metrics.traffic(Labels(Reporter.DESTINATION)).opened()
    ((labels, _),) = samples(metrics)["istio_tcp_connections_opened_total"]
    assert list(labels) == NAMES[:-4]
    assert labels["source_workload"] == labels["connection_security_policy"] == "unknown"


def test_one_known_end_gives_both_their_places() -> None:
    metrics = TrafficMetrics()
    metrics.traffic(Labels(Reporter.SOURCE, Party.of_workload(WEB, None))).opened()
    ((labels, _),) = samples(metrics)["istio_tcp_connections_opened_total"]
    assert (labels["source_zone"], labels["destination_zone"]) == ("z1", "unknown")
    assert labels["source_principal"] == "unknown"


def test_a_peers_app_is_its_workload_and_its_version_its_revision() -> None:
    party = Party(workload="w", canonical_service="s", canonical_revision="v", app="w")
    assert party.labels() == ("w", "s", "v", "unknown", "unknown", "w", "v", "unknown")


def test_a_connection_that_moves_nothing_has_byte_counters_of_zero_as_the_reference_has() -> None:
    metrics = TrafficMetrics()
    traffic = metrics.traffic(a_call())
    traffic.opened()
    traffic.closed("DENY")
    found = samples(metrics)
    for name in ("istio_tcp_received_bytes_total", "istio_tcp_sent_bytes_total"):
        [(labels, value)] = found[name]
        assert (labels["response_flags"], value) == ("-", 0)


def test_bytes_are_counted_for_both_directions() -> None:
    metrics = TrafficMetrics()
    traffic = metrics.traffic(a_call())
    traffic.opened()
    traffic.add(11, 22)
    traffic.add(1, 0)
    found = samples(metrics)
    assert [value for _, value in found["istio_tcp_received_bytes_total"]] == [12]
    assert [value for _, value in found["istio_tcp_sent_bytes_total"]] == [22]


@pytest.mark.parametrize(("flag", "failed"), [("-", None), ("DENY", 1), ("CONNECT", 1)])
def test_an_end_with_a_flag_is_a_failure(flag: str, failed: int | None) -> None:
    metrics = TrafficMetrics()
    metrics.traffic(a_call()).closed(flag)
    found = samples(metrics)
    ((labels, value),) = found["istio_tcp_connections_closed_total"]
    assert (labels["response_flags"], value) == (flag, 1)
    failures = found.get("istio_tcp_connections_failed_total")
    assert (failures[0][1] if failures else None) == failed


def test_connections_with_equal_labels_share_their_numbers() -> None:
    metrics = TrafficMetrics()
    for _ in range(3):
        metrics.traffic(a_call()).opened()
    assert [v for _, v in samples(metrics)["istio_tcp_connections_opened_total"]] == [3]


def test_a_handle_closes_once() -> None:
    traffic = TrafficMetrics().traffic(a_call())
    traffic.closed()
    with pytest.raises(AssertionError):
        traffic.closed()


def test_a_peer_that_calls_itself_unknown_does_not_spoil_the_scrape() -> None:
    metrics = TrafficMetrics()
    for workload in ("", "unknown", "x" * 256, "x" * 300, "\ud800", "?"):
        metrics.traffic(
            Labels(Reporter.DESTINATION, Party(workload=workload, cluster="c"))
        ).opened()
    found = samples(metrics)["istio_tcp_connections_opened_total"]
    assert sorted(value for _, value in found) == [2, 2, 2]


@given(st.lists(st.text(max_size=20), max_size=8))
def test_any_baggage_gives_a_text_that_parses(names: list[str]) -> None:
    metrics = TrafficMetrics()
    for name in names:
        metrics.traffic(Labels(Reporter.DESTINATION, Party(name, name, name, name))).opened()
    found = samples(metrics).get("istio_tcp_connections_opened_total", [])
    assert sum(value for _, value in found) == len(names)
    "".join(metrics.text()).encode()


def test_at_the_cap_idle_series_make_room() -> None:
    metrics = TrafficMetrics(series_max=3)
    busy = metrics.traffic(Labels(Reporter.SOURCE, Party("busy")))
    busy.opened()
    for number in range(10):
        idle = metrics.traffic(Labels(Reporter.SOURCE, Party(f"idle{number}")))
        idle.opened()
        idle.closed()
    shown = {
        labels["source_workload"]
        for labels, _ in samples(metrics)["istio_tcp_connections_opened_total"]
    }
    assert "busy" in shown
    assert len(shown) <= 3
    assert (metrics.forgotten, metrics.overflowed) == (8, 0)


def test_when_all_are_busy_the_rest_shares_an_overflow() -> None:
    metrics = TrafficMetrics(series_max=2)
    held = [metrics.traffic(Labels(Reporter.SOURCE, Party(f"w{n}"))) for n in range(5)]
    for traffic in held:
        traffic.opened()
    found = samples(metrics)["istio_tcp_connections_opened_total"]
    assert {labels["source_workload"]: v for labels, v in found} == {"w0": 1, "w1": 1, OVERFLOW: 3}
    assert metrics.overflowed == 3


def test_a_series_without_an_ending_is_passed_in_a_step_of_its_own() -> None:
    metrics, count = TrafficMetrics(), 50
    for number in range(count):
        metrics.traffic(Labels(Reporter.SOURCE, Party(workload=f"w-{number}"), Party())).opened()
    texts = list(metrics.text())
    assert len(texts) == count * 5  # families
    assert len([text for text in texts if text]) == count * 3  # opened, and the bytes

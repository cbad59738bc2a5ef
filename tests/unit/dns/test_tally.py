from __future__ import annotations

import pytest

from tests.support.builders import a_workload
from tests.support.dns import FakeClient
from ztunnel.dns.resolver import Transport
from ztunnel.dns.tally import Source, Tally
from ztunnel.telemetry.metrics import Metrics
from ztunnel.wire.dns import Query, RecordType

UDP = Transport.UDP


def a_query(rtype: int = RecordType.A) -> Query:
    return Query(flags=0, name="example.org", rtype=rtype, rclass=1, question=b"")


class Bench:
    def __init__(self, client: FakeClient | None = None) -> None:
        self.metrics = Metrics()
        self.client = client or FakeClient.web()
        self.tally = Tally(self.metrics, self.client)


def test_the_series_of_one_type_and_transport_is_the_same_each_time() -> None:
    bench = Bench()
    series = bench.tally.of(a_query(), UDP)
    assert bench.tally.of(a_query(), UDP) is series
    assert bench.tally.of(a_query(RecordType.AAAA), UDP) is not series
    assert bench.tally.of(a_query(), Transport.TCP) is not series


def test_each_kind_of_count_has_its_family() -> None:
    bench = Bench()
    series = bench.tally.of(a_query(), UDP)
    series.requests.add(1)
    series.upstream_requests.add(2)
    series.upstream_failures.add(3)
    series.upstream_seconds.observe(0.1)
    metrics, labels = bench.metrics, ("a", "udp", "web", "v1")
    counts = (metrics.dns_requests, metrics.dns_upstream_requests, metrics.dns_upstream_failures)
    assert [family.count(*labels).value for family in counts] == [1, 2, 3]
    assert sum(metrics.dns_upstream_seconds.histogram(*labels).counts) == 1


def test_a_workload_that_is_described_anew_is_counted_as_that() -> None:
    bench = Bench(FakeClient(None))
    bench.tally.of(a_query(), UDP).requests.add(1)
    bench.client.known = a_workload("web", canonical_name="web", canonical_revision="v1")
    bench.tally.of(a_query(), UDP).requests.add(1)
    bench.client.known = a_workload("web", canonical_name="web", canonical_revision="v2")
    bench.tally.of(a_query(), UDP).requests.add(1)
    text = "".join(bench.metrics.dns_requests.text())
    for service, revision in (("unknown", "unknown"), ("web", "v1"), ("web", "v2")):
        line = f'source_canonical_service="{service}",source_canonical_revision="{revision}"}} 1\n'
        assert line in text


@pytest.mark.parametrize(
    ("code", "label"),
    [(0, "noerror"), (3, "nxdomain"), (5, "refused"), (9, "other"), (16, "badvers")],
)
def test_answers_are_counted_by_source_and_code(code: int, label: str) -> None:
    bench = Bench()
    for _ in range(2):
        bench.tally.answered(Source.UPSTREAM, code)
    assert bench.metrics.dns_answers.count("upstream", label).value == 2


def test_a_limit_is_counted() -> None:
    bench = Bench()
    bench.tally.limit_reached()
    assert bench.metrics.limits_reached.count("dns_queries_per_pod").value == 1

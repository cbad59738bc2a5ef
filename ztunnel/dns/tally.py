"""Counts queries and answers (dns-and-observability.md 7.4, 11.10).

How it works: a query is counted up to five times, so the series of one type of query are looked up
once and kept for as long as the pod's workload is described in the same way.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from ztunnel.wire.dns import Query, Rcode

if TYPE_CHECKING:
    from ztunnel.dns.resolver import Client, Transport
    from ztunnel.model.workload import Workload
    from ztunnel.telemetry.exposition import Count
    from ztunnel.telemetry.metrics import Metrics

UNKNOWN = "unknown"
OTHER = "other"
LIMIT = "dns_queries_per_pod"
_CODES = {int(code): code.name.lower() for code in Rcode}


class Source(StrEnum):
    """Who an answer is from; values are those of the metric label."""

    MESH = "mesh"  # we know it from the control plane
    UPSTREAM = "upstream"  # passed on
    PROXY = "proxy"  # we could not, or would not, know it


class Series:
    """What is counted of one type of query."""

    __slots__ = ("requests", "upstream_failures", "upstream_requests", "upstream_seconds")

    def __init__(self, metrics: Metrics, labels: tuple[str, ...]) -> None:
        self.requests = metrics.dns_requests.count(*labels)
        self.upstream_requests = metrics.dns_upstream_requests.count(*labels)
        self.upstream_failures = metrics.dns_upstream_failures.count(*labels)
        self.upstream_seconds = metrics.dns_upstream_seconds.histogram(*labels)


class Tally:
    """One pod's."""

    def __init__(self, metrics: Metrics, client: Client) -> None:
        self._metrics = metrics
        self._client = client
        self._workload: Workload | None = None
        self._series: dict[tuple[str, Transport], Series] = {}
        self._answers: dict[tuple[Source, int], Count] = {}

    def of(self, query: Query, transport: Transport) -> Series:
        """Give what counts a query; some of it may be zero for ever."""
        workload = self._client.workload()
        if workload is not self._workload:
            self._series.clear()
            self._workload = workload
        key = query.type_name, transport
        found = self._series.get(key)
        if found is None:
            service = revision = UNKNOWN
            if workload is not None:
                service = workload.canonical_name or UNKNOWN
                revision = workload.canonical_revision or UNKNOWN
            found = self._series[key] = Series(self._metrics, (*key, service, revision))
        return found

    def answered(self, source: Source, code: int) -> None:
        """Count one answer with a response code."""
        key = source, code
        found = self._answers.get(key)
        if found is None:
            name = _CODES.get(code, OTHER)
            found = self._answers[key] = self._metrics.dns_answers.count(source, name)
        found.add(1)

    def limit_reached(self) -> None:
        """Count a query or connection for which there was no place."""
        self._metrics.limits_reached.count(LIMIT).add(1)

"""Metrics: every name and label we publish, declared once (dns-and-observability.md 7).

Names that start with `istio_` or `workload_manager_` are the reference's. Those that start with
`ztunnel_` are ours: what the reference does not count, and the runtime group.
"""

from __future__ import annotations

import gc
import os
import resource
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ztunnel.telemetry.exposition import END, Count, Family, Kind, Peak
from ztunnel.telemetry.log import PIPELINE
from ztunnel.telemetry.traffic import Reporter, TrafficMetrics
from ztunnel.telemetry.writer import LineWriter

DNS_LABELS = (
    "request_query_type", "request_protocol", "source_canonical_service",
    "source_canonical_revision",
)  # fmt: skip
ON_DEMAND_DNS_LABELS = (
    "source_workload", "source_canonical_service", "source_canonical_revision",
    "source_workload_namespace", "source_principal", "source_app", "source_version",
    "source_cluster", "hostname",
)  # fmt: skip
DNS_BUCKETS = (0.0005, 0.001, 0.01, 0.1, 1.0, 5.0)
LAG_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0)
HANDSHAKE_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0)
UNSTABLE = " (unstable)"


class Metrics:
    """One registry; made once, handed down."""

    def __init__(
        self, *, version: str = "unknown", log_writer: LineWriter = PIPELINE.writer
    ) -> None:
        self.traffic = TrafficMetrics()
        self._log_writer = log_writer
        self._families: list[Family] = []
        self._declare_data_plane()
        self._declare_dns()
        self._declare_control_plane()
        self._declare_own()
        self._declare_process()
        build = Family(
            "istio_build", "Istio component build info", kind=Kind.GAUGE,
            labels=("component", "tag"),
        )  # fmt: skip
        self._keep(build).count("ztunnel", version).set(1)

    def sockets_open(self, reporter: Reporter) -> Count:
        """Give the gauge of accepted downstream sockets: add(1) on accept, add(-1) on close."""
        return self._sockets_open.count(reporter)

    def text(self) -> Iterator[str]:
        """Print everything as OpenMetrics, in pieces; the caller rests between them."""
        yield from self.traffic.text()
        for family in self._families:
            yield from family.text()
        yield END

    def register(self, families: Iterable[Family]) -> None:
        """Publish families declared elsewhere, such as those of a test."""
        self._families.extend(families)

    def _overflowed(self) -> float:
        return self.traffic.overflowed + sum(family.overflowed for family in self._families)

    def _keep(self, family: Family) -> Family:
        self._families.append(family)
        return family

    def _counter(self, name: str, description: str, *labels: str, unit: str = "") -> Family:
        return self._keep(Family(name, description + UNSTABLE, labels=labels, unit=unit))

    def _gauge(self, name: str, description: str, *labels: str) -> Family:
        return self._keep(Family(name, description + UNSTABLE, kind=Kind.GAUGE, labels=labels))

    def _declare_data_plane(self) -> None:
        self._sockets_open = self._gauge("istio_tcp_sockets_open", "Accepted sockets", "reporter")
        self.on_demand_dns = self._counter(
            "istio_on_demand_dns", "Host names resolved for a connection", *ON_DEMAND_DNS_LABELS
        )
        self.crl_rejections = self._counter(
            "istio_crl_policy_rejections", "Peers refused as revoked", "reporter"
        )
        self.crl_untracked = self._counter(
            "istio_crl_untracked_connections", "Tunnels no revocation can find", "reporter"
        )

        self.crl_loads = self._counter(
            "ztunnel_crl_loads", "Attempts to load the revocation lists", "result"
        )

    def _declare_dns(self) -> None:
        self.dns_requests = self._counter("istio_dns_requests", "DNS queries", *DNS_LABELS)
        self.dns_upstream_requests = self._counter(
            "istio_dns_upstream_requests", "DNS queries forwarded", *DNS_LABELS
        )
        self.dns_upstream_failures = self._counter(
            "istio_dns_upstream_failures", "DNS queries forwarded in vain", *DNS_LABELS
        )
        self.dns_upstream_seconds = self._keep(
            Family(
                "istio_dns_upstream_request_duration_seconds", "Time upstream took" + UNSTABLE,
                kind=Kind.HISTOGRAM, labels=DNS_LABELS, unit="seconds", buckets=DNS_BUCKETS,
            )
        )  # fmt: skip
        self.dns_answers = self._counter("ztunnel_dns_answers", "DNS answers", "source", "code")

    def _declare_control_plane(self) -> None:
        self.xds_terminations = self._counter(
            "istio_xds_connection_terminations", "xDS streams that ended", "reason"
        )
        self.xds_messages = self._counter("istio_xds_message", "xDS messages received", "url")
        self.xds_bytes = self._counter(
            "istio_xds_message_bytes", "Bytes of xDS messages received", "url", unit="bytes"
        )
        manager = "workload_manager_"
        self.active_proxies = self._gauge(f"{manager}active_proxy_count", "Pods served").count()
        self.pending_proxies = self._gauge(
            f"{manager}pending_proxy_count", "Pods whose proxy could not start yet"
        ).count()
        self.proxies_started = self._counter(f"{manager}proxies_started", "Proxies started").count()
        self.proxies_stopped = self._counter(f"{manager}proxies_stopped", "Proxies stopped").count()

    def _declare_own(self) -> None:
        self.refused = self._counter(
            "ztunnel_connections_refused", "Connections ended before context", "reporter", "reason"
        )
        self.limits_reached = self._counter("ztunnel_limits_reached", "Limits reached", "limit")
        self.bugs = self._counter("ztunnel_unforeseen_errors", "Errors nobody foresaw", "where")
        self.policy_decisions = self._counter(
            "ztunnel_policy_decisions", "Answers of authorization", "action"
        )
        self.certificates = self._counter(
            "ztunnel_certificate_requests", "Certificate requests", "result"
        )
        self.static_loads = self._counter(
            "ztunnel_static_config_loads", "Attempts to read a changed static configuration",
            "result",
        )  # fmt: skip
        self.xds_rejected = self._counter(
            "ztunnel_xds_rejected_resources", "Resources refused", "url"
        )
        self.handshake_seconds = self._keep(
            Family(
                "ztunnel_tls_handshake_duration_seconds", "Time of TLS handshakes" + UNSTABLE,
                kind=Kind.HISTOGRAM, labels=("reporter",), unit="seconds",
                buckets=HANDSHAKE_BUCKETS,
            )
        )  # fmt: skip
        self.tunnels = self._gauge("ztunnel_tunnels", "HBONE connections open", "reporter")
        self.loop_lag_seconds = self._keep(
            Family(
                "ztunnel_event_loop_lag_seconds", "How late timers fire" + UNSTABLE,
                kind=Kind.HISTOGRAM, unit="seconds", buckets=LAG_BUCKETS,
            )
        ).histogram()  # fmt: skip
        self.longest_stall = Peak()
        self._keep(
            Family(
                "ztunnel_event_loop_longest_stall_seconds",
                "Longest time that no connection was looked at, since the last scrape" + UNSTABLE,
                kind=Kind.GAUGE, unit="seconds", read=self.longest_stall.take,
            )
        )  # fmt: skip
        self.tasks = self._gauge("ztunnel_tasks", "Tasks of the event loop").count()

    def _declare_process(self) -> None:
        gauge = Kind.GAUGE
        for family in (
            Family("process_open_fds", "Open file descriptors", kind=gauge, read=_open_fds),
            Family("process_max_fds", "Limit of file descriptors", kind=gauge, read=_max_fds),
            Family("process_cpu_seconds", "CPU time used", unit="seconds", read=_cpu_seconds),
            Family(
                "process_resident_memory_bytes", "Resident memory", kind=gauge, unit="bytes",
                read=_resident_bytes,
            ),
            Family(
                "ztunnel_log_lines_dropped", "Log lines lost",
                read=lambda: self._log_writer.dropped,
            ),
            Family("ztunnel_gc_collections", "Garbage collections", read=_collections),
            Family(
                "ztunnel_metrics_overflowed", "Times a label set was refused for the cap",
                read=self._overflowed,
            ),
            Family(
                "ztunnel_metrics_forgotten", "Label sets forgotten",
                read=lambda: self.traffic.forgotten,
            ),
        ):  # fmt: skip
            self._keep(family)


def _open_fds() -> float:
    # Since Linux 6.2 the kernel says how many there are; listing them takes 1 us for each.
    counted = os.stat("/proc/self/fd").st_size  # noqa: PTH116 nothing else of it is wanted
    return counted or len(os.listdir("/proc/self/fd")) - 1  # noqa: PTH208 it opens one itself


def _max_fds() -> float:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _resident_bytes() -> float:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * resource.getpagesize()


def _collections() -> float:
    return float(sum(generation["collections"] for generation in gc.get_stats()))


def outcome_of(attempts: Family) -> Callable[[bool], None]:
    """Make what counts an attempt by its one label: `success` or `failure`."""
    succeeded, failed = attempts.count("success"), attempts.count("failure")
    return lambda is_success: (succeeded if is_success else failed).add()

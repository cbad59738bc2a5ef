"""The node agent's metrics (cni.md 8 and 11.D6).

Names that start with `istio_`, `nodeagent_` or are `ztunnel_connected` are the reference's; those
that start with `ztunnel_cni_` are ours.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ztunnel.telemetry.exposition import END, Count, Family, Kind

RULE_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


_COUNTER_HEAD = re.compile(r"^# HELP (\S+) (.*)\n# TYPE \1 counter$", re.MULTILINE)
_OPENMETRICS_ONLY = re.compile(r"^# (UNIT .*|EOF)\n", re.MULTILINE)


def prometheus_text(openmetrics: str) -> str:
    """Turn OpenMetrics into Prometheus's own older form: there a counter's name has its ending."""
    named = _COUNTER_HEAD.sub(r"# HELP \1_total \2\n# TYPE \1_total counter", openmetrics)
    return _OPENMETRICS_ONLY.sub("", named)


class AgentMetrics:
    """One registry; made once, handed down."""

    def __init__(self) -> None:
        self._families: list[Family] = []
        self.plugin_requests = self._counter(
            "istio_cni_plugin_requests", "Events of the plugin", "response_code"
        )
        self.events = self._counter(
            "nodeagent_reconcile_events", "Changes of pods taken from Kubernetes", "type"
        )
        self.installs = self._counter("istio_cni_installs", "Passes of the installer", "result")
        self.install_ready = self._gauge(
            "istio_cni_install_ready", "Whether the plugin is installed"
        )
        self.proxies = self._gauge("ztunnel_connected", "Node proxies connected")
        self.repairs = self._counter(
            "ztunnel_cni_repairs", "Times a pod was not as it should have been, and was repaired"
        ).count()
        self.failures = self._counter(
            "ztunnel_cni_failures", "Attempts on a pod that failed", "reason"
        )
        self.exempted = self._gauge("ztunnel_cni_probe_addresses", "Addresses exempt for probes")
        self._pods = self._keep(
            Family(
                "ztunnel_cni_pods",
                "Pods by what became of them",
                kind=Kind.GAUGE,
                labels=("state",),
            )
        )
        self._rules = self._keep(
            Family(
                "ztunnel_cni_rule_programming_seconds",
                "Time to write a pod's rules",
                kind=Kind.HISTOGRAM,
                unit="seconds",
                buckets=RULE_BUCKETS,
            )
        ).histogram()

    def watch_age(self, read: Callable[[], float]) -> None:
        """Publish how long ago Kubernetes last said something."""
        self._keep(
            Family(
                "ztunnel_cni_api_last_contact_age_seconds",
                "Time since the Kubernetes API last answered",
                kind=Kind.GAUGE,
                unit="seconds",
                read=read,
            )
        )

    def pods(self, state: str) -> Count:
        """Give the gauge of pods in a state."""
        return self._pods.count(state)

    @contextmanager
    def timing_rules(self) -> Iterator[None]:
        """Observe how long the block takes."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._rules.observe(time.perf_counter() - began)

    def text(self) -> Iterator[str]:
        """Print everything as OpenMetrics."""
        for family in self._families:
            yield from family.text()
        yield END

    def _keep(self, family: Family) -> Family:
        self._families.append(family)
        return family

    def _counter(self, name: str, description: str, *labels: str) -> Family:
        return self._keep(Family(name, description, labels=labels))

    def _gauge(self, name: str, description: str) -> Count:
        return self._keep(Family(name, description, kind=Kind.GAUGE)).count()

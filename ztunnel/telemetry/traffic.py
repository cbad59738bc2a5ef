"""Traffic metrics (dns-and-observability.md 7.2): a handle per connection, labels resolved once.

How it works: the labels of a connection, all but `response_flags`, are printed once and find or
make the one `Series` with that text, which holds its counters as plain numbers; `Traffic` is what
a connection gets. The text is the key, because different labels can have the same text (a peer
may claim to be called `unknown`, or two names may differ beyond the cut) and a duplicate would
spoil the whole scrape. Labels come from peers' baggage, so the number of series has a cap: at it,
series without a connection are forgotten, the oldest first, and if there are none, overflow
series take the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import NamedTuple, Self

from ztunnel.model.identity import Identity
from ztunnel.model.workload import Workload
from ztunnel.telemetry.exposition import OVERFLOW, SERIES_MAX, label_text

UNKNOWN = "unknown"
NO_FLAG = "-"

_PARTY = (
    "workload", "canonical_service", "canonical_revision", "workload_namespace", "principal",
    "app", "version", "cluster",
)  # fmt: skip
SERVICE = ("destination_service", "destination_service_namespace", "destination_service_name")
SOURCE = tuple(f"source_{name}" for name in _PARTY)
DESTINATION = tuple(f"destination_{name}" for name in _PARTY)
PLACES = ("source_region", "source_zone", "destination_region", "destination_zone")


class Reporter(StrEnum):
    """Which end of the connection we are."""

    SOURCE = "source"
    DESTINATION = "destination"


class Party(NamedTuple):
    """What the labels say of one end; the empty text is printed as `unknown`."""

    workload: str = ""
    canonical_service: str = ""
    canonical_revision: str = ""
    namespace: str = ""
    principal: str = ""
    app: str = ""
    cluster: str = ""
    region: str = ""
    zone: str = ""

    @classmethod
    def of_workload(cls, workload: Workload, principal: Identity | None) -> Self:
        """Describe a workload we know; `principal` as section 7.2 says for each end."""
        return cls(
            workload.workload_name,
            workload.canonical_name,
            workload.canonical_revision,
            workload.namespace,
            "" if principal is None else str(principal),
            workload.canonical_name,
            workload.cluster_id,
            workload.locality.region,
            workload.locality.zone,
        )

    def labels(self) -> tuple[str, ...]:
        """Give the values in the order of the label names; the revision is the version too."""
        *same, app, cluster, _, _ = self
        shown = (*same, app, self.canonical_revision, cluster)
        return tuple(value or UNKNOWN for value in shown)


NOBODY = Party()


class ServiceName(NamedTuple):
    """The service the client meant."""

    hostname: str = ""
    namespace: str = ""
    name: str = ""


NO_SERVICE = ServiceName()


class Labels(NamedTuple):
    """The labels of one connection, without its outcome."""

    reporter: Reporter
    source: Party = NOBODY
    destination: Party = NOBODY
    service: ServiceName = NO_SERVICE
    mutual_tls: bool = False

    def text(self) -> tuple[str, str]:
        """Print the labels before and after `response_flags`."""
        service = tuple(value or UNKNOWN for value in self.service)
        before = label_text(
            ("reporter", *SOURCE, *SERVICE, *DESTINATION, "request_protocol"),
            (self.reporter, *self.source.labels(), *service, *self.destination.labels(), "tcp"),
        )
        after = f'connection_security_policy="{"mutual_tls" if self.mutual_tls else UNKNOWN}"'
        if self.source != NOBODY or self.destination != NOBODY:
            places = (*self.source[-2:], *self.destination[-2:])
            after += "," + label_text(PLACES, [place or UNKNOWN for place in places])[1:-1]
        return before[1:-1], after


class Series:
    """All counters of one label set."""

    __slots__ = ("after", "before", "closed", "live", "opened", "received", "sent")

    def __init__(self, labels: Labels) -> None:
        self.before, self.after = labels.text()
        self.opened = 0
        self.received = 0
        self.sent = 0
        self.closed: dict[str, int] = {}
        self.live = 0

    def key(self, flag: str) -> str:
        """Print the labels with the given outcome."""
        return f'{{{self.before},response_flags="{flag}",{self.after}}}'


class Traffic:
    """What one connection counts with; to be closed exactly once."""

    __slots__ = ("_series",)

    def __init__(self, series: Series) -> None:
        self._series: Series | None = series
        series.live += 1

    def opened(self) -> None:
        """Count the connection, once its routing information is complete."""
        assert self._series is not None
        self._series.opened += 1

    def add(self, received: int, sent: int) -> None:
        """Count bytes: `received` client to server, `sent` server to client."""
        series = self._series
        assert series is not None
        series.received += received
        series.sent += sent

    def closed(self, flag: str = NO_FLAG) -> None:
        """Count the end, with the `response_flag` of the error if there was one."""
        series = self._series
        assert series is not None
        series.closed[flag] = series.closed.get(flag, 0) + 1
        series.live -= 1
        self._series = None


class TrafficMetrics:
    """The traffic counters of the process."""

    def __init__(self, *, series_max: int = SERIES_MAX) -> None:
        self.overflowed = 0  # connections counted under the overflow labels
        self.forgotten = 0  # label sets dropped to make room
        self._series_max = series_max
        self._by_text: dict[str, Series] = {}
        self._known: dict[Labels, Series] = {}  # only to be fast; cleared when it grows too large

    def traffic(self, labels: Labels) -> Traffic:
        """Give a connection its handle."""
        series = self._known.get(labels)
        return Traffic(self._find(labels) if series is None else series)

    def text(self) -> Iterator[str]:
        """Print the four stable families and the failures, in pieces."""
        every = list(self._by_text.values())
        for name, description, attribute in _PLAIN:
            plain = ((s, NO_FLAG, getattr(s, attribute) if s.opened else None) for s in every)
            yield from _family(name, description, plain)
        for name, description, skipped in _BY_FLAG:
            by_flag = (
                (series, flag, None if flag == skipped else count)
                for series in every
                for flag, count in tuple(series.closed.items()) or _NONE_CLOSED
            )
            yield from _family(name, description, by_flag)

    def _find(self, labels: Labels) -> Series:
        series = Series(labels)
        text = series.key(NO_FLAG)
        if text not in self._by_text and len(self._by_text) >= self._series_max:
            self._forget_idle()
            if len(self._by_text) >= self._series_max:
                return self._overflow(labels.reporter)
        if len(self._known) >= self._series_max:
            self._known.clear()
        self._known[labels] = self._by_text.setdefault(text, series)
        return self._known[labels]

    def _overflow(self, reporter: Reporter) -> Series:
        self.overflowed += 1
        party = Party(*[OVERFLOW] * len(Party._fields))
        series = Series(Labels(reporter, party, party))
        return self._by_text.setdefault(series.key(NO_FLAG), series)

    def _forget_idle(self) -> None:
        """Forget up to a tenth of the series, oldest first, of those without connections."""
        idle = [text for text, series in self._by_text.items() if not series.live]
        for text in idle[: self._series_max // 10 + 1]:
            del self._by_text[text]
            self.forgotten += 1
        self._known.clear()


def _family(
    name: str, description: str, samples: Iterable[tuple[Series, str, int | None]]
) -> Iterator[str]:
    """Print one family: an empty text for a sample without value, so that one can rest.

    A connection that moved nothing has byte counters too, of zero: a rate needs where they began.
    """
    head = f"# HELP {name} {description}\n# TYPE {name} counter\n"
    for series, flag, value in samples:
        if value is None:
            yield ""
        else:
            yield f"{head}{name}_total{series.key(flag)} {value}\n"
            head = ""


_PLAIN = (
    ("istio_tcp_connections_opened", "Connections opened", "opened"),
    ("istio_tcp_received_bytes", "Bytes from client to server", "received"),
    ("istio_tcp_sent_bytes", "Bytes from server to client", "sent"),
)
_NONE_CLOSED: tuple[tuple[str, int | None], ...] = ((NO_FLAG, None),)
_BY_FLAG = (
    ("istio_tcp_connections_closed", "Connections closed", None),
    ("istio_tcp_connections_failed", "Connections that failed (unstable)", NO_FLAG),
)

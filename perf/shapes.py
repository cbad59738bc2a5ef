"""What is measured: each shape is one load, one number that counts, and what CPU it cost.

Shapes that can run on the same processes form a group (their `Wish`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from perf.contender import USUAL, Wish
from perf.track import APP_PORT, OUTSIDE_IP, SERVER_IP, Track

GIGA = 1e9
MEGA = 1e6
Values = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A number with its unit; `more_is_better` says which way is up."""

    key: str
    unit: str
    more_is_better: bool = True


MB_PER_SECOND = Metric(key="mb_per_s", unit="MB/s")
PER_SECOND = Metric(key="per_s", unit="/s")
P50 = Metric(key="p50_us", unit="us p50", more_is_better=False)
P99 = Metric(key="p99_us", unit="us p99", more_is_better=False)
S_PER_GB = Metric(key="cpu", unit="s/GB", more_is_better=False)
US_EACH = Metric(key="cpu", unit="us each", more_is_better=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Something that is measured: `metric` is what counts, `more` is told beside it."""

    name: str
    title: str
    metric: Metric
    more: tuple[Metric, ...] = ()

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """All of them, the one that counts first."""
        return self.metric, *self.more


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape(Question):
    """One load and how to read its result.

    `words` are those of `load.c`, with {to} for the target and {first} for the first source
    address. `alone` shapes leave the mesh and use the client's proxy only.
    """

    words: str
    wish: Wish = USUAL
    alone: bool = False
    has_direct: bool = True

    def command(self, track: Track, seconds: float) -> list[str]:
        """Give the words for `load`."""
        target = f"{OUTSIDE_IP if self.alone else SERVER_IP} {APP_PORT}"
        first = str(track.next_source) if self.wish.tunnel_per_connection else "-"
        return [*self.words.format(to=target, first=first).split(), f"{seconds:g}"]

    def values(self, found: Mapping[str, Any]) -> Values:
        """Read what `load` said; CPU per unit of work as a sum and for each end."""
        seconds, count = found["seconds"], found["count"]
        bulk = S_PER_GB in self.more
        work = found["bytes"] / GIGA if bulk else count / MEGA
        values: Values = {"failures": found["failures"]}
        if bulk:
            values["mb_per_s"] = found["bytes"] / MEGA / seconds
        else:
            values["per_s"] = count / seconds
            values |= {key: found[key] for key in ("p50_us", "p99_us", "worst_us")}
        if found["cpu"] and work:
            client, server = found["cpu"]
            values["cpu_client"], values["cpu_server"] = client / work, server / work
            values["cpu"] = (client + server) / work
        return values


HANDSHAKES = Wish(tunnel_per_connection=True)
RESUMED = Wish(tunnel_per_connection=True, resumption=True)
KINDS = {
    "connect": "new connections",
    "handshake": "full mTLS handshakes",
    "resumed": "resumed mTLS handshakes",
}
PACE_MS = 5  # performance.md 14


def _bulk(streams: int, way: str, *, alone: bool = False) -> Shape:
    prefix = "passthrough-" if alone else ""
    return Shape(
        name=f"{prefix}bulk-{streams}-{way}",
        title=f"{'plaintext passthrough, ' if alone else ''}bulk, {_streams(streams)} {way}",
        words=f"bulk {{to}} {streams} {way}",
        metric=MB_PER_SECOND,
        more=(S_PER_GB,),
        alone=alone,
    )


def _echo(size: int, streams: int, *, alone: bool = False) -> Shape:
    prefix = "passthrough-" if alone else ""
    shown = "1 KiB" if size == 1024 else f"{size} B"  # noqa: PLR2004 - one KiB
    return Shape(
        name=f"{prefix}echo-{size}-{streams}",
        title=f"{'plaintext passthrough, ' if alone else ''}ping-pong {shown}, "
        f"{_connections(streams)}",
        words=f"echo {{to}} {streams} {size}",
        metric=P50 if streams == 1 else PER_SECOND,
        more=(P99, US_EACH),
        alone=alone,
    )


def _paced() -> Shape:
    return Shape(
        name="paced-64",
        title=f"ping-pong 64 B, 1 connection, one every {PACE_MS} ms",
        words=f"pace {{to}} {PACE_MS} 64",
        metric=P50,
        more=(P99, US_EACH),
    )


def _connect(
    parallel: int, *, alone: bool = False, kind: str = "connect", wish: Wish = USUAL
) -> Shape:
    prefix = "passthrough-" if alone else ""
    return Shape(
        name=f"{prefix}{kind}-{parallel}",
        title=f"{'plaintext passthrough, ' if alone else ''}{KINDS[kind]}, {parallel} at a time",
        words=f"connect {{to}} {parallel} {{first}}",
        metric=PER_SECOND,
        more=(P99, US_EACH),
        wish=wish,
        alone=alone,
        has_direct=wish is USUAL,
    )


def _streams(count: int) -> str:
    return "1 stream" if count == 1 else f"{count} streams"


def _connections(count: int) -> str:
    return "1 connection" if count == 1 else f"{count} connections"


SHAPES: tuple[Shape, ...] = (
    _bulk(1, "up"),
    _bulk(1, "down"),
    _bulk(2, "down"),
    _bulk(8, "down"),
    _bulk(16, "up"),
    _bulk(16, "down"),
    _bulk(256, "down"),
    _echo(64, 1),
    _echo(1024, 1),
    _paced(),
    _echo(64, 64),
    _echo(1024, 64),
    _echo(64, 256),
    _connect(1),
    _connect(16),
    _bulk(1, "up", alone=True),
    _bulk(1, "down", alone=True),
    _bulk(8, "down", alone=True),
    _bulk(16, "up", alone=True),
    _bulk(16, "down", alone=True),
    _echo(64, 1, alone=True),
    _echo(64, 64, alone=True),
    _connect(16, alone=True),
    _connect(1, kind="handshake", wish=HANDSHAKES),
    _connect(16, kind="handshake", wish=HANDSHAKES),
    _connect(1, kind="resumed", wish=RESUMED),
    _connect(16, kind="resumed", wish=RESUMED),
)
QUICK = ("bulk-1-down", "echo-64-64", "connect-16")

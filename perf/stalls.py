"""How long connections wait while the daemon does something large: one thing at a time.

A ping-pong runs through both proxies while the client's is disturbed. Told are its p99 over that
of the same ping-pong undisturbed before, and what the daemon's own probe says: the longest time it
did not look at any connection (`ztunnel_event_loop_longest_stall_seconds`). That is wall time, so
it has in it whatever else the machine's cores did.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from perf.contender import (
    READY_SECONDS,
    USUAL,
    Contender,
    ContenderError,
    Running,
    Wish,
)
from perf.load import Load
from perf.node_proxies import PLANE_LOG, NodeProxies, wait_for_word
from perf.plane import TAKEN
from perf.rounds import Lane, lanes
from perf.shapes import Metric, Values
from perf.track import APP_PORT, PLAIN, SERVER_IP

TARGET = (str(SERVER_IP), str(APP_PORT))

STATS_PORT, ADMIN_PORT = 15020, 15000
STALL = "ztunnel_event_loop_longest_stall_seconds"
RENEWED = 'ztunnel_certificate_requests_total{result="success"}'
SECONDS = 2.0  # of each ping-pong
BEFORE_SECONDS = 0.6  # until it is disturbed: half of that is the load's own warm-up
PROBED_SECONDS = 0.4  # the daemon hands over what its probe found every quarter of one
MESH = (50_000, 2_500, 500)  # workloads, services, policies
IDENTITIES = 100
LIFETIME_SECONDS = 4  # of their certificates, so that each is renewed every two or so
LABEL_SETS = 2000
COLLECTING = (sys.executable, str(Path(__file__).with_name("collecting.py")))

DISTURBED = Wish(plane=MESH, plain=LABEL_SETS)
RENEWING = Wish(pods=IDENTITIES, settings=(("SECRET_TTL", f"{LIFETIME_SECONDS}s"),))
IDLE = "idle"
DISTURBANCES = {
    IDLE: "nothing else",
    "sync": f"{MESH[0]} workloads arrive",
    "dump": "all of them are dumped",
    "collect": "all garbage is collected",
    "scrape": f"a scrape of {LABEL_SETS} label sets",
    "renew": f"{IDENTITIES} certificates are renewed",
}
STALL_METRICS = tuple(
    Metric(key=f"{key}_ms", unit=f"ms, {title}", more_is_better=False)
    for key, title in DISTURBANCES.items()
)
P99_METRICS = tuple(
    Metric(key=f"{key}_p99", unit=f"x idle p99, {title}", more_is_better=False)
    for key, title in DISTURBANCES.items()
    if key != IDLE
)


async def nothing() -> None:
    """Disturb nobody."""
    await trio.lowlevel.checkpoint()


@dataclass(slots=True)
class Course:
    """One lane under disturbances; `values` gathers what is found."""

    lane: Lane
    load: Load
    values: Values
    idle_p99_us: float = 0.0
    stall: float = 0.0  # seconds: the longest that a scrape told of

    async def disturb(self, key: str, action: Callable[[], Awaitable[object]] = nothing) -> None:
        """Run the ping-pong, and `action` beside it."""
        await self.scrape()  # what was before does not count, nor does this scrape itself
        await trio.sleep(PROBED_SECONDS)
        page = await self.scrape()
        await trio.sleep(PROBED_SECONDS)
        self.stall = 0.0
        p99 = await self._ping_pong(action)
        await trio.sleep(PROBED_SECONDS)
        await self.scrape()
        if value(page, STALL) is not None:
            self.values[f"{key}_ms"] = self.stall * 1000
        if key == IDLE:
            self.idle_p99_us = p99
        else:
            self.values[f"{key}_p99"] = p99 / self.idle_p99_us

    async def scrape(self) -> str:
        """Read the metrics of the client's proxy, and note the stall they tell of."""
        page = (await self.page(STATS_PORT, "/metrics")).decode()
        self.stall = max(self.stall, value(page, STALL) or 0.0)
        return page

    async def renewals(self) -> None:
        """Wait until as many certificates as there are identities have been renewed.

        Raises:
            ContenderError: that takes too long.
        """
        before = value(await self.scrape(), RENEWED)
        if before is None:
            return  # a program that does not count them
        with trio.move_on_after(READY_SECONDS):  # only the page tells
            while (value(await self.scrape(), RENEWED) or 0.0) < before + IDENTITIES:  # noqa: ASYNC110
                await trio.sleep(PROBED_SECONDS)
            return
        raise ContenderError("the certificates are not renewed in time")

    async def page(self, port: int, path: str) -> bytes:
        """Read a page of the client's proxy, with its head."""
        sock = self.lane.track.nodes[0].netns.call(trio.socket.socket)
        await sock.connect(("127.0.0.1", port))
        async with trio.SocketStream(sock) as stream:
            await stream.send_all(f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
            return b"".join([piece async for piece in stream])

    async def _ping_pong(self, action: Callable[[], Awaitable[object]]) -> float:
        words = ["echo", *TARGET, "1", "64", f"{SECONDS:g}"]
        found: list[float] = []

        async def ping() -> None:
            found.append((await self.load.run(self.lane.track.client, words))["p99_us"])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ping)
            await trio.sleep(BEFORE_SECONDS)
            await action()
        return found[0]


def value(page: str, name: str) -> float | None:
    """Find one metric in a page; None if it is not there."""
    found = re.search(rf"^{re.escape(name)} (\S+)", page, re.MULTILINE)
    return float(found[1]) if found else None


async def stalls(contender: Contender, load: Load, folder: Path) -> Values:
    """Disturb a proxy in one way after the other."""
    assert isinstance(contender, NodeProxies)
    values: Values = {}
    await _large_things(contender, load, folder / "large", values)
    await _renewals(contender, load, folder / "renewals", values)
    return values


async def _large_things(contender: NodeProxies, load: Load, folder: Path, values: Values) -> None:
    run_by = contender.with_client(COLLECTING) if contender.is_ours else contender
    async with lanes([run_by], DISTURBED, load, folder) as (lane,):
        course = Course(lane, load, values)
        running = lane.running
        assert running is not None
        assert running.plane is not None
        await course.disturb(IDLE)
        await course.disturb("sync", lambda: take_mesh(running, folder / contender.name))
        await course.disturb("dump", lambda: course.page(ADMIN_PORT, "/config_dump"))
        if contender.is_ours:

            async def collect() -> None:
                running.client.send_signal(signal.SIGUSR2)
                await trio.lowlevel.checkpoint()

            await course.disturb("collect", collect)
        everybody = (f"{PLAIN[1]}+", str(APP_PORT))
        async with load.held(lane.track, everybody, LABEL_SETS, sources=False):
            await course.disturb("scrape", course.scrape)


async def take_mesh(running: Running, folder: Path) -> None:
    """Have the control plane publish its mesh, and wait until the proxy has taken it.

    Raises:
        ContenderError: it has not in time.
    """
    assert running.plane is not None
    running.plane.send_signal(signal.SIGUSR1)
    await wait_for_word(TAKEN, running.plane, folder / PLANE_LOG)


async def _renewals(contender: NodeProxies, load: Load, folder: Path, values: Values) -> None:
    async with lanes([contender], USUAL, load, folder / "idle") as (lane,):
        course = Course(lane, load, {})
        await course.disturb(IDLE)
        idle = course.idle_p99_us
    async with lanes([contender], RENEWING, load, folder) as (lane,):
        course = Course(lane, load, values, idle_p99_us=idle)
        await course.disturb("renew", course.renewals)

"""The three servers for operators and what they answer (dns-and-observability.md 1, 3, 5, 7.1).

15000 admin on loopback, 15020 metrics and 15021 readiness on every address. All of them run on
the loop that moves traffic: so a stuck data path makes the pod unready, and so large answers are
made in slices.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Protocol

import trio

from ztunnel.admin.config_dump import Section, Wish, config_dump
from ztunnel.admin.http import (
    HTML,
    JSON,
    TEXT,
    Handler,
    Request,
    Response,
    Routes,
    compressed,
    gathered,
    serve_connection,
    text,
)
from ztunnel.admin.readiness import Readiness
from ztunnel.errors import ConfigError
from ztunnel.telemetry.filter import LogFilter
from ztunnel.transport.pace import Pace

BACKLOG = 128
CONNECTIONS_MAX = 128  # of one server; a probe, a few scrapers and a few people
DRAIN_SECONDS = 5.0
OPENMETRICS = "application/openmetrics-text"
OPENMETRICS_TYPE = f"{OPENMETRICS};charset=utf-8;version=1.0.0"
LOGGING_USAGE = """\
usage: POST /logging                         show the levels
usage: POST /logging?level=<level>           change the level of everything
usage: POST /logging?level=<target>=<level>  change one target; <target>:<level> works as well
usage: POST /logging?reset                   back to the levels of the start
levels: off, error, warn, info, debug, trace
"""
_NO_IPV6 = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}


Prepare = Callable[[], Awaitable[None]]


class Levels(Protocol):
    """Who knows the log's levels: see `telemetry.log.Pipeline`."""

    def change(self, filter_text: str = "", *, reset: bool = False) -> LogFilter:
        """Add directives, after going back to the start filter if `reset`; return the result.

        Raises:
            ValueError: the text is not a filter; nothing has changed.
        """


class Exposed(Protocol):
    """Whose metrics are shown: see `telemetry.metrics.Metrics`."""

    def text(self) -> Iterator[str]:
        """Print everything as OpenMetrics, in pieces."""


async def listen(host: str, port: int, *, mend: str) -> trio.SocketListener:
    """Open a listening socket on the address `host`; `::` takes IPv4 as well.

    On a kernel without IPv6 `::` means all IPv4 addresses.

    Raises:
        ConfigError: the address cannot be had; the message says how to `mend` that.
    """
    if host == "::" and not _has_ipv6():
        host = "0.0.0.0"  # noqa: S104 every address is meant
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = trio.socket.socket(family, socket.SOCK_STREAM)
    except OSError as exc:
        raise ConfigError(_bind_failure(host, port, exc, mend)) from exc
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        await sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        raise ConfigError(_bind_failure(host, port, exc, mend)) from exc
    return trio.SocketListener(sock)


def _has_ipv6() -> bool:
    return Path("/proc/net/if_inet6").exists()


async def listen_on_loopback(port: int, *, mend: str) -> list[trio.SocketListener]:
    """Open a listening socket on 127.0.0.1, and on ::1 if there is IPv6 there.

    Raises:
        ConfigError: see `listen`.
    """
    listeners = [await listen("127.0.0.1", port, mend=mend)]
    try:
        listeners.append(await listen("::1", port, mend=mend))
    except ConfigError as exc:
        cause = exc.__cause__
        if not (isinstance(cause, OSError) and cause.errno in _NO_IPV6):
            listeners[0].socket.close()
            raise
    return listeners


def _bind_failure(host: str, port: int, exc: OSError, mend: str) -> str:
    reason = os.strerror(exc.errno) if exc.errno else str(exc)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return f"failed to bind to address {address}: {reason} ({mend})"


async def serve(
    listeners: list[trio.SocketListener],
    routes: Routes,
    *,
    draining: trio.Event,
    pace: Pace,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer until `draining` is set; then close the listeners and let requests finish."""
    busy: dict[trio.CancelScope, None] = {}

    async def answer(stream: trio.SocketStream) -> None:
        if len(busy) >= CONNECTIONS_MAX:  # the oldest goes: a flood of idlers must not stop a probe
            oldest = next(iter(busy))
            del busy[oldest]
            oldest.cancel()
        with trio.CancelScope() as scope:
            busy[scope] = None
            try:
                await serve_connection(stream, routes, pace)
            finally:
                busy.pop(scope, None)

    async with trio.open_nursery() as connections:
        async with trio.open_nursery() as accepting:
            await accepting.start(
                partial(trio.serve_listeners, answer, listeners, handler_nursery=connections)
            )
            task_status.started()
            await draining.wait()
            accepting.cancel_scope.cancel()
        connections.cancel_scope.deadline = trio.current_time() + DRAIN_SECONDS


def admin_routes(
    *,
    sections: Mapping[str, Section],
    levels: Levels,
    shut_down: Callable[[], None],
    prepare: Prepare | None = None,
) -> Routes:
    """Make the pages of 15000.

    `shut_down` starts the drain and returns at once; `prepare` is awaited before each dump.
    """
    dump = _dump(sections, prepare)
    pages: dict[str, tuple[str, Handler]] = {
        "/config_dump": ("everything we know; ?types=, ?namespace=, ?node=", dump),
        "/logging": ("query and change log levels (POST)", partial(_logging, levels)),
        "/quitquitquit": ("drain and shut down (POST)", partial(_quit, shut_down)),
    }
    routes = {path: handler for path, (_, handler) in pages.items()}
    routes["/"] = partial(_index, {path: about for path, (about, _) in pages.items()})
    return {path: partial(_for_local_tools, handler) for path, handler in routes.items()}


def stats_routes(metrics: Exposed, prepare: Prepare | None = None) -> Routes:
    """Make the pages of 15020; `prepare` is awaited before each answer."""
    return dict.fromkeys(("/metrics", "/stats/prometheus"), partial(_scrape, metrics, prepare))


def readiness_routes(readiness: Readiness) -> Routes:
    """Make the page of 15021."""
    return {"/healthz/ready": partial(_ready, readiness)}


def _for_local_tools(handler: Handler, request: Request) -> Response:
    """Refuse a browser that a foreign page sent here by giving its own name our address."""
    host = request.headers.get("host", "localhost").rpartition("@")[2]
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if name not in {"localhost", ""}:
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return text("reach this page as localhost\n", HTTPStatus.FORBIDDEN)
    return handler(request)


def _index(pages: Mapping[str, str], _: Request) -> Response:
    from html import escape  # noqa: PLC0415 - brings the names of all characters that have one

    rows = "".join(
        f'<tr><td><a href="{path[1:]}">{path}</a></td><td>{escape(about)}</td></tr>\n'
        for path, about in sorted(pages.items())
    )
    body = f"<!DOCTYPE html><title>ztunnel</title><table>\n{rows}</table>\n"
    return Response(content_type=HTML, pieces=(body.encode(),))


def _dump(sections: Mapping[str, Section], prepare: Prepare | None) -> Handler:
    def page(request: Request) -> Response:
        wish = Wish.of(request.query)
        if unknown := wish.types - set(sections):
            names = ", ".join(sorted(unknown))
            known = ", ".join(sorted(sections))
            message = f"unknown types: {names}; known: {known}\n"
            return text(message, HTTPStatus.BAD_REQUEST)
        return Response(content_type=JSON, pieces=config_dump(sections, wish), prepare=prepare)

    return page


def _logging(levels: Levels, request: Request) -> Response:
    if request.method != "POST":
        return text(LOGGING_USAGE, HTTPStatus.METHOD_NOT_ALLOWED)
    try:
        changed = levels.change(request.query.get("level", ""), reset="reset" in request.query)
    except ValueError as exc:
        return text(f"{exc}\n{LOGGING_USAGE}", HTTPStatus.BAD_REQUEST)
    return text(f"current log level is {changed}\n")


def _quit(shut_down: Callable[[], None], request: Request) -> Response:
    if request.method != "POST":
        return Response(status=HTTPStatus.METHOD_NOT_ALLOWED)
    shut_down()
    return text("shutdown now\n")


def _scrape(metrics: Exposed, prepare: Prepare | None, request: Request) -> Response:
    accepted = [
        part.partition(";") for part in request.headers.get("accept", "").lower().split(",")
    ]
    openmetrics = any(kind.strip() == OPENMETRICS for kind, _, _ in accepted)
    body: Iterator[bytes] = gathered(metrics.text())
    headers = {"vary": "accept, accept-encoding"}
    if _takes_gzip(request):
        body, headers["content-encoding"] = compressed(body), "gzip"
    content_type = OPENMETRICS_TYPE if openmetrics else TEXT
    return Response(content_type=content_type, pieces=body, headers=headers, prepare=prepare)


def _takes_gzip(request: Request) -> bool:
    for part in request.headers.get("accept-encoding", "").lower().split(","):
        coding, _, quality = part.partition(";")
        if coding.strip() == "gzip":
            return quality.replace(" ", "") not in {"q=0", "q=0.0", "q=0.00", "q=0.000"}
    return False


def _ready(readiness: Readiness, request: Request) -> Response:
    if request.method not in {"GET", "HEAD"}:
        return Response(status=HTTPStatus.METHOD_NOT_ALLOWED)
    status = HTTPStatus.OK if readiness.is_ready else HTTPStatus.INTERNAL_SERVER_ERROR
    return text(readiness.text(), status)

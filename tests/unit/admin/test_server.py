from __future__ import annotations

import gzip
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from http import HTTPStatus

import pytest
import trio
import trio.testing
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse

from ztunnel.admin import server
from ztunnel.admin.config_dump import constant
from ztunnel.admin.http import Request, Response, Routes
from ztunnel.admin.readiness import Readiness
from ztunnel.admin.server import (
    admin_routes,
    listen,
    listen_on_loopback,
    readiness_routes,
    serve,
    stats_routes,
)
from ztunnel.errors import ConfigError
from ztunnel.telemetry.log import Pipeline
from ztunnel.telemetry.metrics import Metrics
from ztunnel.telemetry.writer import LineWriter
from ztunnel.transport.pace import Pace


class Quit:
    """Remembers that it was asked."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> None:
        self.asked = True


def a_request(method: str, path: str, **headers: str) -> Request:
    path, _, query = path.partition("?")
    values = {part.partition("=")[0]: part.partition("=")[2] for part in query.split("&") if part}
    known = {name.replace("_", "-"): value for name, value in headers.items()}
    return Request(method=method, path=path, version="HTTP/1.1", query=values, headers=known)


def ask(routes: Routes, method: str, path: str, **headers: str) -> Response:
    request = a_request(method, path, **headers)
    return routes[request.path](request)


def body(response: Response) -> bytes:
    return b"".join(response.pieces)


def an_admin(quit_: Quit | None = None) -> tuple[Routes, Pipeline]:
    pipeline = Pipeline(writer=LineWriter(-1))
    sections = {"version": constant(lambda: {"version": "1"}), "config": constant(dict)}
    routes = admin_routes(sections=sections, levels=pipeline, shut_down=quit_ or Quit())
    return routes, pipeline


def test_the_first_page_links_the_others() -> None:
    routes, _ = an_admin()
    page = ask(routes, "GET", "/")
    assert page.content_type == "text/html; charset=utf-8"
    for path in set(routes) - {"/"}:
        assert f'<a href="{path[1:]}">' in body(page).decode()


def test_the_dump_is_json_and_can_be_narrowed() -> None:
    routes, _ = an_admin()
    page = ask(routes, "GET", "/config_dump?types=version")
    assert page.content_type == "application/json"
    assert json.loads(body(page)) == {"version": {"version": "1"}}
    assert ask(routes, "GET", "/config_dump?types=x").status == HTTPStatus.BAD_REQUEST


@pytest.mark.parametrize(
    ("path", "filter_text"),
    [
        ("/logging", "info"),
        ("/logging?level=", "info"),
        ("/logging?level=debug", "debug"),
        ("/logging?level=access=debug", "access=debug,info"),
        ("/logging?level=access:debug", "access=debug,info"),
        ("/logging?level=warning", "warn"),
        ("/logging?level=critical", "error"),
    ],
)
def test_levels_are_shown_and_changed(path: str, filter_text: str) -> None:
    routes, _ = an_admin()
    page = ask(routes, "POST", path)
    assert page.status == HTTPStatus.OK
    assert body(page).decode() == f"current log level is {filter_text}\n"


def test_levels_are_reset() -> None:
    routes, pipeline = an_admin()
    pipeline.change("xds=trace")
    assert body(ask(routes, "POST", "/logging?level=info&reset")) == b"current log level is info\n"


def test_a_bad_level_is_named_and_a_get_explained() -> None:
    routes, _ = an_admin()
    bad = ask(routes, "POST", "/logging?level=loud")
    assert bad.status == HTTPStatus.BAD_REQUEST
    assert body(bad).startswith(b"invalid log level 'loud'")
    get = ask(routes, "GET", "/logging")
    assert get.status == HTTPStatus.METHOD_NOT_ALLOWED
    assert body(get).startswith(b"usage: POST /logging")


def test_quitting_takes_a_post() -> None:
    quit_ = Quit()
    routes, _ = an_admin(quit_)
    assert ask(routes, "GET", "/quitquitquit").status == HTTPStatus.METHOD_NOT_ALLOWED
    assert not quit_.asked
    assert body(ask(routes, "POST", "/quitquitquit")) == b"shutdown now\n"
    assert quit_.asked


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:15000", 200),
        ("127.0.0.1", 200),
        ("[::1]:15000", 200),
        ("192.0.2.1:80", 200),
        ("evil.example:15000", 403),
        ("localhost.evil.example", 403),
        ("localhost@evil.example", 403),
    ],
)
def test_a_page_of_another_site_cannot_reach_the_admin_server(host: str, status: int) -> None:
    routes, _ = an_admin()
    assert ask(routes, "GET", "/", host=host).status == status


@pytest.mark.parametrize("path", ["/metrics", "/stats/prometheus"])
def test_metrics_are_openmetrics_whatever_was_asked_for(path: str) -> None:
    routes = stats_routes(Metrics())
    plain = ask(routes, "GET", path)
    assert plain.content_type == "text/plain; charset=utf-8"
    asked = ask(routes, "GET", path, accept="text/html, Application/OpenMetrics-Text; version=1")
    assert asked.content_type == "application/openmetrics-text;charset=utf-8;version=1.0.0"
    for page in (plain, asked):
        assert list(parse(body(page).decode()))


@pytest.mark.parametrize(
    ("accepts", "packed"),
    [("gzip", True), ("br, GZIP;q=0.5", True), ("gzip;q=0", False), ("br", False), ("", False)],
)
def test_metrics_are_compressed_for_those_who_take_it(accepts: str, *, packed: bool) -> None:
    page = ask(stats_routes(Metrics()), "GET", "/metrics", accept_encoding=accepts)
    assert (page.headers.get("content-encoding") == "gzip") is packed
    raw = body(page)
    assert (gzip.decompress(raw) if packed else raw).endswith(b"# EOF\n")


def test_readiness_follows_its_tasks() -> None:
    readiness = Readiness("proxy")
    routes = readiness_routes(readiness)
    waiting = ask(routes, "GET", "/healthz/ready")
    assert waiting.status == HTTPStatus.INTERNAL_SERVER_ERROR
    assert body(waiting) == b"not ready, pending: proxy\n"
    readiness.clear("proxy")
    assert body(ask(routes, "GET", "/healthz/ready")) == b"ready\n"
    assert ask(routes, "POST", "/healthz/ready").status == HTTPStatus.METHOD_NOT_ALLOWED


@asynccontextmanager
async def serving(draining: trio.Event) -> AsyncIterator[tuple[str, int]]:
    listener = await listen("127.0.0.1", 0, mend="")
    address = listener.socket.getsockname()
    routes = readiness_routes(Readiness())
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve, [listener], routes, draining=draining, pace=Pace()))
            yield address


async def talk(stream: trio.SocketStream, request: bytes) -> bytes:
    await stream.send_all(request)
    answer = b""
    async for received in stream:
        answer += received
    return answer


async def test_a_probe_over_a_real_socket() -> None:
    draining = trio.Event()
    async with serving(draining) as (host, port):
        async with await trio.open_tcp_stream(host, port) as stream:
            answer = await talk(stream, b"GET /healthz/ready HTTP/1.1\r\n\r\n")
        draining.set()
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"ready\n")


async def test_a_drain_refuses_newcomers_and_lets_requests_finish() -> None:
    draining = trio.Event()
    async with (
        serving(draining) as (host, port),
        await trio.open_tcp_stream(host, port) as stream,
    ):
        await stream.send_all(b"GET /healthz/ready")
        async with await trio.open_tcp_stream(host, port) as other:  # answered, so ours is in
            await talk(other, b"GET /healthz/ready HTTP/1.1\r\n\r\n")
        draining.set()
        await trio.testing.wait_all_tasks_blocked(0.01)
        with pytest.raises(OSError, match=r"."):
            await trio.open_tcp_stream(host, port)
        assert (await talk(stream, b" HTTP/1.1\r\n\r\n")).endswith(b"ready\n")


async def test_a_flood_of_idlers_does_not_stop_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CONNECTIONS_MAX", 2)
    draining = trio.Event()
    async with serving(draining) as (host, port):
        idlers = [await trio.open_tcp_stream(host, port) for _ in range(4)]
        async with await trio.open_tcp_stream(host, port) as probe:
            answer = await talk(probe, b"GET /healthz/ready HTTP/1.1\r\n\r\n")
        assert await idlers[0].receive_some() == b""
        for idler in idlers:
            await idler.aclose()
        draining.set()
    assert answer.endswith(b"ready\n")


async def test_a_port_in_use_says_what_to_change() -> None:
    async with await listen("127.0.0.1", 0, mend="") as listener:
        port = listener.socket.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            await listen_on_loopback(port, mend="set proxyAdminPort in PROXY_CONFIG")
    assert str(caught.value) == (
        f"failed to bind to address 127.0.0.1:{port}: Address already in use "
        "(set proxyAdminPort in PROXY_CONFIG)"
    )


async def test_the_wildcard_takes_both_families() -> None:
    try:
        listener = await listen("::", 0, mend="")
    except ConfigError as exc:
        pytest.skip(f"no IPv6 here: {exc}")
    async with listener:
        assert listener.socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 0
        port = listener.socket.getsockname()[1]
        async with await trio.open_tcp_stream("127.0.0.1", port):
            pass

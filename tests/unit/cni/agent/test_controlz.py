"""ControlZ, asked over a real socket as `istioctl admin log` and curl do."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import AsyncIterator

import pytest
import structlog
import trio
import trio.testing

from cni.agent.controlz import BODY_BYTES_MAX, serve_controlz
from cni.agent.scopes import LEVELS, LogScopes
from tests.support.ports import claimed_port
from tests.unit.telemetry.test_log import a_pipeline

Answer = tuple[int, str]


class Door:
    """ControlZ of a pipeline."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.pipeline, self.lines = a_pipeline()

    async def ask(self, method: str, path: str, body: bytes | None = None) -> Answer:
        return await trio.to_thread.run_sync(self._ask, method, path, body)

    def _ask(self, method: str, path: str, body: bytes | None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, body)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    async def level(self, name: str) -> str:
        status, text = await self.ask("GET", f"/scopej/{name}")
        assert status == 200
        return str(json.loads(text)["output_level"])


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    with claimed_port() as port:
        door = Door(port)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_controlz, "127.0.0.1", port, LogScopes(door.pipeline))
            await trio.testing.wait_all_tasks_blocked()
            yield door
            nursery.cancel_scope.cancel()


async def test_all_scopes_are_listed_with_the_references_fields(door: Door) -> None:
    for path in ("/scopej/", "/scopej"):  # istioctl asks for the latter
        status, text = await door.ask("GET", path)
        assert status == 200
        listed = json.loads(text)
        assert [scope.pop("name") for scope in listed] == ["cni-agent", "cni-plugin", "default"]
        for scope in listed:
            assert scope.pop("description")
            assert scope == {
                "output_level": "info",
                "stack_trace_level": "none",
                "log_callers": False,
            }


async def test_a_level_is_changed_and_lines_follow(door: Door) -> None:
    log = door.pipeline.get("cni::agent::probes")
    log.debug("before")
    answer = await door.ask("PUT", "/scopej/cni-agent", b'{"output_level": "debug"}')
    assert answer == (202, "")
    log.debug("after")
    assert await door.level("cni-agent") == "debug"
    assert await door.level("cni-plugin") == "info"
    await door.ask("PUT", "/scopej/cni-agent", b'{"output_level": "error"}')
    log.warning("later")
    assert [line.split("\t")[3] for line in door.lines] == ["after"]


@pytest.mark.parametrize("level", LEVELS)
async def test_each_of_the_references_levels_is_taken(door: Door, level: str) -> None:
    body = json.dumps({"name": "default", "output_level": level}).encode() + b"\n"
    assert await door.ask("PUT", "/scopej/default", body) == (202, "")
    assert await door.level("default") == level


async def test_what_istioctl_sends_to_reset_is_taken(door: Door) -> None:
    await door.ask("PUT", "/scopej/cni-agent", b'{"output_level": "debug"}')
    reset = b'{"name":"cni-agent","stack_trace_level":"none"}\n'
    assert await door.ask("PUT", "/scopej/cni-agent", reset) == (202, "")
    assert await door.level("cni-agent") == "debug"
    reset = b'{"name":"cni-agent","output_level":"info","stack_trace_level":"none"}\n'
    assert await door.ask("PUT", "/scopej/cni-agent", reset) == (202, "")
    assert await door.level("cni-agent") == "info"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "unable to decode request: .*; send {"),
        (b"debug", "unable to decode request"),
        (b'{"output_level": 1}', "unable to decode request"),
        (b"[" * 3000, "unable to decode request"),
        (b"{}", r'changes nothing; send {"output_level": "debug"}'),
        (b'{"level": "debug"}', "changes nothing"),
        (b'{"output_level": "loud"}', "unknown output_level 'loud'; write one of debug, info"),
        (b'{"output_level": "trace"}', "unknown output_level"),
        (b'{"output_level": "debug", "stack_trace_level": "info"}', "cannot be switched on"),
        (b'{"output_level": "debug", "log_callers": true}', "cannot be switched on"),
    ],
)
async def test_a_request_that_would_not_do_what_it_says_is_refused_and_changes_nothing(
    door: Door, body: bytes, why: str
) -> None:
    before = str(door.pipeline.filter)
    status, text = await door.ask("PUT", "/scopej/cni-agent", body)
    assert status == 400
    assert re.search(why, text)
    assert str(door.pipeline.filter) == before


@pytest.mark.parametrize("method", ["GET", "PUT"])
@pytest.mark.parametrize("name", ["nope", "all", "%00", "x" * 500])
async def test_of_a_scope_that_is_not_there_the_others_are_named(
    door: Door, method: str, name: str
) -> None:
    status, text = await door.ask(method, f"/scopej/{name}", b'{"output_level": "debug"}')
    assert status == 400
    assert text.startswith(f"unknown scope name: '{name[:80]}'; ")
    assert text.endswith("the scopes are cni-agent, cni-plugin, default\n")


async def test_the_first_page_says_what_is_there_and_so_does_a_wrong_one(door: Door) -> None:
    status, text = await door.ask("GET", "/")
    assert status == 200
    assert 'PUT /scopej/NAME   with {"output_level": LEVEL}' in text
    for path in ("/scopez/", "/debug/pprof/", "/scopej/cni-agent/more"):
        status, text = await door.ask("GET", path)
        assert (status, text) == (404, "not found; there is /, /scopej, /scopej/, /scopej/*\n")


@pytest.mark.parametrize("method", ["POST", "DELETE", "PATCH"])
async def test_other_methods_are_refused(door: Door, method: str) -> None:
    answer = await door.ask(method, "/scopej/cni-agent", b'{"output_level": "debug"}')
    assert answer == (405, f"{method} is not possible here, GET or PUT is\n")
    assert await door.ask("PUT", "/scopej/") == (405, "PUT is not possible here, GET is\n")
    assert await door.level("cni-agent") == "info"


async def test_a_long_request_is_refused(door: Door) -> None:
    body = b'{"output_level": "debug"' + b" " * BODY_BYTES_MAX + b"}"
    answer = await door.ask("PUT", "/scopej/cni-agent", body)
    assert answer == (413, "the request is too long, 4096 bytes are taken\n")
    assert await door.level("cni-agent") == "info"


async def test_only_this_machine_is_served(door: Door) -> None:
    with socket.socket(socket.AF_INET) as sock:
        sock.settimeout(5)
        # Another of the machine's own addresses, which a listener at any address would have.
        with pytest.raises(ConnectionRefusedError):
            sock.connect(("127.0.0.2", door.port))


async def test_a_port_that_is_taken_is_no_reason_to_fail() -> None:
    with (
        claimed_port() as port,
        socket.create_server(("127.0.0.1", port)),
        structlog.testing.capture_logs() as entries,
        trio.fail_after(5),
    ):
        await serve_controlz("127.0.0.1", port, LogScopes(a_pipeline()[0]))
    assert entries[0]["event"] == "ControlZ not served, --ctrlz_port names another port"
    assert f"port {port}" in entries[0]["error"]

"""Envoy as an HBONE peer that is not ours.

`running_envoy` starts one Envoy for one configuration: an `HboneClient` (plain TCP in, CONNECT in
mTLS out), an `HboneServer` (the reverse), or a `Waypoint` (one behind the other). Envoy chooses its
ports itself, unless told, and its admin interface is a Unix socket, so any number run side by side
and also inside network namespaces. Certificates lie in a private temporary folder, because Envoy
can only read files; our own code never does that.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from io import BytesIO
from pathlib import Path
from subprocess import DEVNULL, STDOUT
from typing import cast

import trio

from tests.support.envoy_config import EnvoyConfig, bootstrap

INSTALLED = Path(__file__).parents[2] / ".peers" / "envoy"
# Envoy needs 0.15 s on an idle machine; a shared one with two cores may be far from idle.
START_SECONDS = 20
STOP_SECONDS = 5
POLL_SECONDS = 0.02
LOG_LINES_SHOWN = 20


class EnvoyError(Exception):
    """Envoy is not there, did not start, or does not answer."""


def find_envoy() -> Path:
    """Find the program: `$ENVOY`, or what `make test` installed.

    Raises:
        EnvoyError: there is none.
    """
    chosen = os.environ.get("ENVOY")
    program = Path(chosen) if chosen else INSTALLED / "envoy" / "_bin" / "envoy"
    if not os.access(program, os.X_OK):
        raise EnvoyError("needs Envoy: run .ci/prepare.sh test, or set ENVOY to the program")
    return program


@dataclass(frozen=True, slots=True)
class Envoy:
    """A running Envoy: where it listens, and what it says."""

    address: str
    port: int
    folder: Path
    process: trio.Process

    async def admin(self, path: str) -> bytes:
        """Give the body of an admin page.

        Raises:
            EnvoyError: there was no answer, or it was not 200.
        """
        return await _admin(self.folder, path)

    async def access_log(self, *, lines: int = 1) -> list[dict[str, str]]:
        """Wait until `lines` connections (client) or requests (server) have ended; give them all.

        Keys are those of `envoy_config.ACCESS_LOG_FIELDS`, a server's also of `REQUEST_LOG_FIELDS`.
        Envoy writes a line only when all is over, so the caller bounds the wait.
        """
        log = trio.Path(self.folder / "access.log")
        while True:
            text = await log.read_text() if await log.exists() else ""
            complete = text[: text.rfind("\n") + 1].splitlines()
            if len(complete) >= lines:
                return [_fields(line) for line in complete]
            await trio.sleep(POLL_SECONDS)

    def log_tail(self) -> str:
        """Give the last lines that Envoy said about itself."""
        return _log_tail(self.folder)


@asynccontextmanager
async def running_envoy(
    config: EnvoyConfig, *, program: Path, netns: Path | None = None
) -> AsyncIterator[Envoy]:
    """Run Envoy until the block ends, inside the network namespace at `netns` if one is given.

    Raises:
        EnvoyError: it ended, or was not ready within START_SECONDS; the message has its last words.
    """
    with tempfile.TemporaryDirectory(prefix="envoy-") as name:
        folder = Path(name)
        (folder / "bootstrap.json").write_text(json.dumps(bootstrap(config, folder)))
        process = await _start(folder, program, netns)
        try:
            port = await _listening_port(folder, process)
            yield Envoy(config.listen_address, port, folder, process)
        finally:
            # Twice: once to end by itself, once for a process that had to be killed.
            with trio.move_on_after(2 * STOP_SECONDS, shield=True):
                await _stop(process)


async def _start(folder: Path, program: Path, netns: Path | None) -> trio.Process:
    enter = ["nsenter", f"--net={netns}", "--"] if netns else []
    with (folder / "envoy.log").open("wb") as log:
        return await trio.lowlevel.open_process(
            [
                *enter,
                str(program),
                "--config-path",
                str(folder / "bootstrap.json"),
                # Shared memory and --base-id serve hot restart; without it Envoys cannot meet.
                "--disable-hot-restart",
                "--concurrency",
                "1",
                "--log-level",
                "warning",
                "--file-flush-interval-msec",
                "20",
            ],
            stdin=DEVNULL,
            stdout=log,
            stderr=STDOUT,
        )


async def _listening_port(folder: Path, process: trio.Process) -> int:
    with trio.move_on_after(START_SECONDS):
        while process.returncode is None and process.poll() is None:
            try:
                await _admin(folder, "/ready")
            except EnvoyError:
                await trio.sleep(POLL_SECONDS)
                continue
            listeners = json.loads(await _admin(folder, "/listeners?format=json"))
            addresses = [one["local_address"] for one in listeners["listener_statuses"]]
            # A waypoint has listeners that are not on the network, too.
            [port] = [
                one["socket_address"]["port_value"] for one in addresses if "socket_address" in one
            ]
            return int(port)
    raise EnvoyError(f"Envoy did not become ready; it said:\n{_log_tail(folder)}")


async def _admin(folder: Path, path: str) -> bytes:
    request = f"GET {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n"
    try:
        async with await trio.open_unix_socket(folder / "admin.sock") as stream:
            await stream.send_all(request.encode())
            answer = b"".join([chunk async for chunk in stream])
        response = HTTPResponse(cast("socket.socket", _Answer(answer)))
        response.begin()
        body = response.read()
    except (OSError, HTTPException, trio.BrokenResourceError) as exc:
        raise EnvoyError(f"{path}: {exc!r}") from exc
    if response.status != 200:
        raise EnvoyError(f"{path}: {response.status} {body!r}")
    return body


class _Answer:
    """All the bytes of an answer, as the socket `http.client` wants to read them from."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def makefile(self, mode: str) -> BytesIO:
        return BytesIO(self._content)


async def _stop(process: trio.Process) -> None:
    process.terminate()
    with trio.move_on_after(STOP_SECONDS):
        await process.wait()
        return
    process.kill()
    await process.wait()


def _fields(line: str) -> dict[str, str]:
    """Read a line of the access log; a field without a value is null there, and empty here."""
    return {key: "" if value is None else str(value) for key, value in json.loads(line).items()}


def _log_tail(folder: Path) -> str:
    lines = (folder / "envoy.log").read_text(errors="replace").splitlines()
    return "\n".join(lines[-LOG_LINES_SHOWN:])

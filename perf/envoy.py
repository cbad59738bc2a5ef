"""Envoy, one process in each pod, one worker thread each."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from perf import envoy_config
from perf.contender import ContenderError, Running, Wish, process_in, wait_until_it_answers
from perf.envoy_config import Files
from perf.mesh_file import CLIENT, SERVER
from perf.track import Track
from ztunnel.identity.dev_ca import DevelopmentCa
from ztunnel.model.identity import Identity

INSTALLED = Path(__file__).parents[1] / ".peers" / "envoy" / "envoy" / "_bin" / "envoy"
FLAGS = ("--disable-hot-restart", "--concurrency", "1", "--log-level", "error")


def find_envoy() -> Path:
    """Find the program: `$ENVOY`, or what `make test` and `make bench` install.

    Raises:
        ContenderError: there is none.
    """
    program = Path(os.environ.get("ENVOY") or INSTALLED)
    if not os.access(program, os.X_OK):
        raise ContenderError("needs Envoy: run .ci/prepare.sh bench, or set ENVOY to the program")
    return program


class Envoy:
    """Envoy as a pair of node proxies."""

    name = "envoy"

    def __init__(self, program: Path) -> None:
        self._program = program

    @asynccontextmanager
    async def running(
        self, track: Track, wish: Wish, authority: DevelopmentCa, folder: Path
    ) -> AsyncIterator[Running | None]:
        """Run both; `deny_policies` are ignored, it has no policy here."""
        began = time.perf_counter()
        client = _files(folder, "client", CLIENT, authority)
        server = _files(folder, "server", SERVER, authority)
        configs = {
            client: envoy_config.client(
                client,
                server_name=str(SERVER),
                tunnel_per_connection=wish.tunnel_per_connection,
                resumption=wish.resumption,
            ),
            server: envoy_config.server(
                server, client_prefix="spiffe://cluster.local/", resumption=wish.resumption
            ),
        }
        logs = []
        async with AsyncExitStack() as stack:
            processes = []
            for member, files in ((track.client, client), (track.server, server)):
                path = files.chain.with_suffix(".json")
                path.write_text(json.dumps(configs[files]))
                logs.append(files.chain.with_suffix(".out"))
                words = [str(self._program), "--config-path", str(path), *FLAGS]
                started = process_in(member, words, logs[-1], env=dict(os.environ))
                processes.append(await stack.enter_async_context(started))
            running = Running(processes[0], processes[1])
            await wait_until_it_answers(track, running, logs)
            seconds = time.perf_counter() - began
            yield Running(running.client, running.server, ready_seconds=seconds)


def _files(folder: Path, name: str, identity: Identity, authority: DevelopmentCa) -> Files:
    issued = authority.issue(identity)
    files = Files(
        chain=folder / f"{name}.chain",
        key=folder / f"{name}.key",
        roots=folder / f"{name}.roots",
        log=folder / f"{name}.log",
    )
    files.key.touch(mode=0o600)
    files.chain.write_bytes(issued.chain_pem)
    files.key.write_bytes(issued.key_pem)
    files.roots.write_bytes(issued.roots_pem)
    return files

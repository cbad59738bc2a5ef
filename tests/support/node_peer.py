"""Node's http2 (nghttp2, OpenSSL) as an HBONE peer; `node_peer.mjs` beside this is what runs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.support.envoy_config import Credentials
from tests.support.programs import CredentialFiles, Program, running_program
from ztunnel.devmesh.cluster import Member

SCRIPT = Path(__file__).with_suffix(".mjs")
LISTENING = '"event":"listening"'


@asynccontextmanager
async def running_node(
    member: Member, credentials: Credentials, folder: Path, **config: Any
) -> AsyncIterator[Program]:
    """Run Node inside a pod until the block ends; the script says what `config` may hold."""
    files = CredentialFiles.write(credentials, folder)
    config |= {"chain": str(files.chain), "key": str(files.key), "roots": str(files.roots)}
    words = ("node", str(SCRIPT), json.dumps(config))
    async with running_program(member, *words, ready=LISTENING) as program:
        yield program


def happened(program: Program, event: str) -> list[dict[str, Any]]:
    """List what Node has said about events of one kind."""
    events = [json.loads(line) for line in program.lines.all if line.startswith("{")]
    return [one for one in events if one["event"] == event]


def doors(program: Program) -> list[int]:
    """Give the ports at which a client takes connections, in the order of its doors."""
    [listening] = happened(program, "listening")
    ports: list[int] = listening["ports"]
    return ports

"""Programs that are not ours, run inside a pod: how they start, what they say, how they end."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT

import trio

from tests.support.envoy_config import Credentials
from ztunnel.devmesh.cluster import Member
from ztunnel.devmesh.node_proxy import LogLines

INSTALLED = Path(__file__).parents[2] / ".peers"
# Each needs well under a second on an idle machine; a shared one with two cores may be far from it.
START_SECONDS = 20
STOP_SECONDS = 5
READ_BYTES = 65_536
LINES_SHOWN = 40


class ProgramError(Exception):
    """A program is not there, did not start, or failed; the message has its last words."""


@dataclass(frozen=True, slots=True)
class Program:
    """A running program; `lines` are what it writes to standard output and standard error."""

    name: str
    process: trio.Process
    lines: LogLines = field(default_factory=LogLines)
    silent: trio.Event = field(default_factory=trio.Event)  # nothing more will be written

    async def finished(self, *, seconds: float = START_SECONDS) -> list[str]:
        """Wait until it ends by itself; give all it said.

        Raises:
            ProgramError: it failed, or did not end in time.
        """
        with trio.move_on_after(seconds):
            await self.process.wait()
            await self.silent.wait()
        if self.process.returncode != 0:
            raise ProgramError(self.last_words())
        return self.lines.all

    def last_words(self) -> str:
        """Say how it ended, if it has, and what it said last."""
        tail = self.lines.all[-LINES_SHOWN:]
        return "\n".join([f"{self.name}: exit status {self.process.returncode}", *tail])

    async def read(self) -> None:
        """Collect what it says until it ends."""
        stdout = self.process.stdout
        assert stdout is not None
        try:
            async with stdout:
                while data := await stdout.receive_some(READ_BYTES):
                    self.lines.feed(bytes(data))
        finally:
            self.lines.end()
            self.silent.set()


@asynccontextmanager
async def running_program(
    member: Member, *words: str, ready: str = "", environment: Mapping[str, str] | None = None
) -> AsyncIterator[Program]:
    """Run a program inside a namespace until the block ends; print its last words if that fails.

    Begins the block once the program has written a line that holds `ready`, if that is not empty.

    Raises:
        ProgramError: it ended, or did not say that within START_SECONDS.
    """
    process = await trio.lowlevel.open_process(
        member.command(*words),
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=STDOUT,
        env={**os.environ, **(environment or {})},
    )
    program = Program(Path(words[0]).name, process)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(program.read)
            await _until_ready(program, ready)
            yield program
            nursery.cancel_scope.cancel(reason="the test is over")
    except BaseException:
        print(program.last_words())  # noqa: T201 - pytest shows it with the failure
        raise
    finally:
        with trio.CancelScope(shield=True):
            await _stop(process)


async def _until_ready(program: Program, ready: str) -> None:
    if not ready:
        return
    try:
        await program.lines.wait_for(ready, seconds=START_SECONDS)
    except trio.TooSlowError:
        program.process.poll()
        raise ProgramError(f"did not start: {program.last_words()}") from None


async def _stop(process: trio.Process) -> None:
    if process.poll() is None:
        process.terminate()
    with trio.move_on_after(STOP_SECONDS):
        await process.wait()
        return
    process.kill()
    await process.wait()


@dataclass(frozen=True, slots=True)
class CredentialFiles:
    """Where a program finds its credentials; `both` is the chain and the key in one file."""

    chain: Path
    key: Path
    roots: Path
    both: Path

    @classmethod
    def write(cls, credentials: Credentials, folder: Path) -> CredentialFiles:
        """Write them for programs that can read nothing but files; only the owner may."""
        contents = {
            "chain": credentials.chain,
            "key": credentials.key,
            "roots": credentials.roots,
            "both": credentials.chain + credentials.key,
        }
        for name, content in contents.items():
            path = folder / f"{name}.pem"
            path.touch(mode=0o600)
            path.write_bytes(content)
        return cls(**{name: folder / f"{name}.pem" for name in contents})

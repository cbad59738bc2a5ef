"""The load generator: built from `load.c` by the system's compiler, run inside a pod."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import trio

from perf.track import Track
from ztunnel.devmesh.cluster import Member

SOURCE = Path(__file__).with_name("load.c")
FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror")
PATIENCE_SECONDS = 60.0


class LoadError(Exception):
    """The load could not be built or run, or what it ran against failed."""


def build(folder: Path) -> Path:
    """Build the load generator into `folder`; returns the program.

    Raises:
        LoadError: there is no C compiler, or it does not take the source.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        raise LoadError("needs a C compiler (Debian: apt-get install gcc libc6-dev)")
    program = folder / "load"
    done = subprocess.run(
        [compiler, *FLAGS, "-o", program, SOURCE], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise LoadError(f"{SOURCE.name} does not compile:\n{done.stderr}")
    return program


class Load:
    """Runs the built program inside a track's client pod."""

    def __init__(self, program: Path) -> None:
        self.program = program

    async def run(
        self, member: Member, words: Sequence[str], ends: Sequence[Sequence[int]] = ()
    ) -> dict[str, Any]:
        """Run one load to its end; returns what it measured, `cpu` for each of `ends`.

        An end is the processes there, of which the CPU is added up.

        Raises:
            LoadError: a connection broke, or nothing came back in time.
        """
        pids = [str(pid) for end in ends for pid in end]
        command = member.command(str(self.program), *words, *pids)
        with trio.move_on_after(PATIENCE_SECONDS):
            done = await trio.run_process(
                command, capture_stdout=True, capture_stderr=True, check=False
            )
            if done.returncode:
                said = done.stderr.decode(errors="replace").strip()
                raise LoadError(f"{' '.join(words)}: {said or done.returncode}")
            found: dict[str, Any] = json.loads(done.stdout)
            used = iter(found["cpu"])
            return {**found, "cpu": [sum(islice(used, len(end))) for end in ends]}
        raise LoadError(f"{' '.join(words)}: nothing within {PATIENCE_SECONDS:g} s")

    @asynccontextmanager
    async def held(
        self, track: Track, target: Sequence[str], count: int, *, sources: bool
    ) -> AsyncIterator[None]:
        """Hold `count` idle connections during the block; `sources`: each from another address.

        Raises:
            LoadError: one could not be opened.
        """
        first = str(track.next_source) if sources else "-"
        track.take_sources(count if sources else 0)
        words = ("hold", *target, str(count), first)
        process = await trio.lowlevel.open_process(
            track.client.command(str(self.program), *words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            answer = b""
            with trio.move_on_after(PATIENCE_SECONDS):
                answer = bytes(await process.stdout.receive_some())
            if not answer:
                raise LoadError(f"{' '.join(words)}: a connection broke, or it took too long")
            yield
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
                await process.stdin.aclose()
                await process.stdout.aclose()

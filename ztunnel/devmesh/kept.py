"""A mesh that stays up after the tour: a process in the background that holds it.

How it works: `start` runs the demo once more as a process of its own session, passes on what it
prints until the verdict, and leaves it running. That process writes its pid to a file in `/run`,
and `take_down` ends it; then the names it may have left are swept.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from ztunnel.devmesh.cluster import sweep
from ztunnel.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ztunnel.devmesh.mesh import DevMesh

BACKGROUND = "--in-background"  # said by us to ourselves only
DEFAULT_PREFIX = "ztdemo"
RUN_FOLDER = Path("/run")
DOWN_SECONDS = 15.0
END_OF_OUTPUT = "(kept)"


def pid_file(prefix: str) -> Path:
    """Name the file that says who holds a kept mesh."""
    return RUN_FOLDER / f"{prefix}.pid"


def down_command(prefix: str) -> str:
    """Say how to remove a kept mesh."""
    return "ztunnel demo --down" + ("" if prefix == DEFAULT_PREFIX else f" --name {prefix}")


def start(prefix: str, *, say: Callable[[str], None]) -> int:
    """Run the tour in the background, print what it prints, and leave the mesh up."""
    if holder(prefix) is not None:
        raise ConfigError(
            f"a mesh of that name is kept already; remove it with: {down_command(prefix)}"
        )
    sweep(prefix)
    process = subprocess.Popen(
        [sys.executable, "-m", "ztunnel", "demo", "--keep", "--name", prefix, BACKGROUND],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.strip() == END_OF_OUTPUT:
                return 0
            say(line.rstrip("\n"))
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        return 130


async def stay(prefix: str, mesh: DevMesh) -> None:
    """Say how to look around, then hold the mesh until told to end."""
    path = pid_file(prefix)
    handle = path.open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        handle.write(str(os.getpid()))
        handle.flush()
        print("\nThe mesh stays up. Enter a pod with, for example:")
        for name in mesh.pods:
            print(f"  nsenter --net=/run/netns/{prefix}-{name} ip addr")
        print("Look at a node's proxy:")
        for name in mesh.nodes:
            print(f"  nsenter --net=/run/netns/{prefix}-{name} curl localhost:15000/config_dump")
        print(f"Remove it with:\n  {down_command(prefix)}")
        print(END_OF_OUTPUT, flush=True)
        silence()
        await trio.sleep_forever()
    finally:
        path.unlink(missing_ok=True)
        handle.close()


def silence() -> None:
    """Let go of the terminal that started us."""
    with open(os.devnull, "r+b") as nothing:  # noqa: PTH123 - a descriptor is what is wanted
        for fd in (1, 2):
            os.dup2(nothing.fileno(), fd)


def holder(prefix: str) -> int | None:
    """Return the pid of the process that keeps a mesh, None if there is none."""
    try:
        with pid_file(prefix).open() as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(handle.read() or 0) or None
    except (FileNotFoundError, ValueError):
        pass
    return None


def end(pid: int, *, say: Callable[[str], None]) -> None:
    """Ask a process to end and wait for that; kill it if it takes too long."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(process, signal.SIGTERM)
        ended, _, _ = select.select([process], [], [], DOWN_SECONDS)
        if not ended:
            say(f"process {pid} does not end; killing it")
            signal.pidfd_send_signal(process, signal.SIGKILL)
    finally:
        os.close(process)


def take_down(prefix: str, *, say: Callable[[str], None]) -> int:
    """Remove a kept mesh, also one whose process was killed."""
    pid = holder(prefix)
    if pid is not None:
        end(pid, say=say)
    left = sweep(prefix)
    pid_file(prefix).unlink(missing_ok=True)
    if pid is None and not left:
        say("nothing to remove: no mesh is kept")
    say("verdict: removed")
    return 0

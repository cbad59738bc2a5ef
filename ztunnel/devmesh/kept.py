"""A mesh that stays up after the tour: a process in the background that holds it.

How it works: `start` runs the demo once more as a process of its own session, passes on what it
prints until the verdict, and leaves it running. That process writes its pid to a file in `/run`,
and `take_down` ends it; then the names it may have left are swept.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from ztunnel.devmesh.cluster import sweep
from ztunnel.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ztunnel.devmesh.mesh import DevMesh

BACKGROUND = "--in-background"  # said by us to ourselves only
DEFAULT_PREFIX = "ztdemo"
RUN_FOLDER = Path("/run")
CALL = "http://10.96.0.10/"  # the VIP of the service cart
CONFIG_DUMP = "http://localhost:15000/config_dump"
METRICS = "http://localhost:15020/metrics"
SHOW = "from urllib.request import urlopen as get;"
DOWN_SECONDS = 15.0
END_OF_OUTPUT = "(kept)"


def pid_file(prefix: str) -> Path:
    """Name the file that says who holds a kept mesh."""
    return RUN_FOLDER / f"{prefix}.pid"


def down_command(prefix: str) -> str:
    """Say how to remove a kept mesh."""
    command = Path(sys.executable).with_name("ztunnel")
    program = str(command) if command.exists() else "ztunnel"
    return f"{program} demo --down" + ("" if prefix == DEFAULT_PREFIX else f" --name {prefix}")


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
            if line.startswith(END_OF_OUTPUT):
                return int(line.removeprefix(END_OF_OUTPUT))
            say(line.rstrip("\n"))
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        say("verdict: interrupted; everything was removed")
        return 130


@contextlib.contextmanager
def holding(prefix: str) -> Iterator[None]:
    """Be the one who keeps the mesh of this name, from before it is built.

    Raises:
        ConfigError: somebody else is.
    """
    path = pid_file(prefix)
    handle = path.open("a")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise ConfigError(
            f"a mesh of that name is kept already; remove it with: {down_command(prefix)}"
        ) from None
    try:
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        handle.close()


async def stay(prefix: str, mesh: DevMesh, *, status: int) -> None:
    """Say how to look around, then hold the mesh until told to end; `status` is the tour's."""
    print("\nThe mesh stays up, and its applications answer. Call one as the pod web does:")
    enter = f"nsenter --net=/run/netns/{prefix}"
    print(f"  {enter}-web {show_url(CALL)}")
    print("Enter a pod:")
    for name in mesh.pods:
        print(f"  {enter}-{name} ip addr")
    print("Look at a node's proxy, its metrics, its log:")
    for name in mesh.nodes:
        print(f"  {enter}-{name} {show_url(CONFIG_DUMP)}")
        print(f"  {enter}-{name} {show_url(METRICS)}")
    for path in write_logs(mesh):
        print(f"  tail -f {path}")
    print(f"Policies are in {mesh.path}; what you write there takes effect at once.")
    print(f"Remove it with:\n  {down_command(prefix)}")
    print(f"{END_OF_OUTPUT} {status}", flush=True)
    silence()
    await trio.sleep_forever()


def show_url(url: str) -> str:
    """Give a command that shows what is at a URL, on any machine that we run on."""
    return f"{sys.executable} -c '{SHOW} print(get(\"{url}\").read().decode())'"


def write_logs(mesh: DevMesh) -> list[Path]:
    """Write what the node proxies say to files from now on, with what they have said so far."""
    paths = []
    for name, proxy in mesh.proxies.items():
        path = mesh.path.with_name(f"{name}.log")
        paths.append(path)
        proxy.lines.write_to(path)
    return paths


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
    left += end_orphans(prefix)
    if pid is None and not left:
        say("verdict: nothing to remove: no mesh of that name is kept")
    else:
        say("verdict: removed")
    return 0


def end_orphans(prefix: str) -> list[str]:
    """Kill node proxies whose demo was killed, and remove its folder; returns what was removed."""
    folders = f"INPOD_UDS={tempfile.gettempdir()}/{prefix}-"
    removed = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environ = (process / "environ").read_bytes().decode("utf-8", "replace").split("\0")
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue  # it has ended meanwhile
        socket = next((one for one in environ if one.startswith(folders)), None)
        if socket is None or parent != 1:
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process.name), signal.SIGKILL)
        folder = Path(socket.partition("=")[2]).parent
        shutil.rmtree(folder, ignore_errors=True)
        removed.append(str(folder))
    return removed

"""`ztunnel demo` as a newcomer runs it: it holds, it leaves nothing, also when interrupted."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import trio

pytestmark = pytest.mark.netns

SECONDS = 60  # generous: the machine is shared
ASK_READY = (
    "import urllib.request as r;"
    "print(r.urlopen('http://127.0.0.1:15021/healthz/ready').read().decode(), end='')"
)
COMMAND = (sys.executable, "-m", "ztunnel", "demo")


def leftovers(group: int) -> list[str]:
    """Processes of a demo's session, and its folders and names."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/environ"):
        try:
            environ = stat.read_bytes()
        except OSError:
            continue
        if f"ZTUNNEL_TEST_MARK={group}".encode() in environ:
            found.append(stat.parent.name)
    return found


async def run_demo(*options: str, mark: int, end: signal.Signals | None = None) -> tuple[int, str]:
    """Run the demo; with `end`, send that as soon as the mesh is being built."""
    process = await trio.lowlevel.open_process(
        [*COMMAND, *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "ZTUNNEL_TEST_MARK": str(mark)},
        start_new_session=True,
    )
    output = b""
    assert process.stdout is not None
    with trio.fail_after(SECONDS):
        async for chunk in process.stdout:
            output += chunk
            if end is not None and b"Building" in output:
                process.send_signal(end)
                end = None
        return await process.wait(), output.decode()


async def test_every_expectation_holds_and_a_second_run_finds_a_clean_machine() -> None:
    for _ in range(2):
        status, output = await run_demo(mark=os.getpid())
        assert status == 0, output
        assert output.splitlines()[-1].startswith("verdict: all 14 expectations held")
        assert "FAIL" not in output
        assert "\x1b" not in output
        assert leftovers(os.getpid()) == []


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_an_interrupted_demo_leaves_nothing(end: signal.Signals) -> None:
    mark = os.getpid() * 100 + end
    status, output = await run_demo(mark=mark, end=end)
    assert status == 130, output
    assert output.splitlines()[-1] == "verdict: interrupted; everything was removed"
    assert leftovers(mark) == []


async def test_a_kept_mesh_stays_until_it_is_taken_down() -> None:
    name = f"keep{os.getpid()}"
    status, output = await run_demo("--keep", "--name", name, mark=0)
    try:
        assert status == 0, output
        assert f"nsenter --net=/run/netns/{name}-web" in output
        assert Path(f"/run/netns/{name}-node-b").exists()
        again, complaint = await run_demo("--keep", "--name", name, mark=0)
        assert again == 1
        assert f"ztunnel demo --down --name {name}" in complaint
        ready = await trio.run_process(
            ["nsenter", f"--net=/run/netns/{name}-node-a", sys.executable, "-c", ASK_READY],
            capture_stdout=True,
        )
        assert ready.stdout == b"ready\n"
        [line] = [line for line in output.splitlines() if "http://10.96.0.10/" in line]
        called = await trio.run_process(shlex.split(line), capture_stdout=True)
        assert b"caller=10.244.1.10" in called.stdout
    finally:
        with trio.CancelScope(shield=True):
            status, output = await run_demo("--down", "--name", name, mark=0)
    assert output.splitlines()[-1] == "verdict: removed"
    assert not list(Path("/run").glob(f"{name}*"))
    assert not list(Path("/run/netns").glob(f"{name}*"))
    assert not list(Path(tempfile.gettempdir()).glob(f"{name}*"))


async def test_what_a_killed_demo_left_is_taken_down() -> None:
    name = f"killed{os.getpid()}"
    status, output = await run_demo("--keep", "--name", name, mark=0)
    assert status == 0, output
    os.kill(int(Path(f"/run/{name}.pid").read_text()), signal.SIGKILL)
    status, output = await run_demo("--down", "--name", name, mark=0)
    assert output.splitlines()[-1] == "verdict: removed"
    assert not list(Path("/run").glob(f"{name}*"))
    assert not list(Path("/run/netns").glob(f"{name}*"))
    assert not list(Path(tempfile.gettempdir()).glob(f"{name}*"))
    status, output = await run_demo("--down", "--name", name, mark=0)
    assert "nothing to remove" in output


async def test_an_unknown_option_is_named() -> None:
    status, output = await run_demo("--fast", mark=os.getpid())
    assert status == 2
    assert "unrecognized arguments: --fast" in output

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys

import pytest

CHILD = """
import sys, time
from ztunnel.linux.parent import die_with_parent
if sys.argv[1] == "bound":
    die_with_parent()
print("up", flush=True)
time.sleep(30)
"""
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}, sys.argv[1]])
print(child.pid, flush=True)
time.sleep(30)
"""


@pytest.mark.parametrize(("bond", "patience_ms"), [("bound", 10_000), ("free", 200)])
def test_a_bound_process_dies_with_its_parent_and_another_does_not(
    bond: str, patience_ms: int
) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, bond], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    said = sorted(parent.stdout.readline().strip() for _ in range(2))  # in either order
    assert said[1] == "up"
    child = os.pidfd_open(int(said[0]))
    ended = select.poll()
    ended.register(child, select.POLLIN)
    try:
        parent.kill()
        parent.wait()
        assert bool(ended.poll(patience_ms)) == (bond == "bound")
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(child, signal.SIGKILL)
        os.close(child)
        parent.stdout.close()

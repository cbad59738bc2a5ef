from __future__ import annotations

import subprocess
import sys


def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cni.agent", "help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout.startswith("usage: ztunnel-cni-agent")
    assert done.stderr == ""

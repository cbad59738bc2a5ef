from __future__ import annotations

import subprocess
import sys

from ztunnel.cli.worker import NOT_BY_HAND


def test_nobody_starts_a_worker_by_hand() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ztunnel", "worker"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, NOT_BY_HAND)

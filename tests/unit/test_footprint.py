"""What a proxy loads that serves pods and nothing else: modules are most of its memory."""

from __future__ import annotations

import subprocess
import sys

# What an operator must turn on, or ask for, and what libraries bring that is not needed.
LATE = {
    "dns",
    "grpc",
    "importlib.metadata",
    "pyroute2",
    "ztunnel.devmesh",
    "ztunnel.dns",
    "ztunnel.workers.pool",
}


def test_the_proxy_starts_without_what_was_not_asked_for() -> None:
    program = "import sys, ztunnel.cli.proxy; print(*sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    loaded = ran.stdout.split()
    assert "ztunnel.app" in loaded
    early = {name for late in LATE for name in loaded if f"{name}.".startswith(f"{late}.")}
    assert early == set()

"""What stopped a start, said to whoever started us."""

from __future__ import annotations

import sys

from ztunnel.telemetry.log import PIPELINE


def complain(error: BaseException) -> int:
    """Say what stopped the start, a line for each problem; give the exit status."""
    PIPELINE.writer.flush(1.0)
    for line in str(error).splitlines():
        sys.stderr.write(f"ztunnel: {line}\n")
    return 1

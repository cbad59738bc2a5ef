"""Become another program inside a network namespace: `exec_in.py <namespace> <program> [argument]`.

Run by path and with the standard library only, so that it starts fast and imports nothing of ours.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence

CLONE_NEWNET = 0x4000_0000  # linux/sched.h
CANNOT_RUN = 126  # as shells say it


def main(arguments: Sequence[str]) -> int:
    """Enter the namespace and become the program; returns only if that failed."""
    if len(arguments) < 2:  # noqa: PLR2004 - a namespace and a program
        print("usage: exec_in.py <namespace> <program> [argument ...]", file=sys.stderr)
        return CANNOT_RUN
    path, program = arguments[0], arguments[1]
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        print(f"exec_in: {exc}", file=sys.stderr)
        return CANNOT_RUN
    if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET) != 0:
        print(f"exec_in: setns: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        return CANNOT_RUN
    try:
        os.execvp(program, list(arguments[1:]))  # noqa: S606 - becoming it is the purpose
    except OSError as exc:
        print(f"exec_in: {program}: {exc.strerror}", file=sys.stderr)
    return CANNOT_RUN


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

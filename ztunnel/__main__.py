"""The command `ztunnel`, also as `python -m ztunnel`."""

from __future__ import annotations

import os
import sys

from ztunnel.cli.main import main as run_command

INTERRUPTED = 130  # as shells say it: 128 and the number of SIGINT
PIPE_BROKEN = 141


def main() -> None:
    """Run the command line and exit with its status."""
    if sys.stdout is None:  # started without one, as by `>&-`
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    try:
        sys.exit(run_command(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has left, as `| head` does; nothing is left to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(PIPE_BROKEN)


if __name__ == "__main__":
    main()

"""The command `ztunnel-cni-agent`, also as `python -m cni.agent`."""

from __future__ import annotations

import sys

from cni.agent.cli import environment, main as run_command

INTERRUPTED = 130  # as shells say it: 128 and the number of SIGINT


def main() -> None:
    """Run the command line and exit with its status."""
    try:
        sys.exit(run_command(sys.argv[1:], environment()))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()

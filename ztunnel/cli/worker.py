"""`ztunnel worker`: the data path of a node proxy that has several; its parent starts it."""

from __future__ import annotations

import signal
import socket
import sys

import trio

from ztunnel.cli.complaint import complain
from ztunnel.errors import ConfigError, PeerError, first
from ztunnel.linux.parent import die_with_parent
from ztunnel.workers.worker import run_worker

LINK_FD = 0  # standard input
NOT_BY_HAND = "ztunnel worker: started by `ztunnel proxy` itself, see ZTUNNEL_WORKER_THREADS\n"


def run_worker_process() -> int:
    """Run a worker to its end; 0 when its parent is done with it, 1 if something is wrong."""
    # The terminal and the service manager signal a whole group: the parent says what to do.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        sock = socket.socket(fileno=LINK_FD)
    except OSError:
        sock = None
    if sock is None or sock.family != socket.AF_UNIX:
        sys.stderr.write(NOT_BY_HAND)
        return 1
    die_with_parent()
    status = 0
    try:
        trio.run(run_worker, sock)
    except* (ConfigError, PeerError) as group:
        status = complain(first(group))
    return status

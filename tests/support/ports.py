"""Ports for programs that must be told their port before they bind it.

Whoever can bind port 0 should. The others get a port that no parallel test process uses: it lies
below the kernel's ephemeral range, and an abstract Unix socket named after it is the lock.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

# Linux hands out 32768 and up by itself (net.ipv4.ip_local_port_range); 15xxx are the mesh's own.
LOWEST, HIGHEST = 20_000, 32_767
ATTEMPTS = 1_000


@contextmanager
def claimed_port(host: str = "127.0.0.1") -> Iterator[int]:
    """Give a TCP port of `host` that nobody listens on; it is ours until the block ends.

    Raises:
        OSError: no free port was found.
    """
    with socket.socket(socket.AF_UNIX) as lock:
        port = _lock_one(lock, host)
        yield port


@contextmanager
def claimed_ports(count: int, host: str = "127.0.0.1") -> Iterator[list[int]]:
    """Give `count` different ports, as `claimed_port` does."""
    with ExitStack() as held:
        yield [held.enter_context(claimed_port(host)) for _ in range(count)]


def _lock_one(lock: socket.socket, host: str) -> int:
    # The seed that makes a test run repeatable would make parallel runs collide.
    dice = random.SystemRandom()
    for port in dice.sample(range(LOWEST, HIGHEST + 1), ATTEMPTS):
        if not _is_free(host, port):
            continue
        with suppress(OSError):  # another test process holds this port
            lock.bind(f"\0ztunnel-test-port-{port}")
            return port
    raise OSError(f"no free port on {host} after {ATTEMPTS} attempts")


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True

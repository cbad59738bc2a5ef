"""Sockets and listings inside network namespaces, for tests that build their own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from ztunnel.devmesh.cluster import Member
from ztunnel.linux import sockopt
from ztunnel.linux.netns import PodNetns
from ztunnel.model.network import Endpoint

DEADLINE_SECONDS = 5.0

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs CAP_SYS_ADMIN")
needs_nft = pytest.mark.skipif(shutil.which("nft") is None, reason="needs the nft program")


def open_descriptors() -> int:
    """Count the descriptors of this process, to see that none leaked."""
    PodNetns.open("/proc/self/ns/net").close()  # The first one opens another, kept for good.
    return len(list(Path("/proc/self/fd").iterdir()))


def listen(netns: PodNetns, port: int, *, host: str = "::", mark: int = 0) -> socket.socket:
    """Listen inside a namespace; the default host takes both families."""

    def make() -> socket.socket:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if mark:
            sockopt.set_mark(sock, mark)
        sock.bind((host, port))
        sock.listen()
        sock.settimeout(DEADLINE_SECONDS)
        return sock

    return netns.call(make)


def connect(
    netns: PodNetns, host: str, port: int, *, mark: int = 0, source: str | None = None
) -> socket.socket:
    """Connect from inside a namespace, with another's address if `source` says so.

    An address of a link ends in `%` and the number that the link has inside.
    """

    def make() -> socket.socket:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.settimeout(DEADLINE_SECONDS)
        if mark:
            sockopt.set_mark(sock, mark)
        return sock

    sock = netns.call(make)
    try:
        if source:
            sockopt.bind_as(sock, Endpoint.of((source, 0)).ip)
        bare, _, link = host.partition("%")
        sock.connect((bare, port, 0, int(link)) if link else (host, port))
    except OSError:
        sock.close()
        raise
    return sock


def accept(listener: socket.socket) -> socket.socket:
    """Accept the next connection, which must come soon."""
    sock, _ = listener.accept()
    sock.settimeout(DEADLINE_SECONDS)
    return sock


def echoed(client: socket.socket, server: socket.socket) -> bool:
    """Whether bytes arrive in both directions."""
    client.sendall(b"ping")
    if server.recv(16) != b"ping":
        return False
    server.sendall(b"pong")
    return client.recv(16) == b"pong"


def output_of(member: Member, *words: str, stdin: str = "") -> str:
    """Run a program inside and return what it printed."""
    done = subprocess.run(
        member.command(*words), input=stdin, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def ruleset(member: Member) -> list[object]:
    """List the packet filter rules of a namespace, without handles, as nft reads them."""
    listing = json.loads(output_of(member, "nft", "-j", "list", "ruleset"))["nftables"]
    return [_without_handles(entry) for entry in listing if "metainfo" not in entry]


def _without_handles(entry: object) -> object:
    if isinstance(entry, dict):
        if set(entry) == {"packets", "bytes"}:
            return {}
        return {key: _without_handles(value) for key, value in entry.items() if key != "handle"}
    if isinstance(entry, list):
        return [_without_handles(value) for value in entry]
    return entry

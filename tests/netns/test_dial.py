"""Connects that a router on this machine answers with "unreachable"."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.support.tunnels import Heard, a_reactor
from ztunnel.devmesh.cluster import Cluster, Pod
from ztunnel.transport.dial import Dial

pytestmark = pytest.mark.netns

NOWHERE = "10.99.0.1"  # IPv6 does not tell us at all until it has tried twice


def syn_retries(pod: Pod) -> int:
    """How often the pod's kernel has repeated a SYN so far."""
    text = pod.netns.call(lambda: Path("/proc/thread-self/net/netstat").read_text())
    names, values = (line.split() for line in text.splitlines()[:2])
    return int(dict(zip(names, values, strict=True))["TCPSynRetrans"])


async def test_what_no_route_leads_to_ends_at_once_and_not_after_retries() -> None:
    with Cluster(f"zu{os.getpid()}") as cluster:
        node = cluster.add_node("node")
        pod = cluster.add_pod(node, "pod", "10.244.1.10")
        sock = pod.netns.call(socket.socket)
        sock.setblocking(False)
        sock.connect_ex((NOWHERE, 80))
        async with a_reactor() as reactor:
            heard = Heard()
            Dial(reactor, sock, heard)
            (error,) = await heard.until("on_unreachable")
        assert str(error) == "Network is unreachable (os error 101)"
        assert syn_retries(pod) == 0

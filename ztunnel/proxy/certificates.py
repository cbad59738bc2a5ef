"""Tunnels and the certificates they stand on: which to leave, drain or cut (dataplane.md 7.5).

A tunnel whose certificate was renewed or has expired gets no new streams and ends with its last
one; a tunnel to a peer whose certificate was taken back is cut at once, with all its streams.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import trio

from ztunnel.errors import RevokedError, TlsError
from ztunnel.identity.manager import Standing
from ztunnel.telemetry.log import get
from ztunnel.telemetry.traffic import Reporter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ztunnel.proxy.context import NodeContext
    from ztunnel.proxy.inbound import InboundTunnels
    from ztunnel.transport.pool import Pool
    from ztunnel.transport.tunnel import Tunnel

log = get("proxy")

# How often idle tunnels are looked at; busy ones are judged at each new stream anyway.
LOOK_SECONDS = 5.0
SLICE = 25  # tunnels judged before others get their turn: a fifth of a millisecond
REVOKED = "connection closed: peer certificate revoked by CRL"


def is_current(node: NodeContext, tunnel: Tunnel) -> bool:
    """Whether a tunnel of ours may carry a new stream.

    Revocation is asked here as well, for a tunnel that was being dialled while the lists changed.
    """
    facts, revocations = tunnel.facts, node.tls.revocations
    standing = node.certificates.standing(facts.certificate, facts.peer_not_after)
    if standing is not Standing.CURRENT:
        return False
    return revocations is None or revocations.revoked(facts.peer_links) is None


def count_untracked(node: NodeContext, tunnel: Tunnel, reporter: Reporter) -> None:
    """Count a new tunnel that no revocation list can find, as its peer is its own anchor."""
    if node.tls.revocations is not None and not tunnel.facts.peer_links:
        node.metrics.crl_untracked.count(reporter).add(1)


def refuse_expired(node: NodeContext, tunnel: Tunnel) -> None:
    """Close a new tunnel if its peer's certificate has expired, which no resumption notices.

    Raises:
        TlsError: it has.
    """
    facts = tunnel.facts
    standing = node.certificates.standing(facts.certificate, facts.peer_not_after)
    if standing is Standing.EXPIRED:
        error = TlsError("tls handshake error: certificate has expired")
        tunnel.close(error)
        raise error


def cut_if_revoked(node: NodeContext, tunnel: Tunnel, reporter: Reporter) -> None:
    """Close a tunnel whose peer's certificate has been taken back."""
    revocations = node.tls.revocations
    if tunnel.closed or revocations is None:
        return
    if revocations.revoked(tunnel.facts.peer_links) is None:
        return
    node.metrics.crl_rejections.count(reporter).add(1)
    log.info(
        "connection closed because the peer's certificate was revoked",
        peer=str(tunnel.facts.peer),
        address=str(tunnel.facts.remote),
        streams=len(tunnel.core.streams),
    )
    if reporter is Reporter.DESTINATION:
        tunnel.core.goaway()
    tunnel.close(RevokedError(REVOKED))


def watch_for_revocation(node: NodeContext, tunnel: Tunnel) -> Callable[[], None]:
    """Judge an outbound tunnel that no pool knows after each change; return how to stop that."""
    count_untracked(node, tunnel, Reporter.SOURCE)
    if node.tls.revocations is None:
        return lambda: None
    return node.tls.revocations.subscribe(lambda: cut_if_revoked(node, tunnel, Reporter.SOURCE))


class TunnelWarden:
    """Looks after the tunnels of one workload."""

    def __init__(self, node: NodeContext, pools: Sequence[Pool], inbound: InboundTunnels) -> None:
        self._node = node
        self._pools = pools
        self._inbound = inbound
        self._changed = trio.Event()

    async def run(self) -> None:
        """Judge after each change of the revocation lists, and from time to time; until cancelled.

        No tunnel is missed in between: lists are asked at the handshake, and what follows until the
        tunnel is known to its owner does not wait, but for a dial, which `is_current` covers.
        """
        revocations = self._node.tls.revocations
        with ExitStack() as undo:
            if revocations is not None:
                undo.callback(revocations.subscribe(self._on_change))
            while True:
                with trio.move_on_after(LOOK_SECONDS):
                    await self._changed.wait()
                if self._changed.is_set():
                    self._changed = trio.Event()
                    await self._cut_revoked()
                for pool in self._pools:
                    pool.leave_old()
                self._inbound.drain_old()

    def _on_change(self) -> None:
        self._changed.set()

    async def _cut_revoked(self) -> None:
        tunnels = [(Reporter.SOURCE, tunnel) for pool in self._pools for tunnel in pool.tunnels()]
        tunnels += [(Reporter.DESTINATION, tunnel) for tunnel in self._inbound.all()]
        for number, (reporter, tunnel) in enumerate(tunnels):
            if number % SLICE == SLICE - 1:
                await trio.lowlevel.checkpoint()
            cut_if_revoked(self._node, tunnel, reporter)

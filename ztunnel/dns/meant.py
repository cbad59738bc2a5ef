"""Which resolver a pod meant with a query that came to us (dns-and-observability.md 11.3).

How it works: connection tracking is asked, and what it says is remembered for a moment, as A and
AAAA come from one socket. That is safe: a flow stays in the table for at least a second after each
of its datagrams (nf_conntrack_udp_timeout, 30 by default, is in seconds), and while it is there no
other has its client and our address: the kernel gives a second one another source port. Only who
clears the table by hand could have one query, within that second, go to the other resolver.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from ztunnel.model.network import Endpoint
from ztunnel.telemetry.log import get

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ztunnel.linux.conntrack import Conntrack
    from ztunnel.transport.datagram import SocketAddress

log = get("dns")

REMEMBERED_SECONDS = 1.0
CLIENTS_MAX = 2048  # remembered; a client is a socket of the pod


class Meant:
    """Knows whom to ask for one pod; without connection tracking, only the `fallback`."""

    def __init__(self, table: Conntrack | None, fallback: Sequence[Endpoint]) -> None:
        """Own `table`."""
        self._table = table
        self._fallback = fallback
        self._known: dict[tuple[Endpoint, SocketAddress], Sequence[Endpoint]] = {}
        self._known_until = 0.0

    def servers_of_datagram(self, sender: SocketAddress, local: Endpoint) -> Sequence[Endpoint]:
        """Say whom to ask for what `sender` sent, and we got at `local`."""
        if self._table is None:
            return self._fallback
        now = trio.current_time()
        if now > self._known_until or len(self._known) >= CLIENTS_MAX:
            self._known.clear()
            self._known_until = now + REMEMBERED_SECONDS
        key = local, sender
        servers = self._known.get(key)
        if servers is None:
            try:
                meant = self._table.original_destination(client=Endpoint.of(sender), local=local)
            except OSError as error:
                log.warning("original destination of DNS queries is unknown", error=str(error))
                self.close()
                return self._fallback
            servers = self.servers(meant, local)
            if meant is not None:
                self._known[key] = servers
        return servers

    def servers(self, meant: Endpoint | None, local: Endpoint) -> Sequence[Endpoint]:
        """Choose whom to ask; what was sent to us by name was meant for nobody else."""
        return self._fallback if meant is None or meant == local else (meant,)

    def close(self) -> None:
        """Ask the table no more; more than once is fine."""
        if self._table is not None:
            self._table.close()
            self._table = None

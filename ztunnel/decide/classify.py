"""What an accepted connection is: one of ours, or a call to ourselves (dataplane.md 1.5)."""

from __future__ import annotations

from collections.abc import Container

from ztunnel.model.network import Endpoint, Port

OUTBOUND_PORT = Port(15001)
INBOUND_PLAINTEXT_PORT = Port(15006)
INBOUND_HBONE_PORT = Port(15008)
SOCKS5_PORT = Port(15080)

SELF_CALL = "attempted recursive call to ourselves"


def illegal_ports(*, has_socks5: bool) -> frozenset[Port]:
    """Return the ports nobody may be sent to: our own listeners inside the pod."""
    ports = {OUTBOUND_PORT, INBOUND_PLAINTEXT_PORT, INBOUND_HBONE_PORT}
    return frozenset(ports | {SOCKS5_PORT} if has_socks5 else ports)


def is_outbound_self_call(destination: Endpoint, illegal: Container[int]) -> bool:
    """Tell whether an outbound connection would come back to us: loopback and our port.

    To connect to no address at all is to connect to loopback; only SOCKS5 can ask for that.
    """
    here = destination.ip.is_loopback or destination.ip.is_unspecified
    return here and destination.port in illegal


def is_inbound_self_call(destination: Endpoint, illegal: Container[int]) -> bool:
    """Tell whether an inbound connection, at whatever address, would come back to us."""
    return destination.port in illegal

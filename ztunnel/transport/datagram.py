"""Sockets of the DNS proxy: datagrams that come in, and queries that go out (dns 2.1).

All are made in the pod's namespace with the proxy's mark, so that what goes out leaves from the
pod's address and is not redirected again.
"""

from __future__ import annotations

import errno
import os
import socket
from ipaddress import IPv6Address
from pathlib import Path
from typing import TYPE_CHECKING

from ztunnel.errors import ConfigError
from ztunnel.linux import sockopt
from ztunnel.model.network import Endpoint
from ztunnel.telemetry.log import get
from ztunnel.transport.reactor import READABLE

if TYPE_CHECKING:
    from collections.abc import Callable

    from ztunnel.transport.reactor import Reactor
    from ztunnel.transport.sockets import SocketFactory

log = get("transport")

DATAGRAM_TYPE = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
RECEIVE_BYTES = 65535
RECEIVE_BUFFER_BYTES = 1 << 20  # some 1000 queries may wait while the loop is busy
DATAGRAMS_PER_TURN = 64
_IPV6_SWITCH = Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6")

SocketAddress = tuple[str, int] | tuple[str, int, int, int]
"""What `recvfrom` gives and `sendto` takes."""


class DatagramListener:
    """A bound UDP socket in the reactor; every datagram goes to `received` with its sender."""

    __slots__ = ("_reactor", "_received", "here", "sock")

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        received: Callable[[DatagramListener, bytes, SocketAddress], None],
    ) -> None:
        self.sock = sock
        self.here = Endpoint.of(sock.getsockname())
        self._reactor = reactor
        self._received = received
        reactor.register(sock, self)

    def on_event(self, events: int) -> None:
        """Receive what waits, a bounded number per turn."""
        if not events & READABLE:
            return
        sock, received = self.sock, self._received
        for _ in range(DATAGRAMS_PER_TURN):
            if sock.fileno() < 0:
                return
            try:
                data, sender = sock.recvfrom(RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                log.debug("receive failed", error=str(error))
                continue
            received(self, data, sender)
        self._reactor.again(self)

    def send(self, data: bytes, receiver: SocketAddress) -> None:
        """Send one datagram, or lose it: whoever waits for it will ask again."""
        try:
            self.sock.sendto(data, receiver)
        except OSError as error:
            log.debug("send failed", error=str(error))

    def close(self) -> None:
        """Give the port back; more than once is fine."""
        if self.sock.fileno() >= 0:
            self._reactor.forget(self.sock)
            self.sock.close()

    def fail(self, error: Exception) -> None:
        """Carry on: one datagram must not close the door for all."""
        log.error("datagram was dropped", error=str(error))
        self._reactor.again(self)


def bind_datagram(sockets: SocketFactory, address: Endpoint) -> socket.socket:
    """Bind a UDP socket.

    Raises:
        ConfigError: the port is taken or may not be used; the message names address and cause.
    """
    try:
        sock = _create(sockets, address)
    except OSError as error:
        raise _cannot_bind(address, error) from error
    try:
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if sockets.port_reuse:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        sock.bind((str(address.ip), address.port))
    except OSError as error:
        sock.close()
        raise _cannot_bind(address, error) from error
    return sock


def connect_datagram(sockets: SocketFactory, server: Endpoint) -> socket.socket:
    """Make a UDP socket with a random port of its own that hears `server` only.

    Raises:
        OSError: no route, no descriptors.
    """
    sock = _create(sockets, server)
    try:
        sock.connect((str(server.ip), server.port))
    except OSError:
        sock.close()
        raise
    return sock


def dial_resolver(sockets: SocketFactory, server: Endpoint) -> socket.socket:
    """Begin to connect to a resolver by TCP; returns at once.

    It takes no `Permit`: policy judges who may call a workload, and a resolver is asked as the pod
    itself would have asked it.

    Raises:
        OSError: the kernel refused at once.
    """
    sock = sockets.create(_family(server))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    code = sock.connect_ex((str(server.ip), server.port))
    if code not in (0, errno.EINPROGRESS):
        sock.close()
        raise OSError(code, os.strerror(code))
    return sock


def loopback_has_ipv6(sockets: SocketFactory) -> bool:
    """Tell whether `::1` can be bound in the pod (dns 1); assumed if it cannot be read."""
    try:
        text = sockets.netns.call(_IPV6_SWITCH.read_text) if sockets.netns else _read_switch()
    except OSError as error:
        log.warning("failed to read whether loopback has IPv6", error=str(error))
        return True
    return text.strip() != "1"


def _read_switch() -> str:
    return _IPV6_SWITCH.read_text()


def _create(sockets: SocketFactory, address: Endpoint) -> socket.socket:
    family = _family(address)
    if sockets.netns is None:
        sock = socket.socket(family, DATAGRAM_TYPE)
    else:
        sock = sockets.netns.call(lambda: socket.socket(family, DATAGRAM_TYPE))
    try:
        if sockets.mark is not None:
            sockopt.set_mark(sock, sockets.mark)
    except OSError:
        sock.close()
        raise
    return sock


def _family(address: Endpoint) -> int:
    return socket.AF_INET6 if isinstance(address.ip, IPv6Address) else socket.AF_INET


def _cannot_bind(address: Endpoint, error: OSError) -> ConfigError:
    return ConfigError(f"failed to bind to address {address}: {error.strerror}")

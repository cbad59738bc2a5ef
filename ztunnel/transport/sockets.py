"""Sockets as one workload's proxy must make them (dataplane.md 1.2 and 1.4).

A factory knows the network namespace, the mark and the options; callers only say where to. Nothing
is dialled without a `Permit`: forgetting to ask policy is a type error, not an incident.
"""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import TYPE_CHECKING

from ztunnel.decide.authorize import Permit
from ztunnel.errors import ConfigError, PrivilegeError
from ztunnel.linux import sockopt
from ztunnel.model.network import ip_text
from ztunnel.telemetry.log import get

if TYPE_CHECKING:
    from ztunnel.linux.netns import PodNetns
    from ztunnel.linux.sockopt import KeepaliveSettings
    from ztunnel.model.network import Endpoint, IpAddress

log = get("transport")

LISTEN_BACKLOG = 4096
"""The reference uses 128; a burst of connects then meets SYN retries of a second and more."""

Socket = socket.socket
"""The type, for signatures elsewhere: only this floor makes sockets."""

STREAM_TYPE = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC


GONE = frozenset({errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN, errno.ESHUTDOWN})
"""How a peer that left shows itself; in an access log that is no failure (observability 8.4)."""


def local_pair() -> tuple[socket.socket, socket.socket]:
    """Make two connected sockets within this process, non-blocking."""
    return socket.socketpair(socket.AF_UNIX, STREAM_TYPE)


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketFactory:
    """Makes the sockets of one workload's proxy; `netns` None means our own namespace."""

    netns: PodNetns | None
    mark: int | None
    keepalive: KeepaliveSettings | None
    user_timeout: bool = False
    port_reuse: bool = True
    ipv6: bool = True

    def create(self, family: int) -> socket.socket:
        """Make a non-blocking, marked TCP socket in the workload's namespace.

        Raises:
            OSError: out of descriptors or memory, or the namespace is gone.
        """
        if self.netns is None:
            sock = socket.socket(family, STREAM_TYPE)
        else:
            sock = self.netns.call(lambda: socket.socket(family, STREAM_TYPE))
        try:
            if self.mark is not None:
                sockopt.set_mark(sock, self.mark)
        except OSError:
            sock.close()
            raise
        return sock

    def listen(self, port: int, *, transparent: bool | None, host: str = "") -> socket.socket:
        """Listen on `port` of the wildcard address, or of `host` if given.

        `transparent` is `ENABLE_ORIG_SRC`: True insists on IP_TRANSPARENT, None tries.

        Raises:
            ConfigError: the port is taken or may not be used; the message names address and cause.
        """
        ipv6 = self.ipv6 if not host else ":" in host
        sock = self.create(socket.AF_INET6 if ipv6 else socket.AF_INET)
        address = host or ("::" if ipv6 else "0.0.0.0")  # noqa: S104 - in the pod: its own traffic
        try:
            if ipv6 and not host:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            reuse = socket.SO_REUSEPORT if self.port_reuse else socket.SO_REUSEADDR
            sock.setsockopt(socket.SOL_SOCKET, reuse, 1)
            if transparent is not False:
                self._make_transparent(sock, required=transparent is True)
            self.tune(sock)  # Linux hands these options on to what is accepted
            sock.bind((address, port))
            sock.listen(LISTEN_BACKLOG)
        except OSError as error:
            sock.close()
            shown = f"[{address}]:{port}" if ipv6 else f"{address}:{port}"
            raise ConfigError(f"failed to bind to address {shown}: {error.strerror}") from error
        except PrivilegeError:
            sock.close()
            raise
        return sock

    def dial(
        self, permit: Permit, target: Endpoint, *, source: IpAddress | None = None
    ) -> socket.socket:
        """Begin to connect to `target`, speaking as `source` if given; returns at once.

        `permit` is what allows it; `target` is where that leads, which for a tunnel is its peer.

        Raises:
            OSError: the kernel refused at once (no route, no descriptors).
        """
        assert isinstance(permit, Permit)
        sock = self.create(
            socket.AF_INET6 if isinstance(target.ip, IPv6Address) else socket.AF_INET
        )
        try:
            self.tune(sock)
            # A source of the other family cannot be kept; the reference then fails the connection
            # (dataplane.md 17.22), we connect with the natural source.
            if source is not None and source != target.ip and source.version == target.ip.version:
                self._speak_as(sock, source)
            self._begin_connect(sock, target)
        except OSError:
            sock.close()
            raise
        return sock

    def tune(self, sock: socket.socket) -> None:
        """Set what every TCP socket of a proxy has."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # There is no urgent data in a tunnel: it travels as the ordinary byte that it is.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        if self.keepalive is not None:
            sockopt.set_keepalive(sock, self.keepalive)
            if self.user_timeout:
                sockopt.set_user_timeout(sock, self.keepalive.user_timeout_seconds)

    @staticmethod
    def _begin_connect(sock: socket.socket, target: Endpoint) -> None:
        code = sock.connect_ex((ip_text(target.ip), target.port))
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))

    @staticmethod
    def _speak_as(sock: socket.socket, source: IpAddress) -> None:
        try:
            sockopt.bind_as(sock, source)
        except OSError as error:
            # As the reference: better the natural source than no connection (1.4 step 3).
            log.warning("failed to keep the source address", source=str(source), error=str(error))

    @staticmethod
    def _make_transparent(sock: socket.socket, *, required: bool) -> None:
        try:
            sockopt.set_listener_transparent(sock)
        except OSError as error:
            if required:
                raise PrivilegeError(
                    f"ENABLE_ORIG_SRC=true needs CAP_NET_ADMIN for IP_TRANSPARENT: {error}"
                ) from error

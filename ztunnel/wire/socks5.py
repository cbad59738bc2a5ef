"""SOCKS5, as much as a proxy for one pod's own programs needs (RFC 1928; dataplane.md 5).

No authentication, CONNECT only. The success reply is sent when there is a connection, unlike the
reference's, which says so before it has tried.
"""

from __future__ import annotations

from enum import IntEnum
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final

from ztunnel.errors import PeerError
from ztunnel.model.network import Endpoint, HostPort, Port, canonical

if TYPE_CHECKING:
    from ztunnel.model.network import IpAddress

VERSION: Final = 5
NO_AUTHENTICATION: Final = 0
NOTHING_ACCEPTABLE: Final = 0xFF
CONNECT: Final = 1
GREETING_HEAD: Final = 2  # version, number of methods
REQUEST_HEAD: Final = 4  # version, command, reserved, address type
PORT_BYTES: Final = 2
MESSAGE_BYTES_MAX: Final = 2 + 255  # the longest greeting; a request is at most 262


class AddressType(IntEnum):
    """How the target is written."""

    IPV4 = 1
    NAME = 3
    IPV6 = 4


ADDRESS_BYTES: Final = {AddressType.IPV4: 4, AddressType.IPV6: 16}


class Reply(IntEnum):
    """What we answer to a request (RFC 1928 s6)."""

    SUCCEEDED = 0
    GENERAL_FAILURE = 1
    NOT_ALLOWED = 2
    HOST_UNREACHABLE = 4
    CONNECTION_REFUSED = 5
    UNSUPPORTED = 7


def reply(code: Reply) -> bytes:
    """Print a reply; the address in it means nothing to a client of ours."""
    return bytes((VERSION, code, 0, AddressType.IPV4)) + bytes(4 + PORT_BYTES)


class Socks5Server:
    """One handshake. Feed `receive`; `target` is set when the client has said where to."""

    __slots__ = ("_greeted", "_held", "_to_send", "rest", "target")

    def __init__(self) -> None:
        self.target: Endpoint | HostPort | None = None
        self.rest = b""  # what came behind the request
        self._held = b""
        self._to_send = b""
        self._greeted = False

    def receive(self, data: bytes) -> None:
        """Digest bytes, cut anywhere.

        Raises:
            PeerError: the client broke the protocol; send `data_to_send()` and close.
        """
        self._held += data
        if not self._greeted:
            self._read_greeting()
        if self._greeted and self.target is None:
            self._read_request()

    def data_to_send(self) -> bytes:
        """Take what must go to the client."""
        taken, self._to_send = self._to_send, b""
        return taken

    def _read_greeting(self) -> None:
        held = self._held
        if held and held[0] != VERSION:
            raise self._broken(f"not SOCKS5: version {held[0]}")
        if len(held) < GREETING_HEAD:
            return
        end = GREETING_HEAD + held[1]
        if end == GREETING_HEAD:
            raise self._broken("no authentication methods")
        if len(held) < end:
            return
        if NO_AUTHENTICATION not in held[GREETING_HEAD:end]:
            self._to_send += bytes((VERSION, NOTHING_ACCEPTABLE))
            raise PeerError("SOCKS5 client insists on authentication")
        self._greeted = True
        self._held = held[end:]
        self._to_send += bytes((VERSION, NO_AUTHENTICATION))

    def _read_request(self) -> None:
        held = self._held
        if len(held) < REQUEST_HEAD:
            return
        version, command, _, kind = held[:REQUEST_HEAD]
        if version != VERSION or command != CONNECT:
            raise self._broken(f"unsupported SOCKS5 request: version {version}, command {command}")
        size = self._address_bytes(kind)
        end = REQUEST_HEAD + size + PORT_BYTES
        if not size or len(held) < end:
            return
        address = held[REQUEST_HEAD : end - PORT_BYTES]
        port = Port(int.from_bytes(held[end - PORT_BYTES : end], "big"))
        self.target = self._target(kind, address, port)
        self.rest, self._held = held[end:], b""

    def _address_bytes(self, kind: int) -> int:
        """Return how long the address is; 0 if that has not come yet."""
        if kind == AddressType.NAME:
            if len(self._held) <= REQUEST_HEAD:
                return 0
            length = self._held[REQUEST_HEAD]
            if not length:
                raise self._broken("empty SOCKS5 host name")
            return 1 + length
        size = ADDRESS_BYTES.get(AddressType(kind)) if kind in ADDRESS_BYTES else None
        if size is None:
            raise self._broken(f"unknown SOCKS5 address type {kind}")
        return size

    def _target(self, kind: int, address: bytes, port: Port) -> Endpoint | HostPort:
        if kind == AddressType.NAME:
            try:
                name = address[1:].decode("utf-8")
            except UnicodeDecodeError:
                raise self._broken("SOCKS5 host name is not UTF-8") from None
            return HostPort(name, port)
        return Endpoint(_address(address), port)

    def _broken(self, why: str) -> PeerError:
        # 7 for every violation of the protocol, as the reference.
        self._to_send += reply(Reply.UNSUPPORTED)
        return PeerError(why)


def _address(packed: bytes) -> IpAddress:
    return canonical(ip_address(packed))

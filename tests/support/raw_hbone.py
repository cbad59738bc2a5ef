"""HTTP/2 frames made by hand, inside mutual TLS by Python's `ssl`: a peer that may say anything."""

from __future__ import annotations

import ssl
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

import trio
from h2.errors import ErrorCodes
from hpack import Decoder, Encoder

from tests.support.envoy_config import Credentials
from tests.support.programs import CredentialFiles

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADER_BYTES = 9
READ_BYTES = 65_536
MAX_STREAM_ID = 0x7FFF_FFFF
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
ACK = END_STREAM = 0x1
END_HEADERS, PADDED, PRIORITISED = 0x4, 0x8, 0x20
PROBE = b"so far!?"

Fields = list[tuple[str, str]]


class RawFrame(NamedTuple):
    """A frame as it came."""

    kind: int
    flags: int
    stream_id: int
    payload: bytes


def frame(
    kind: int, flags: int = 0, stream_id: int = 0, payload: bytes = b"", *, length: int = -1
) -> bytes:
    """Print a frame, also one that may not be; `length` is what it claims to have, if not -1."""
    size = len(payload) if length < 0 else length
    return size.to_bytes(3) + bytes([kind, flags]) + stream_id.to_bytes(4) + payload


def block(fields: Fields) -> bytes:
    """Print a header block that leaves nothing in the table, names exactly as given."""
    return Encoder().encode([(name, value, True) for name, value in fields], huffman=False)


def number(value: int) -> bytes:
    """Print what RST_STREAM and WINDOW_UPDATE carry."""
    return value.to_bytes(4)


def setting(code: int, value: int) -> bytes:
    """Print one entry of SETTINGS."""
    return code.to_bytes(2) + value.to_bytes(4)


class RawPeer:
    """One end of a connection; it answers nothing by itself."""

    def __init__(self, tls: trio.SSLStream[trio.SocketStream]) -> None:
        self._tls = tls
        self._buffer = bytearray()
        self._decoder = Decoder()

    @classmethod
    async def connect(cls, stream: trio.SocketStream, context: ssl.SSLContext) -> Self:
        """Shake hands as client; the preface is not sent."""
        tls = trio.SSLStream(stream, context, https_compatible=True)
        await tls.do_handshake()
        return cls(tls)

    @classmethod
    async def accept(cls, stream: trio.SocketStream, context: ssl.SSLContext) -> Self:
        """Shake hands as server and read the client's preface."""
        tls = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
        await tls.do_handshake()
        peer = cls(tls)
        assert await peer._read(len(PREFACE)) == PREFACE
        return peer

    async def send(self, data: bytes) -> None:
        """Send bytes; a peer that has gone meanwhile is no error, for it may have said why."""
        with suppress(trio.BrokenResourceError):
            await self._tls.send_all(data)

    async def frame(self) -> RawFrame | None:
        """Wait for the next frame; None at the end, or after a reset."""
        head = await self._read(HEADER_BYTES)
        if not head:
            return None
        payload = await self._read(int.from_bytes(head[:3]))
        return RawFrame(head[3], head[4], int.from_bytes(head[5:]) & MAX_STREAM_ID, payload)

    async def until(self, kind: int) -> RawFrame:
        """Wait for a frame of a kind.

        Raises:
            AssertionError: the connection ended before.
        """
        while (each := await self.frame()) is not None:
            if each.kind == kind:
                return each
        raise AssertionError(f"no frame of kind {kind} came")

    async def verdict(self, data: bytes) -> str:
        """Send `data`, and say what the peer did about it before it answered a PING behind.

        One of: `GOAWAY <error>`, with the end of the connection behind it; `RST <error>`;
        `tolerated`; `closed`.
        """
        await self.send(data + frame(PING, payload=PROBE))
        found = ""
        while (each := await self.frame()) is not None:
            if each.kind == GOAWAY:
                found = f"GOAWAY {_error(each.payload[4:8])}"
            elif each.kind == RST_STREAM:
                found = found or f"RST {_error(each.payload)}"
            elif each.kind == PING and each.flags == ACK and each.payload == PROBE:
                return found or "tolerated"
        return found or "closed"

    def fields(self, payload: bytes) -> dict[str, str]:
        """Read the header block of a HEADERS frame; each must be read once and in order."""
        return {str(name): str(value) for name, value in self._decoder.decode(payload)}

    async def aclose(self) -> None:
        """Close without ceremony."""
        await trio.aclose_forcefully(self._tls)

    async def _read(self, size: int) -> bytes:
        """Read exactly that much; nothing if the connection ends before."""
        while len(self._buffer) < size:
            try:
                data = await self._tls.receive_some(READ_BYTES)
            except trio.BrokenResourceError:
                data = b""
            if not data:
                return b""
            self._buffer += data
        content = bytes(self._buffer[:size])
        del self._buffer[:size]
        return content


def client_context(credentials: Credentials, folder: Path) -> ssl.SSLContext:
    """Make what a client by hand shakes hands with; it takes any name of our authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    return _filled(context, credentials, folder)


def server_context(credentials: Credentials, folder: Path) -> ssl.SSLContext:
    """Make what a server by hand shakes hands with; it demands a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    return _filled(context, credentials, folder)


def _filled(context: ssl.SSLContext, credentials: Credentials, folder: Path) -> ssl.SSLContext:
    files = CredentialFiles.write(credentials, folder)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(files.chain, files.key)
    context.load_verify_locations(files.roots)
    return context


def _error(payload: bytes) -> str:
    return ErrorCodes(int.from_bytes(payload)).name

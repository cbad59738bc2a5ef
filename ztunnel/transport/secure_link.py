"""A TLS connection to a server that has a host name, as streams of plaintext.

How it works: the socket is ours and non-blocking, the records are the `ssl` module's. One task
receives and one sends; what either does with the records it does without waiting in between. What
takes long, the handshake and to open what came, is done in turns with connections (`pace`).
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import Final

import trio

from ztunnel.errors import TlsError, UnreachableError
from ztunnel.linux import sockopt
from ztunnel.model.settings import ServerUrl
from ztunnel.tls.context import ALPN
from ztunnel.tls.ssl_records import SslObjectRecords, describe_ssl_error
from ztunnel.transport.conversation import receive, send
from ztunnel.transport.pace import Pace

READ_BYTES: Final = 64 * 1024  # decrypted and walked over in a tenth of a millisecond
RECORD_BYTES: Final = 16 * 1024
HANDSHAKE_READ_BYTES: Final = 16 * 1024

# As the reference; a peer that is gone is found out by pings long before.
KEEPALIVE: Final = sockopt.KeepaliveSettings(idle_seconds=300, interval_seconds=75, retries=9)

# X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH
_NAME_MISMATCHES: Final = frozenset({62, 64})


class OtherNameError(TlsError):
    """The server can be trusted, but has another name."""


class SecureLink:
    """An established connection; the owner closes it."""

    def __init__(self, sock: socket.socket, records: SslObjectRecords, pace: Pace) -> None:
        self._sock = sock
        self._pace = pace
        self._records = records
        self._raw = memoryview(bytearray(READ_BYTES))
        self._plain = memoryview(bytearray(READ_BYTES + RECORD_BYTES))
        self._arrived: int | None = 0  # something may have come with the end of the handshake

    async def receive(self) -> memoryview:
        """Wait for plaintext; empty at the end. It is valid until the next call.

        Raises:
            UnreachableError: the connection broke.
            TlsError: the server broke TLS.
        """
        await trio.lowlevel.checkpoint()
        while not self._records.closed:
            if self._arrived is not None:
                # Who is cancelled while waiting for the turn leaves what came to the next call.
                with await self._pace.turn():
                    arrived, self._arrived = self._arrived, None
                    _, size = self._records.open(self._raw[:arrived], self._plain)
                if size:
                    return self._plain[:size]
            try:
                self._arrived = self._sock.recv_into(self._raw)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._sock)
                continue
            except OSError as error:
                raise UnreachableError(f"io error: {error.strerror}") from error
            if not self._arrived:
                break
        return self._plain[:0]

    async def send(self, data: bytes) -> None:
        """Send plaintext.

        Raises:
            UnreachableError: the connection broke.
            TlsError: the server broke TLS before.
        """
        try:
            await send(self._sock, self._records.seal_small(data))
        except OSError as error:
            raise UnreachableError(f"io error: {error.strerror}") from error

    def close(self, farewell: bytes = b"") -> None:
        """Close, after trying without waiting to say a last thing; may be repeated."""
        with contextlib.suppress(OSError, TlsError):
            self._sock.send(self._records.seal_small(farewell) + self._records.close_notify())
        self._sock.close()


async def open_link(
    server: ServerUrl, context: ssl.SSLContext, name: str, pace: Pace
) -> SecureLink:
    """Connect to a server, which must prove to be `name`; the caller sets the deadline.

    Raises:
        UnreachableError: its address is not known, or none of them answers.
        OtherNameError: its certificate is sound, but for another name.
        TlsError: it is not to be trusted, or speaks something else.
    """
    try:
        stream = await trio.open_tcp_stream(server.host, server.port)
    except OSError as error:
        raise UnreachableError(_reason(error)) from error
    sock = socket.socket(fileno=stream.socket.detach())
    try:
        sock.settimeout(0)
        sockopt.set_keepalive(sock, KEEPALIVE)
        return SecureLink(sock, await _shake_hands(sock, context, name, pace), pace)
    except OSError as error:
        sock.close()
        raise TlsError(f"tls handshake error: {error.strerror}") from error
    except BaseException:
        sock.close()
        raise


def _reason(error: OSError) -> str:
    """Say why no connection came about: trio groups what each address of a name said."""
    cause = error.__cause__
    each = cause.exceptions if isinstance(cause, ExceptionGroup) else (error,)
    return "; ".join(dict.fromkeys(getattr(one, "strerror", None) or str(one) for one in each))


async def _shake_hands(
    sock: socket.socket, context: ssl.SSLContext, name: str, pace: Pace
) -> SslObjectRecords:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname=name)
    while True:
        try:
            with await pace.turn():
                tls.do_handshake()
            break
        except ssl.SSLWantReadError:
            await send(sock, outgoing.read())
        except ssl.SSLError as error:
            with contextlib.suppress(OSError):
                sock.send(outgoing.read())  # the alert
            raise _judged(error, name) from error
        data = await receive(sock, HANDSHAKE_READ_BYTES)
        if not data:
            raise TlsError("tls handshake error: the server closed the connection")
        incoming.write(data)
    await send(sock, outgoing.read())
    if tls.selected_alpn_protocol() != ALPN:
        raise TlsError("tls handshake error: the server does not speak HTTP/2")
    return SslObjectRecords(tls, incoming, outgoing)


def _judged(error: ssl.SSLError, name: str) -> TlsError:
    text = f"tls handshake error: {describe_ssl_error(error)}"
    if isinstance(error, ssl.SSLCertVerificationError) and error.verify_code in _NAME_MISMATCHES:
        return OtherNameError(f"{text} (wanted {name})")
    return TlsError(text)

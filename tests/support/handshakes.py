"""A TLS handshake by a task, over a socket that stays the caller's: the far end of a test."""

from __future__ import annotations

import contextlib
import socket

from ztunnel.errors import TlsError
from ztunnel.tls.context import TlsContext
from ztunnel.tls.handshake import Established, Handshake
from ztunnel.transport.conversation import receive, send

READ_BYTES = 16 * 1024


async def secure(sock: socket.socket, context: TlsContext, *, server_side: bool) -> Established:
    """Shake hands.

    Raises:
        TlsError: the handshake failed or the peer left in the middle; an alert has been sent.
    """
    handshake = Handshake(context, server_side=server_side)
    data = b""
    try:
        while True:
            await send(sock, handshake.receive(data))
            if handshake.done:
                return handshake.finish()
            data = await _hear(sock)
    except TlsError:
        with contextlib.suppress(OSError):
            sock.send(handshake.data_to_send())
        raise
    except OSError as error:
        raise TlsError(f"tls handshake error: {error.strerror}") from error


async def _hear(sock: socket.socket) -> bytes:
    data = await receive(sock, READ_BYTES)
    if not data:
        raise TlsError("tls handshake error: peer closed the connection")
    return data

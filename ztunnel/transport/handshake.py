"""Driving a TLS handshake over a non-blocking socket; the caller sets the deadline."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

import trio

from ztunnel.errors import TlsError, UnreachableError
from ztunnel.tls.handshake import Handshake
from ztunnel.transport.conversation import receive, send

if TYPE_CHECKING:
    from collections.abc import Hashable

    from ztunnel.errors import PeerIdentityError
    from ztunnel.tls.context import TlsContext
    from ztunnel.tls.handshake import Established

READ_BYTES = 16 * 1024


async def secure(
    sock: socket.socket, context: TlsContext, *, server_side: bool, resume: Hashable = None
) -> Established:
    """Shake hands on a connected socket, which stays the caller's to close.

    `resume` names the peer whose last session may be resumed, if the context keeps any.

    Raises:
        TlsError: the handshake failed or the peer left in the middle; an alert has been sent.
    """
    handshake = Handshake(context, server_side=server_side, resume=resume)
    data = b""
    try:
        while True:
            await send(sock, handshake.receive(data))
            if handshake.done:
                return handshake.finish()
            data = await _hear(sock)
    except TlsError:
        # Best effort: the peer may be gone, and the error itself says what matters.
        with contextlib.suppress(OSError):
            sock.send(handshake.data_to_send())
        raise
    except OSError as error:
        raise TlsError(f"tls handshake error: {error.strerror}") from error


def refuse(
    sock: socket.socket, established: Established, error: PeerIdentityError, unsent: bytes = b""
) -> None:
    """Tell a peer by an alert that we do not like who it is, if it is to be told.

    `unsent` is what the handshake still owes it.
    """
    if error.code is not None:
        with contextlib.suppress(OSError):  # it may be gone already
            sock.send(unsent + established.records.alert(error.code))


async def _hear(sock: socket.socket) -> bytes:
    data = await receive(sock, READ_BYTES)
    if not data:
        raise TlsError("tls handshake error: peer closed the connection")
    return data


async def connected(sock: socket.socket) -> None:
    """Wait for a connect under way to end well.

    Raises:
        UnreachableError: it did not; the message is the kernel's.
    """
    await trio.lowlevel.wait_writable(sock)
    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise UnreachableError(f"{os.strerror(code)} (os error {code})")

"""One SEQPACKET message with at most one descriptor (cni.md 6.1).

A packet is a message. An empty packet cannot be told from the end of the stream, so none is sent.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from ztunnel.errors import PeerError

READ_BYTES = 1024  # What both reference ends read with; a longer message is an error.
FDS_MAX = 8  # Room for surplus descriptors, so that we see and close them.
ANCILLARY_BYTES = socket.CMSG_SPACE(FDS_MAX * array.array("i").itemsize)
# Close-on-exec from birth: another thread may start a process in between.
RECEIVE_FLAGS = getattr(socket, "MSG_CMSG_CLOEXEC", 0x4000_0000)

Ancillary = tuple[int, int, bytes]


@dataclass(frozen=True, slots=True)
class Message:
    """What one packet held; whoever gets it owns `fd`."""

    data: bytes
    fd: int | None = None


def ancillary(fd: int | None) -> list[Ancillary]:
    """Make the control message that carries `fd`; none for None."""
    if fd is None:
        return []
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]).tobytes())]


def unpack(data: bytes, control: Sequence[Ancillary], flags: int) -> Message | None:
    """Turn what `recvmsg` returned into a message; None is the end of the stream.

    Raises:
        PeerError: the packet or its descriptors did not fit, or there is more than one
            descriptor. All that arrived have been closed.
    """
    fds = [fd for entry in control for fd in descriptors(entry)]
    problem = _problem(data, fds, flags)
    if problem is not None:
        for fd in fds:
            os.close(fd)
        raise PeerError(problem)
    if not data:
        return None
    return Message(data, fds[0] if fds else None)


def check_size(data: bytes) -> None:
    """Refuse a message that the other end could not read.

    Raises:
        ValueError: it is empty or longer than `READ_BYTES`.
    """
    if not 0 < len(data) <= READ_BYTES:
        raise ValueError(f"a message has 1 to {READ_BYTES} bytes, not {len(data)}")


def send_message(sock: socket.socket, data: bytes, fd: int | None = None) -> None:
    """Send one packet; the caller keeps `fd`.

    Raises:
        ValueError: see `check_size`.
        OSError: the other end is gone, or its queue is full.
    """
    check_size(data)
    sock.sendmsg([data], ancillary(fd))


def receive_message(sock: socket.socket) -> Message | None:
    """Receive one packet; None is the end of the stream.

    Raises:
        PeerError: see `unpack`.
        OSError: the other end is gone.
    """
    data, control, flags, _ = sock.recvmsg(READ_BYTES, ANCILLARY_BYTES, RECEIVE_FLAGS)
    return unpack(data, control, flags)


def descriptors(entry: Ancillary) -> list[int]:
    """List the descriptors that a control message brought; whoever asks owns them."""
    level, kind, payload = entry
    if (level, kind) != (socket.SOL_SOCKET, socket.SCM_RIGHTS):
        return []
    fds = array.array("i")
    fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return fds.tolist()


def _problem(data: bytes, fds: list[int], flags: int) -> str | None:
    if flags & socket.MSG_TRUNC:
        return f"message longer than {READ_BYTES} bytes"
    if flags & socket.MSG_CTRUNC:
        return f"more than {FDS_MAX} descriptors, or too few free ones here"
    if len(fds) > 1:
        return f"{len(fds)} descriptors in one message"
    if fds and not data:
        return "a descriptor without a message"
    return None

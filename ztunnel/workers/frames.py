"""Frames on the link between the control process and a worker: bytes cut as the kernel likes.

A frame is its length, a flag that says whether a descriptor belongs to it, and its body. The kernel
delivers a descriptor no later than the first byte it was sent with, so the n-th descriptor belongs
to the n-th frame that claims one. No I/O here.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from ztunnel.errors import PeerError

HEADER = struct.Struct("!I?")  # bytes of the body, whether a descriptor comes with it
# A slice of the mesh's state is below 1 MiB; the largest message is a set of revocation lists.
BODY_BYTES_MAX = 64 * 1024 * 1024
DESCRIPTORS_MAX = 16  # received and not yet claimed; one is sent at a time


@dataclass(frozen=True, slots=True)
class Frame:
    """One message; whoever gets it owns `fd`."""

    body: bytes
    fd: int | None = None


def pack(body: bytes, *, has_fd: bool = False) -> bytes:
    """Make a frame's bytes; a descriptor must be sent with the first of them.

    Raises:
        ValueError: the body is too long for the other end.
    """
    if len(body) > BODY_BYTES_MAX:
        raise ValueError(f"a message of {len(body)} bytes; {BODY_BYTES_MAX} are the most")
    return HEADER.pack(len(body), has_fd) + body


class FrameReader:
    """Puts frames together again; after a PeerError it is of no further use but `close`."""

    def __init__(self, *, most: int = BODY_BYTES_MAX) -> None:
        """Refuse bodies above `most` bytes."""
        self._most = most
        self._data = bytearray()
        self._fds: deque[int] = deque()

    def receive(self, data: bytes, fds: Iterable[int] = ()) -> list[Frame]:
        """Take what came and give the frames that are complete.

        Raises:
            PeerError: a body is too long, or descriptors do not fit the frames; every descriptor
                not handed out has been closed.
        """
        self._data += data
        self._fds += fds
        frames: list[Frame] = []
        try:
            taken = self._take(frames)
        except PeerError:
            self._fds += [frame.fd for frame in frames if frame.fd is not None]
            self.close()
            raise
        del self._data[:taken]
        return frames

    def close(self) -> None:
        """Close the descriptors nobody claimed."""
        while self._fds:
            os.close(self._fds.popleft())

    def _take(self, frames: list[Frame]) -> int:
        """Append the complete frames; return how many bytes they were."""
        start = 0
        while len(self._data) - start >= HEADER.size:
            length, has_fd = HEADER.unpack_from(self._data, start)
            if length > self._most:
                raise PeerError(f"a message of {length} bytes; {self._most} are the most")
            end = start + HEADER.size + length
            if end > len(self._data):
                break
            if has_fd and not self._fds:
                raise PeerError("a message lacks its descriptor")
            fd = self._fds.popleft() if has_fd else None
            frames.append(Frame(bytes(self._data[start + HEADER.size : end]), fd))
            start = end
        if len(self._fds) > DESCRIPTORS_MAX:
            raise PeerError(f"{len(self._fds)} descriptors that belong to no message")
        return start

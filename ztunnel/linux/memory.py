"""Large buffers that cost only what is used of them."""

from __future__ import annotations

import mmap


def untouched(size: int) -> memoryview:
    """Return `size` writable zero bytes, of which the kernel gives each page at its first write.

    A bytearray writes its zeros, so all of it is resident from the start.
    """
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

"""The process-wide buffers of the relay: no stream and no connection has one of its own.

One thread runs all Python and no handler waits, so one set is enough: whoever fills a buffer has
emptied it before it returns. Layout of `SEND`: HTTP/2 frames back to back, a 9-byte header before
each payload, so that one scattered read from an application makes frames that need no further copy.
"""

from __future__ import annotations

from functools import lru_cache

from ztunnel.linux.memory import untouched
from ztunnel.wire.hbone.connection import DATA_HEADER

HEADER_BYTES = DATA_HEADER.size
UNIT_FIRST = 16 * 1024
"""How much to read at once from a connection that has not shown itself busy."""
UNIT_MOST = 1024 * 1024
"""1 MiB units are the larger half of what bulk speed there is (performance.md 14)."""
SLACK = 128 * 1024  # a record cut off by the last read, frame headers, the TLS type byte

# A proxy that moves no bulk never has most of them.
RECEIVE = untouched(UNIT_MOST + SLACK)
PLAIN = untouched(UNIT_MOST + SLACK)
SEND = untouched(UNIT_MOST + SLACK)


def grown(unit: int, size: int) -> int:
    """Choose the next unit after a read of `size` into one of `unit` bytes.

    Grow only when a read came back full, shrink when it hardly brought anything, so that a busy
    stream gets large units and a quiet one never holds the loop for long.
    """
    if size >= unit:
        return min(unit * 4, UNIT_MOST)
    return UNIT_FIRST if size < unit // 4 else unit


@lru_cache(maxsize=4)
def gaps(frame_bytes: int) -> tuple[memoryview, ...]:
    """Cut `SEND` into payload areas of `frame_bytes`, each with room for its header before it."""
    step = HEADER_BYTES + frame_bytes
    starts = range(0, UNIT_MOST, frame_bytes)
    return tuple(
        # The last one is shorter: a peer's limit need not divide our unit.
        SEND[i * step + HEADER_BYTES :][: min(frame_bytes, UNIT_MOST - start)]
        for i, start in enumerate(starts)
    )


def areas(frame_bytes: int, size: int) -> list[memoryview]:
    """List the payload areas that `size` bytes need, the last one cut to measure."""
    full, rest = divmod(size, frame_bytes)
    views = gaps(frame_bytes)
    chosen = list(views[:full])
    if rest:
        chosen.append(views[full][:rest])
    return chosen

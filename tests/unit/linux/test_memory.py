from __future__ import annotations

import re
from pathlib import Path

from ztunnel.linux.memory import untouched

KIB = 1024
SIZE = 64 * KIB * KIB


def private_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * KIB


def test_a_buffer_costs_what_is_written_to_it() -> None:
    before = private_bytes()
    buffer = untouched(SIZE)
    assert len(buffer) == SIZE
    assert private_bytes() - before < SIZE // 8
    buffer[: SIZE // 2] = b"x" * (SIZE // 2)
    assert private_bytes() - before > SIZE // 2 - SIZE // 8
    assert buffer[SIZE // 2 - 1 : SIZE // 2 + 1] == b"x\0"

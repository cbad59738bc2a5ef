from __future__ import annotations

import os
import subprocess
import sys

from perf.processes import family, private_kib, resident_kib


def test_a_process_is_counted_with_its_children() -> None:
    words = [sys.executable, "-c", "input()"]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as child:
        found = family(os.getpid())
        child.communicate(b"\n")
    assert found[0] == os.getpid()
    assert child.pid in found[1:]


def test_what_it_allocated_is_part_of_what_lies_in_memory() -> None:
    assert 0 < private_kib(os.getpid()) < resident_kib(os.getpid())

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from cni.install.elf import machine_of, read_parts, relocate
from cni.install.errors import ElfError

PYTHON = Path(sys.executable).resolve().read_bytes()
LIBRARY_PATH = "/a/long/path/that/has/no/room/in/the/file"
LOADER = "/another/ld-linux.so"

AMD64, ARM64 = 62, 183
HEADER_BYTES, SEGMENT_BYTES, ENTRY_BYTES = 64, 56, 16
LOAD, DYNAMIC, INTERP, NOTE = 1, 2, 3, 4
NULL, NEEDED, STRTAB, SONAME, RPATH, RUNPATH = 0, 1, 5, 14, 15, 29
NAMES = b"\0libc.so.6\0libme.so\0/old/path\0"
INTERPRETER = b"/lib/ld-linux-aarch64.so.1\0"


def an_elf(
    *,
    machine: int = ARM64,
    page: int = 65536,
    entries: list[tuple[int, int]] | None = None,
    spare: int = 2,
    kinds: tuple[int, ...] = (INTERP, LOAD, DYNAMIC, NOTE),
) -> bytes:
    """Write a small library: one segment with everything in it, at address 65536."""
    base = 0x10000
    names_at = HEADER_BYTES + SEGMENT_BYTES * len(kinds)
    interpreter_at = names_at + len(NAMES)
    dynamic_at = interpreter_at + len(INTERPRETER)
    if entries is None:
        entries = [(NEEDED, 1), (SONAME, 11), (RUNPATH, 20)]
    packed = [(STRTAB, base + names_at), *entries, *[(NULL, 0)] * spare]
    dynamic = b"".join(struct.pack("<qQ", *entry) for entry in packed)
    end = dynamic_at + len(dynamic)
    places = {
        INTERP: (interpreter_at, len(INTERPRETER), 1),
        LOAD: (0, end, page),
        DYNAMIC: (dynamic_at, len(dynamic), 8),
        NOTE: (0, 4, 4),
    }
    segments = b"".join(
        struct.pack("<IIQQQQQQ", kind, 4, at, base + at, base + at, size, size, align)
        for kind, (at, size, align) in ((kind, places[kind]) for kind in kinds)
    )
    head = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01", 3, machine, 1, 0, HEADER_BYTES, 0, 0, HEADER_BYTES,
        SEGMENT_BYTES, len(kinds), 0, 0, 0,
    )  # fmt: skip
    return head + segments + NAMES + INTERPRETER + dynamic


def segments_of(data: bytes) -> list[tuple[int, ...]]:
    count = struct.unpack_from("<H", data, 56)[0]
    table = struct.unpack_from("<Q", data, 32)[0]
    return [struct.unpack_from("<IIQQQQQQ", data, table + n * SEGMENT_BYTES) for n in range(count)]


def entries_of(data: bytes) -> dict[int, int]:
    dynamic = next(segment for segment in segments_of(data) if segment[0] == DYNAMIC)
    pairs = [
        struct.unpack_from("<qQ", data, dynamic[2] + at) for at in range(0, dynamic[5], ENTRY_BYTES)
    ]
    return {tag: value for tag, value in pairs if tag != NULL}


def text_at(data: bytes, address: int) -> str:
    """Read what the kernel would map at an address."""
    for kind, _, offset, vaddr, _, size, _, _ in segments_of(data):
        if kind == LOAD and vaddr <= address < vaddr + size:
            at = address - vaddr + offset
            return data[at : data.index(b"\0", at)].decode()
    raise AssertionError("nothing is mapped there")


@pytest.mark.parametrize(
    ("data", "machine"),
    [
        (an_elf(machine=ARM64), "aarch64"),
        (an_elf(machine=AMD64), "x86_64"),
        (an_elf(machine=243), "processor 243"),
        (an_elf()[: HEADER_BYTES - 1], None),
        (b"#!/bin/sh\n" + bytes(HEADER_BYTES), None),
    ],
)
def test_a_program_says_which_processor_it_is_for(data: bytes, machine: str | None) -> None:
    assert machine_of(data) == machine


def test_a_program_says_what_it_asks_for() -> None:
    parts = read_parts(an_elf())
    assert parts.loader == "/lib/ld-linux-aarch64.so.1"
    assert parts.soname == "libme.so"
    assert parts.needed == ("libc.so.6",)


@pytest.mark.parametrize(("machine", "page"), [(AMD64, 4096), (ARM64, 65536)])
@pytest.mark.parametrize(
    "kinds", [(INTERP, LOAD, DYNAMIC, NOTE), (NOTE, INTERP, LOAD, DYNAMIC, NOTE)]
)
def test_a_moved_program_asks_for_the_same_at_other_places(
    machine: int, page: int, kinds: tuple[int, ...]
) -> None:
    before = an_elf(machine=machine, page=page, kinds=kinds)
    after = relocate(before, library_path=LIBRARY_PATH, loader=LOADER)
    assert read_parts(after).loader == LOADER
    assert read_parts(after).needed == read_parts(before).needed
    assert read_parts(after).soname == read_parts(before).soname
    entries = entries_of(after)
    assert RUNPATH not in entries
    assert text_at(after, entries[STRTAB] + entries[RPATH]) == LIBRARY_PATH


def test_the_kernel_s_rules_for_segments_are_kept() -> None:
    after = relocate(an_elf(), library_path=LIBRARY_PATH, loader=LOADER)
    loads = [segment for segment in segments_of(after) if segment[0] == LOAD]
    addresses = [segment[3] for segment in loads]
    assert addresses == sorted(addresses)
    for _, _, offset, vaddr, _, file_bytes, memory_bytes, align in loads:
        assert offset % align == vaddr % align
        assert offset + file_bytes <= len(after)
        assert file_bytes == memory_bytes
    (_, _, first, *_), (_, _, second, *_) = loads
    assert first // 65536 * 65536 + 65536 <= addresses[1] // 65536 * 65536 + second


def test_all_bytes_but_the_tables_stay() -> None:
    before = an_elf()
    after = relocate(before, library_path=LIBRARY_PATH)
    at = HEADER_BYTES + 4 * SEGMENT_BYTES
    assert after[:HEADER_BYTES] == before[:HEADER_BYTES]
    assert after[at : at + len(NAMES + INTERPRETER)] == NAMES + INTERPRETER
    assert read_parts(after).loader == read_parts(before).loader


def test_moving_twice_is_like_moving_once() -> None:
    once = relocate(an_elf(kinds=(INTERP, LOAD, DYNAMIC, NOTE, NOTE)), library_path="/first")
    twice = relocate(once, library_path="/second")
    entries = entries_of(twice)
    assert text_at(twice, entries[STRTAB] + entries[RPATH]) == "/second"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "ELF"),
        (b"#!/bin/sh\n", "ELF"),
        (b"\x7fELF\x01\x01\x01" + bytes(100), "64-bit"),
        (b"\x7fELF\x02\x02\x01" + bytes(100), "little-endian"),
        (an_elf()[:100], "cut short"),
        (an_elf()[:-8], "cut short"),
        (an_elf(kinds=(LOAD, DYNAMIC)), "note"),
        (an_elf(kinds=(INTERP, LOAD, NOTE)), "static"),
        (an_elf(kinds=(DYNAMIC, NOTE)), "segments"),
        (an_elf(kinds=(LOAD, DYNAMIC, NOTE)), "without a loader"),
        (an_elf(spare=0), "no end"),
        (an_elf(spare=1, entries=[]), "no room"),
    ],
)
def test_what_cannot_be_moved_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(ElfError, match=why):
        relocate(data, library_path=LIBRARY_PATH, loader=LOADER)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), min_size=1, max_size=6))
def test_damage_is_refused_or_survived(changes: list[tuple[int, int]]) -> None:
    data = bytearray(an_elf())
    for at, value in changes:
        data[at % len(data)] = value
    for use in (read_parts, lambda damaged: relocate(damaged, library_path="/x", loader="/y")):
        try:
            use(bytes(data))
        except ElfError:
            continue


@pytest.mark.parametrize("loader", [True, False])
def test_a_real_program_runs_from_its_new_place(tmp_path: Path, *, loader: bool) -> None:
    """What the loader makes of it is the proof; here the libraries stay where they were."""
    parts = read_parts(PYTHON)
    assert parts.loader is not None
    folders = {
        str(Path(line.split()[-1]).parent)
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        if ".so" in line
    }
    copied = tmp_path / "ld.so"
    copied.symlink_to(parts.loader)
    program = tmp_path / "python"
    program.write_bytes(
        relocate(
            PYTHON, library_path=":".join(sorted(folders)), loader=str(copied) if loader else None
        )
    )
    program.chmod(0o755)
    run = subprocess.run(
        [program, "-ISc", "print(open('/proc/self/maps').read())"],
        env={"PYTHONHOME": sys.base_prefix},
        executable=str(program),
        capture_output=True,
        text=True,
        check=False,
    )
    # Isolated, it finds no library of Python's, but by then the loader has done its work.
    assert "error while loading shared libraries" not in run.stderr
    assert "No module named 'encodings'" in run.stderr or str(program) in run.stdout

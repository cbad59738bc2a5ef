"""Programs and libraries moved to where the system does not look for their parts.

How it works: a dynamic program names its loader in PT_INTERP and finds its libraries where
DT_RPATH says (System V gABI, chapter 5). Both are text, and there is no room for longer text
inside the file. So the new text goes to the end, and a new PT_LOAD maps it behind everything
else. The program header table cannot grow either: the new entry takes the place of a PT_NOTE,
which nothing needs at run time. DT_RPATH is an offset from the string table that may well point
beyond it, into the new segment; it replaces DT_RUNPATH, because that would not count for the
libraries of libraries.

Only fields that all 64-bit little-endian machines have in common are touched, so amd64 and arm64
are the same work. The page size comes from the alignment of the segments that are there (64 KiB
on arm64).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from cni.install.errors import ElfError

_IDENT = b"\x7fELF\x02\x01\x01"  # 64 bit, little endian, version 1
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_DYNAMIC = struct.Struct("<qQ")
_SEGMENTS_MAX = 64
_PAGE_BYTES = 4096
_PAGE_BYTES_MAX = 1 << 21  # a huge page; linkers align to 64 KiB at most
_ADDRESS_MAX = 1 << 47  # user space; leaves room for what we add

_MACHINES = {62: "x86_64", 183: "aarch64"}  # as uname calls them

_PT_LOAD, _PT_DYNAMIC, _PT_INTERP, _PT_NOTE = 1, 2, 3, 4
_PF_W, _PF_R = 2, 4
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_SONAME, _DT_RPATH, _DT_RUNPATH = 0, 1, 5, 14, 15, 29


@dataclass(frozen=True, slots=True)
class _Segment:
    """One program header."""

    kind: int
    flags: int
    offset: int
    vaddr: int
    paddr: int
    file_bytes: int
    memory_bytes: int
    align: int


@dataclass(frozen=True, slots=True)
class Parts:
    """Which other files a program or library asks for by name."""

    loader: str | None  # a path; libraries have none, usually
    soname: str | None  # what others call it
    needed: tuple[str, ...]


class _Image:
    """A file taken apart."""

    __slots__ = ("data", "dynamic", "segments", "table_at")

    def __init__(self, data: bytes) -> None:
        if not data.startswith(_IDENT) or len(data) < _HEADER.size:
            raise ElfError("not a 64-bit little-endian ELF file")
        fields = _HEADER.unpack_from(data)
        self.data = data
        self.table_at, entry_bytes, count = fields[5], fields[9], fields[10]
        if entry_bytes != _SEGMENT.size or not 0 < count <= _SEGMENTS_MAX:
            raise ElfError("the program headers are not of the known kind")
        self.segments = [
            _Segment(*self._unpack(_SEGMENT, self.table_at + number * _SEGMENT.size))
            for number in range(count)
        ]
        self.dynamic = self._read_dynamic()

    def _unpack(self, form: struct.Struct, at: int) -> tuple[int, ...]:
        try:
            return form.unpack_from(self.data, at)
        except (struct.error, OverflowError) as exc:
            raise ElfError("the file is cut short") from exc

    def _read_dynamic(self) -> list[tuple[int, int]]:
        """Read the dynamic entries, without the empty ones at the end."""
        segment = self.one(_PT_DYNAMIC)
        if segment is None:
            return []
        if segment.offset + segment.file_bytes > len(self.data):
            raise ElfError("the file is cut short")
        entries: list[tuple[int, int]] = []
        for at in range(segment.offset, segment.offset + segment.file_bytes, _DYNAMIC.size):
            tag, value = self._unpack(_DYNAMIC, at)
            if tag == _DT_NULL:
                return entries
            entries.append((tag, value))
        raise ElfError("the dynamic entries have no end")

    def one(self, kind: int) -> _Segment | None:
        """Give the first segment of a kind."""
        return next((segment for segment in self.segments if segment.kind == kind), None)

    def text(self, offset: int) -> str:
        """Read the text that starts at an offset in the file."""
        end = self.data.find(b"\0", offset) if offset >= 0 else -1
        if end < 0:
            raise ElfError("a text has no end")
        try:
            return self.data[offset:end].decode()
        except UnicodeDecodeError as exc:
            raise ElfError("a name is not text") from exc

    def strings_at(self) -> int:
        """Give the virtual address of the string table."""
        address = dict(self.dynamic).get(_DT_STRTAB)
        if address is None:
            raise ElfError("there is no string table: the program is static")
        return address

    def offset_of(self, address: int) -> int:
        """Find where in the file a virtual address comes from."""
        for segment in self.segments:
            is_inside = segment.vaddr <= address < segment.vaddr + segment.file_bytes
            if segment.kind == _PT_LOAD and is_inside:
                return address - segment.vaddr + segment.offset
        raise ElfError("an address is not in the file")


def machine_of(data: bytes) -> str | None:
    """Say which processor a program is for, as uname calls it; None if it is no program."""
    if not data.startswith(_IDENT) or len(data) < _HEADER.size:
        return None
    number = _HEADER.unpack_from(data)[2]
    return _MACHINES.get(number, f"processor {number}")


def read_parts(data: bytes) -> Parts:
    """Read which other files a program or library asks for.

    Raises:
        ElfError: it is not a dynamic 64-bit little-endian ELF file.
    """
    image = _Image(data)
    strings = image.offset_of(image.strings_at())
    interpreter = image.one(_PT_INTERP)
    names = [(tag, strings + value) for tag, value in image.dynamic]
    return Parts(
        loader=image.text(interpreter.offset) if interpreter else None,
        soname=next((image.text(at) for tag, at in names if tag == _DT_SONAME), None),
        needed=tuple(image.text(at) for tag, at in names if tag == _DT_NEEDED),
    )


def relocate(data: bytes, *, library_path: str, loader: str | None = None) -> bytes:
    """Give a file that finds its libraries in one folder, and if `loader` is given, uses that.

    Raises:
        ElfError: it is not a dynamic 64-bit little-endian ELF file with a note to give up, or is
            asked to use a loader and has none.
    """
    image = _Image(data)
    texts = library_path.encode() + b"\0" + (loader.encode() + b"\0" if loader else b"")
    loads = [segment for segment in image.segments if segment.kind == _PT_LOAD]
    page = max([segment.align for segment in loads] + [_PAGE_BYTES])
    top = max([segment.vaddr + segment.memory_bytes for segment in loads] + [0])
    if not loads or page > _PAGE_BYTES_MAX or top > _ADDRESS_MAX:
        raise ElfError("the segments are not where programs have them")
    # File offset and address must agree within a page; then the file needs no padding.
    address = -(-top // page) * page + len(data) % page
    # Writable, though nobody writes: what patchelf makes is so, and every kernel has seen that.
    added = _Segment(
        _PT_LOAD, _PF_R | _PF_W, len(data), address, address, len(texts), len(texts), page
    )
    segments = _with_load(image.segments, added)
    if loader is not None:
        segments = _with_loader(segments, added, len(library_path.encode()) + 1)
    result = bytearray(data)
    table = b"".join(_pack_segment(segment) for segment in segments)
    result[image.table_at : image.table_at + len(table)] = table
    _write_dynamic(result, image, (address - image.strings_at()) % (1 << 64))
    return bytes(result) + texts


def _with_load(segments: list[_Segment], added: _Segment) -> list[_Segment]:
    """Put a segment behind the last that is loaded (the order of addresses), for a note."""
    note = next((segment for segment in segments if segment.kind == _PT_NOTE), None)
    if note is None:
        raise ElfError("there is no note to give up for the new segment")
    others = [segment for segment in segments if segment is not note]
    last = max(number for number, segment in enumerate(others) if segment.kind == _PT_LOAD)
    return [*others[: last + 1], added, *others[last + 1 :]]


def _with_loader(segments: list[_Segment], added: _Segment, at: int) -> list[_Segment]:
    """Point PT_INTERP to the text that stands `at` bytes inside the new segment."""
    if not any(segment.kind == _PT_INTERP for segment in segments):
        raise ElfError("a program without a loader cannot be given one")
    return [
        replace(
            segment,
            offset=added.offset + at,
            vaddr=added.vaddr + at,
            paddr=added.paddr + at,
            file_bytes=added.file_bytes - at,
            memory_bytes=added.memory_bytes - at,
        )
        if segment.kind == _PT_INTERP
        else segment
        for segment in segments
    ]


def _pack_segment(segment: _Segment) -> bytes:
    return _SEGMENT.pack(
        segment.kind,
        segment.flags,
        segment.offset,
        segment.vaddr,
        segment.paddr,
        segment.file_bytes,
        segment.memory_bytes,
        segment.align,
    )


def _write_dynamic(result: bytearray, image: _Image, library_path: int) -> None:
    """Write the dynamic entries anew, with one DT_RPATH."""
    segment = image.one(_PT_DYNAMIC)
    assert segment is not None, "strings_at() found an entry"
    entries = [entry for entry in image.dynamic if entry[0] not in (_DT_RPATH, _DT_RUNPATH)]
    entries.append((_DT_RPATH, library_path))
    packed = b"".join(_DYNAMIC.pack(*entry) for entry in entries)
    room = segment.file_bytes
    if len(packed) + _DYNAMIC.size > room:
        raise ElfError("there is no room for another dynamic entry")
    result[segment.offset : segment.offset + room] = packed.ljust(room, b"\0")

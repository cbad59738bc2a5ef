"""The reference's rules in the form of `iptables-legacy`: find them, and take them away.

How it works: the old packet filter knows tables as a whole (linux/netfilter/x_tables.h). One is
read as a block of entries, what is the reference's is cut out, the offsets that point across the
cut are moved, and the block is put back at once. A chain of one's own begins with an entry whose
target is ERROR and bears its name, and a jump is the offset of the first entry behind that. Only
tables that the kernel says exist are touched, for asking for another would make it. Counters of
the rules that stay start again from zero.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cni.redirect.errors import RedirectError

CHAIN_PREFIX = b"ISTIO_"
TABLES = ("nat", "mangle", "raw")
HOOKS = 5  # NF_INET_NUMHOOKS
_GET_INFO, _GET_ENTRIES, _SET_REPLACE = 64, 65, 64
_INFO = struct.Struct(f"=32sI{HOOKS}I{HOOKS}III")
_ENTRIES_HEAD_BYTES = 40  # name, size, padding
_REPLACE = struct.Struct(f"@32sIII{HOOKS}I{HOOKS}IIP")
_COUNTER_BYTES = 16
_TARGET = struct.Struct("=H29sB")
_ENTRY_BYTES_MIN = 112
_TABLE_BYTES_MAX = 64 << 20  # XT_MAX_TABLE_SIZE allows more; no pod of ours has a MiB

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Family:
    """Where the fields of an entry are."""

    name: str
    address_family: socket.AddressFamily
    level: int
    names_file: str
    target_offset_at: int


FAMILIES = (
    Family("IPv4", socket.AF_INET, socket.SOL_IP, "ip_tables_names", 88),
    Family("IPv6", socket.AF_INET6, socket.IPPROTO_IPV6, "ip6_tables_names", 140),
)


@dataclass(slots=True)
class Entry:
    """One entry, and where it stood."""

    at: int
    data: bytearray
    target_at: int  # in `data`

    @property
    def target(self) -> bytes:
        """The target's name; empty for verdicts."""
        name: bytes = _TARGET.unpack_from(self.data, self.target_at)[1]
        return name.split(b"\0")[0]

    @property
    def chain(self) -> bytes | None:
        """The name of the chain that begins here; None if none does."""
        if self.target != b"ERROR":
            return None
        return bytes(self.data[self.target_at + _TARGET.size :]).split(b"\0")[0]

    @property
    def jump(self) -> int | None:
        """The offset this jumps to; None if it does not."""
        if self.target:
            return None
        verdict = int(struct.unpack_from("=i", self.data, self.target_at + _TARGET.size)[0])
        return verdict if verdict >= 0 else None

    def jump_to(self, offset: int) -> None:
        """Point the jump elsewhere."""
        struct.pack_into("=i", self.data, self.target_at + _TARGET.size, offset)


@dataclass(frozen=True, slots=True)
class Block:
    """A table: where each hook enters and where its policy is, and the entries."""

    valid_hooks: int
    hook_entry: tuple[int, ...]
    underflow: tuple[int, ...]
    entries: tuple[Entry, ...]

    def chains(self) -> list[bytes]:
        """Name the reference's chains."""
        names = (entry.chain for entry in self.entries)
        return [name for name in names if name is not None and name.startswith(CHAIN_PREFIX)]

    def without_reference(self) -> Block:
        """Cut out the reference's chains and the jumps to them."""
        doomed = set(self._doomed())
        moved: dict[int, int] = {}
        at = 0
        for entry in self.entries:
            moved[entry.at] = at
            at += 0 if entry.at in doomed else len(entry.data)
        kept = tuple(
            Entry(moved[entry.at], bytearray(entry.data), entry.target_at)
            for entry in self.entries
            if entry.at not in doomed
        )
        for entry in kept:
            if entry.jump is not None:
                entry.jump_to(moved[entry.jump])
        return Block(
            self.valid_hooks,
            tuple(moved.get(offset, 0) for offset in self.hook_entry),
            tuple(moved.get(offset, 0) for offset in self.underflow),
            kept,
        )

    def _doomed(self) -> Iterator[int]:
        starts: set[int] = set()
        inside = False
        for entry in self.entries:
            name = entry.chain
            if name is not None:
                inside = name.startswith(CHAIN_PREFIX)
                if inside:
                    starts.add(entry.at + len(entry.data))
            if inside:
                yield entry.at
        for entry in self.entries:
            if entry.jump in starts:
                yield entry.at


def parse_entries(data: bytes, family: Family) -> tuple[Entry, ...]:
    """Read the entries of a table.

    Raises:
        ValueError: they are malformed.
    """
    entries = []
    at = 0
    while at < len(data):
        target_at, size = struct.unpack_from("=HH", data, at + family.target_offset_at)
        if not _ENTRY_BYTES_MIN <= target_at <= size - _TARGET.size or at + size > len(data):
            raise ValueError(f"malformed entry at {at}")
        entries.append(Entry(at, bytearray(data[at : at + size]), target_at))
        at += size
    return tuple(entries)


class LegacyFilter:
    """The old packet filter of one family in the namespace where this was opened."""

    def __init__(self, family: Family, tables: tuple[str, ...]) -> None:
        self._family = family
        self._tables = tables
        self._sock = socket.socket(
            family.address_family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW
        )

    def find(self) -> list[str]:
        """Say where the reference's rules are.

        Raises:
            RedirectError: they cannot be read.
        """
        return [
            f"{self._family.name} iptables chain {table} {chain.decode('ascii', 'replace')}"
            " is left over"
            for table in self._tables
            for chain in self._read(table).chains()
        ]

    def remove(self) -> None:
        """Take them away; fine if there are none.

        Raises:
            RedirectError: the kernel refused to.
        """
        for table in self._tables:
            block = self._read(table)
            if block.chains():
                self._write(table, block.without_reference(), len(block.entries))

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def _read(self, table: str) -> Block:
        info = _INFO.unpack(self._get(_GET_INFO, table.encode().ljust(_INFO.size, b"\0")))
        size = int(info[-1])
        if size > _TABLE_BYTES_MAX:
            raise RedirectError(f"iptables table {table} has {size} bytes")
        head = struct.pack("=32sI4x", table.encode(), size)
        data = self._get(_GET_ENTRIES, head + bytes(size))[_ENTRIES_HEAD_BYTES:]
        try:
            entries = parse_entries(data, self._family)
        except (ValueError, struct.error) as exc:
            raise RedirectError(f"cannot read iptables table {table}: {exc}") from exc
        return Block(info[1], info[2 : 2 + HOOKS], info[2 + HOOKS : 2 + 2 * HOOKS], entries)

    def _write(self, table: str, block: Block, entries_before: int) -> None:
        data = b"".join(bytes(entry.data) for entry in block.entries)
        # The kernel hands out the old counters here; its number of them guards against a race.
        counters = ctypes.create_string_buffer(entries_before * _COUNTER_BYTES)
        head = _REPLACE.pack(
            table.encode(),
            block.valid_hooks,
            len(block.entries),
            len(data),
            *block.hook_entry,
            *block.underflow,
            entries_before,
            ctypes.addressof(counters),
        )
        whole = head + data
        fd, level = self._sock.fileno(), self._family.level
        if _libc.setsockopt(fd, level, _SET_REPLACE, whole, len(whole)) != 0:
            raise _error(f"replace iptables table {table}")

    def _get(self, option: int, request: bytes) -> bytes:
        # The socket module cannot pass a request with its question.
        buffer = ctypes.create_string_buffer(request, len(request))
        length = ctypes.c_uint32(len(request))
        fd, level = self._sock.fileno(), self._family.level
        if _libc.getsockopt(fd, level, option, buffer, ctypes.byref(length)) != 0:
            raise _error("read iptables rules")
        return buffer.raw[: length.value]


def open_filters() -> list[LegacyFilter]:
    """Open those that exist in the calling thread's namespace; the caller closes them.

    Raises:
        OSError: a capability is missing.
    """
    filters = []
    for family in FAMILIES:
        try:
            names = Path("/proc/thread-self/net", family.names_file).read_text().split()
        except OSError:  # the kernel has no such filter at all
            continue
        tables = tuple(table for table in TABLES if table in names)
        if tables:
            filters.append(LegacyFilter(family, tables))
    return filters


def _error(what: str) -> RedirectError:
    return RedirectError(f"cannot {what}: {os.strerror(ctypes.get_errno())}")

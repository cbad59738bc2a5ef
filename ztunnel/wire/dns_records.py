"""Records of our own answers, as bytes (RFC 1035 s3.2)."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Address

import dns.exception
import dns.name

from ztunnel.model.network import IpAddress
from ztunnel.wire.dns import CLASS_IN, HEADER_BYTES, Query, RecordType
from ztunnel.wire.dns_names import LABEL_BYTES_MAX, NAME_BYTES_MAX

_RECORD = struct.Struct("!HHIH")  # type, class, TTL, length
_SERVICE = struct.Struct("!HHH")  # RFC 2782: priority, weight, port
_ZONE = struct.Struct("!IIIII")  # RFC 1035 s3.3.13
_REFERENCE = struct.Struct("!H")
_TO_QUESTION = b"\xc0\x0c"  # a pointer to the name in the question
_POINTER = 0xC000
_V4_BYTES, _V6_BYTES = 4, 16

# As CoreDNS says it; nobody transfers this zone, so only the last number matters.
_REFRESH, _RETRY, _EXPIRE = 7200, 1800, 86400


@lru_cache(maxsize=4096)
def encode_name(name: str) -> bytes:
    """Encode a name, given without the last dot.

    Raises:
        ValueError: it is none, such as one with a label of 64 characters.
    """
    try:
        return dns.name.from_text(name, dns.name.root).to_wire() or b""
    except (dns.exception.DNSException, UnicodeError) as exc:
        raise ValueError(f"not a DNS name: {name!r}") from exc


def encode_host(host: str) -> bytes:
    """Encode one of many names that differ in their first label only; as `encode_name` does.

    Raises:
        ValueError: it is none.
    """
    label, dot, rest = host.partition(".")
    is_plain = 0 < len(label) <= LABEL_BYTES_MAX and label.isascii() and "\\" not in label
    # Alone, "@" and "." would mean the root.
    if not (dot and is_plain and rest[:1].isalnum()):
        return encode_name(host)
    encoded = bytes((len(label),)) + label.encode() + encode_name(rest)
    if len(encoded) > NAME_BYTES_MAX:
        raise ValueError(f"not a DNS name: {host!r}")
    return encoded


def owner_of(query: Query, name: str) -> bytes:
    """Encode the owner of a record: lower case, a pointer when the question says just that.

    Raises:
        ValueError: it is no name.
    """
    encoded = encode_name(name)
    return _TO_QUESTION if query.question.startswith(encoded) else encoded


def address_record(owner: bytes, ip: IpAddress, ttl: int) -> bytes:
    """Make an A or AAAA record."""
    [record] = address_records(owner, (ip,), ttl)
    return record


def address_records(owner: bytes, ips: Iterable[IpAddress], ttl: int) -> list[bytes]:
    """Make the A or AAAA record of each; of one name there may be thousands."""
    a = owner + _RECORD.pack(RecordType.A, CLASS_IN, ttl, _V4_BYTES)
    aaaa = owner + _RECORD.pack(RecordType.AAAA, CLASS_IN, ttl, _V6_BYTES)
    return [(a if isinstance(ip, IPv4Address) else aaaa) + ip.packed for ip in ips]


def cname_record(query: Query, owner: bytes, target: str, ttl: int) -> tuple[bytes, bytes]:
    """Make the CNAME record that must come first, and a pointer to its target.

    Raises:
        ValueError: the target is no name.
    """
    record = _record(owner, RecordType.CNAME, ttl, encode_name(target))
    at = HEADER_BYTES + len(query.question) + len(owner) + _RECORD.size
    return record, _REFERENCE.pack(_POINTER | at)


def service_record(owner: bytes, host: bytes, port: int, ttl: int, weight: int) -> bytes:
    """Make an SRV record (RFC 2782) with a host that is encoded already."""
    return _record(owner, RecordType.SRV, ttl, _SERVICE.pack(0, weight, port) + host)


def pointer_record(owner: bytes, host: str, ttl: int) -> bytes:
    """Make a PTR record.

    Raises:
        ValueError: the host is no name.
    """
    return _record(owner, RecordType.PTR, ttl, encode_name(host))


def zone_record(zone: str, ttl: int) -> bytes:
    """Make the SOA record that tells how long "no such record" holds (RFC 2308 s3): `ttl`.

    Raises:
        ValueError: the zone is no name.
    """
    encoded = encode_name(zone)
    server, mailbox = b"\2ns\3dns" + encoded, b"\x0ahostmaster" + encoded
    numbers = _ZONE.pack(1, _REFRESH, _RETRY, _EXPIRE, ttl)
    return _record(encoded, RecordType.SOA, ttl, server + mailbox + numbers)


def _record(owner: bytes, rtype: RecordType, ttl: int, data: bytes) -> bytes:
    return owner + _RECORD.pack(rtype, CLASS_IN, ttl, len(data)) + data

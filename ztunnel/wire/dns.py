"""DNS messages: read queries, build our own answers, recognize those of others (RFC 1035, 6891).

How it works: names are dnspython's. A query is read no further than we need, with limits, and an
answer is records that are ready as bytes, so that a remembered answer costs a join. What is not
ours is never taken apart: whatever else is in it travels as it came.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import dns.exception
import dns.rdatatype
import dns.wire

from ztunnel.wire.dns_names import read_name

HEADER_BYTES = 12
MESSAGE_BYTES_MAX = 65535
QUERY_BYTES_MAX = 4096  # the longest name with EDNS, padding and a signature takes a quarter of it
UDP_BYTES_MIN = 512  # RFC 1035 s4.2.1; the reference sends up to 4096 to whoever asks without EDNS
RECORDS_IN_QUERY_MAX = 16  # OPT, TSIG, the SOA of IXFR; nobody sends more
OPT_BYTES = 11
CLASS_IN = 1

_HEADER = struct.Struct("!HHHHHH")
_RECORD = struct.Struct("!HHIH")  # type, class, TTL, length
_OPT = struct.Struct("!BHHIH")  # an empty name, then as any record
_KIND = struct.Struct("!HH")  # type, class
_LENGTH = struct.Struct("!H")

_QR, _AA, _TC, _RD, _RA, _CD = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080, 0x0010
_OPCODE = 0x7800
_RCODE = 0x000F
_DNSSEC_OK = 0x8000
_LABEL_MAX, _POINTER_LABEL = 63, 0xC0

_TYPE_NAMES = {int(kind): kind.name.lower() for kind in dns.rdatatype.RdataType}
UNKNOWN_TYPE = "unknown"


class Rcode(IntEnum):
    """Response codes (RFC 1035 s4.1.1, RFC 6891 s9)."""

    NOERROR = 0
    FORMERR = 1
    SERVFAIL = 2
    NXDOMAIN = 3
    NOTIMP = 4
    REFUSED = 5
    BADVERS = 16


# What says something of a name must repeat it. A server that refuses need not repeat what it did
# not understand, or would not look at (NOTAUTH: a signature by a key it does not know).
_WITH_QUESTION = frozenset({Rcode.NOERROR, Rcode.NXDOMAIN})


class RecordType(IntEnum):
    """Types that we treat in a way of their own."""

    A = 1
    CNAME = 5
    SOA = 6
    PTR = 12
    AAAA = 28
    SRV = 33
    OPT = 41
    IXFR = 251
    AXFR = 252


@dataclass(frozen=True, slots=True)
class Opt:
    """What EDNS says (RFC 6891 s6.1.2); options are left to whom they are for."""

    payload_bytes: int
    version: int
    dnssec_ok: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One well-formed question. `name` is lower case, escaped, without the last dot.

    It has no message id, so that it may be remembered for the next who asks the same.
    """

    flags: int
    name: str
    rtype: int
    rclass: int
    question: bytes  # the section as it came
    opt: Opt | None = None

    @property
    def udp_limit(self) -> int:
        """How many bytes a datagram to whoever asked may have."""
        return UDP_BYTES_MIN if self.opt is None else max(self.opt.payload_bytes, UDP_BYTES_MIN)

    @property
    def type_name(self) -> str:
        """The type in lower case, `unknown` if it has no name."""
        return _TYPE_NAMES.get(self.rtype, UNKNOWN_TYPE)


@dataclass(frozen=True, slots=True)
class Refused:
    """A message that is no query for us, and what to say to it."""

    rcode: Rcode
    reply: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer of our own. `leading` records keep their place before all others.

    Without `additional` records it is complete all the same.
    """

    rcode: Rcode = Rcode.NOERROR
    is_authoritative: bool = True
    leading: tuple[bytes, ...] = ()
    answers: Sequence[bytes] = ()
    authority: tuple[bytes, ...] = ()
    additional: tuple[bytes, ...] = ()


def parse_query(data: bytes) -> Query | Refused | None:
    """Read a query; None if silence is the answer, as to a response (RFC 1035 s7.3).

    The reference answers a response with FORMERR, which two such servers would do for ever, and
    several questions with SERVFAIL.
    """
    if len(data) < HEADER_BYTES:
        return None
    message_id, flags, questions, *counts = _HEADER.unpack_from(data)
    if flags & _QR:
        return None
    records = sum(counts)
    if flags & _OPCODE:
        return _refused(data, message_id, flags, Rcode.NOTIMP)
    if questions != 1 or records > RECORDS_IN_QUERY_MAX or len(data) > QUERY_BYTES_MAX:
        return Refused(Rcode.FORMERR, _bare(message_id, flags, Rcode.FORMERR))
    try:
        name, rtype, rclass, end = _question(data)
        opt = _opt(data, end, records) if records else None
    except (dns.exception.DNSException, ValueError):
        return Refused(Rcode.FORMERR, _bare(message_id, flags, Rcode.FORMERR))
    return Query(
        flags=flags, name=name, rtype=rtype, rclass=rclass, question=data[HEADER_BYTES:end], opt=opt
    )


def _question(data: bytes) -> tuple[str, int, int, int]:
    """Read the question; return its name, type, class, and where it ends.

    Raises:
        ValueError: the message ends too soon.
        DNSException: the name is none.
    """
    # Nothing is before it that its name could be compressed with.
    name, at = read_name(data, HEADER_BYTES)
    if len(data) < at + _KIND.size:
        raise ValueError("the question is cut off")
    return name, *_KIND.unpack_from(data, at), at + _KIND.size


def _opt(data: bytes, at: int, records: int) -> Opt | None:
    """Find OPT among the records that begin at `at`.

    Raises:
        ValueError: there are two, or a name is none.
        DNSException: the message ends too soon.
    """
    if records == 1 and len(data) >= at + OPT_BYTES:
        # What nearly all send: OPT and nothing else, in 1 us instead of 8.
        root, rtype, rclass, ttl, length = _OPT.unpack_from(data, at)
        if root == 0 and rtype == RecordType.OPT and len(data) >= at + OPT_BYTES + length:
            return Opt(rclass, ttl >> 16 & 0xFF, bool(ttl & _DNSSEC_OK))
    parser = dns.wire.Parser(data, at)
    found: Opt | None = None
    for _ in range(records):
        is_root = _skip_name(parser)
        rtype, rclass, ttl, length = parser.get_struct("!HHIH")
        parser.get_bytes(length)
        if rtype != RecordType.OPT:
            continue
        if found is not None or not is_root:
            raise ValueError("OPT twice, or with a name")
        found = Opt(rclass, ttl >> 16 & 0xFF, bool(ttl & _DNSSEC_OK))
    return found


def _skip_name(parser: dns.wire.Parser) -> bool:
    """Pass over the name of a record, compressed or not; tell whether it is the root.

    Raises:
        ValueError: a label is of a type that nobody defined.
    """
    start = parser.current
    while length := parser.get_uint8():
        if length >= _POINTER_LABEL:
            parser.get_uint8()
            break
        if length > _LABEL_MAX:
            raise ValueError("an unknown type of label")
        parser.get_bytes(length)
    return parser.current == start + 1


def _refused(data: bytes, message_id: int, flags: int, rcode: Rcode) -> Refused:
    """Refuse with the question, if there is one that can be read."""
    reply = _bare(message_id, flags, rcode)
    try:
        if _HEADER.unpack_from(data)[2] == 1:
            *_, end = _question(data)
            reply = reply[:5] + b"\x01" + reply[6:] + data[HEADER_BYTES:end]
    except (dns.exception.DNSException, ValueError):
        pass  # then without it
    return Refused(rcode, reply)


def _bare(message_id: int, flags: int, rcode: Rcode) -> bytes:
    kept = flags & (_OPCODE | _RD | _CD)
    return _HEADER.pack(message_id, _QR | _RA | kept | rcode, 0, 0, 0, 0)


def error(query: Query, rcode: Rcode, message_id: int) -> bytes:
    """Answer with a response code and nothing else."""
    reply = Reply(rcode=rcode, is_authoritative=False)
    return render(query, reply, limit=UDP_BYTES_MIN, message_id=message_id)


def render(query: Query, reply: Reply, *, limit: int, message_id: int) -> bytes:
    """Build a message of at most `limit` bytes; records that do not fit are left out, with TC."""
    opt = b"" if query.opt is None else _opt_record(query.opt, reply.rcode)
    room = limit - HEADER_BYTES - len(query.question) - len(opt)
    flags = _QR | _RA | query.flags & (_RD | _CD) | reply.rcode & _RCODE
    if reply.is_authoritative:
        flags |= _AA
    parts = [b"", query.question]
    answers = 0
    for record in (*reply.leading, *reply.answers):
        room -= len(record)
        if room < 0:
            flags |= _TC
            break
        parts.append(record)
        answers += 1
    authority = _fitting(reply.authority, room)
    additional = _fitting(reply.additional, room - sum(map(len, authority)))
    parts += authority
    parts += additional
    parts.append(opt)
    others = len(additional) + bool(opt)
    parts[0] = _HEADER.pack(message_id, flags, 1, answers, len(authority), others)
    return b"".join(parts)


def _fitting(records: Sequence[bytes], room: int) -> list[bytes]:
    """Take as many as fit: nobody asks again for what nobody asked for (RFC 2181 s9)."""
    fitting = []
    for record in records:
        room -= len(record)
        if room < 0:
            break
        fitting.append(record)
    return fitting


def _opt_record(opt: Opt, rcode: Rcode) -> bytes:
    ttl = (rcode >> 4) << 24 | (_DNSSEC_OK if opt.dnssec_ok else 0)
    return b"\0" + _RECORD.pack(RecordType.OPT, max(opt.payload_bytes, UDP_BYTES_MIN), ttl, 0)


# What others answer.


def message_id_of(data: bytes) -> int:
    """Read the id of a message of two bytes or more."""
    return int.from_bytes(data[:2], "big")


def with_id(data: bytes, message_id: int) -> bytes:
    """Give a message another id."""
    return message_id.to_bytes(2, "big") + data[2:]


def is_answer(data: bytes, message_id: int, question: bytes) -> bool:
    """Tell whether `data` answers what we asked (RFC 5452 s9.1); anything else is to be ignored."""
    if len(data) < HEADER_BYTES:
        return False
    number, flags, questions, *_ = _HEADER.unpack_from(data)
    if number != message_id or not flags & _QR or flags & _OPCODE:
        return False
    if questions == 0:
        return flags & _RCODE not in _WITH_QUESTION
    end = HEADER_BYTES + len(question)
    # Some servers change the case of the name; a type is never to be lowered.
    return (
        questions == 1
        and data[end - 4 : end] == question[-4:]
        and data[HEADER_BYTES : end - 4].lower() == question[:-4].lower()
    )


def is_continuation(data: bytes, message_id: int) -> bool:
    """Tell whether `data` goes on with an answer: only its first message has the question."""
    return (
        len(data) >= HEADER_BYTES and message_id_of(data) == message_id and bool(data[2] & _QR >> 8)
    )


def rcode_of(data: bytes) -> int:
    """Read the response code of a message with a header, without its EDNS part."""
    return data[3] & _RCODE


def answer_count(data: bytes) -> int:
    """Read how many answer records a message with a header has."""
    return int.from_bytes(data[6:8], "big")


# TCP.


def framed(data: bytes) -> bytes:
    """Put its length before a message, as TCP needs it (RFC 1035 s4.2.2)."""
    return _LENGTH.pack(len(data)) + data


class MessageSplitter:
    """Cuts a TCP stream into messages; holds one incomplete message at most."""

    __slots__ = ("_buffer", "_bytes_max", "is_too_long")

    def __init__(self, bytes_max: int = MESSAGE_BYTES_MAX) -> None:
        """Take messages of up to `bytes_max` bytes; then `is_too_long`, and there are no more."""
        self._buffer = bytearray()
        self._bytes_max = bytes_max
        self.is_too_long = False

    @property
    def is_empty(self) -> bool:
        """Whether there is no incomplete message."""
        return not self._buffer

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the messages that `data` completes; consume them all before the next call."""
        buffer = self._buffer
        buffer += data
        at = 0
        while len(buffer) - at >= _LENGTH.size:
            length = _LENGTH.unpack_from(buffer, at)[0]
            self.is_too_long = length > self._bytes_max
            end = at + _LENGTH.size + length
            if self.is_too_long or len(buffer) < end:
                break
            yield bytes(buffer[at + _LENGTH.size : end])
            at = end
        del buffer[:at]

from __future__ import annotations

import dns.edns
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import pytest
from hypothesis import given, strategies as st

from tests.support.wire_cuts import cut
from ztunnel.model.network import parse_ip
from ztunnel.wire import dns as wire
from ztunnel.wire.dns import MessageSplitter, Opt, Query, Rcode, Refused, Reply
from ztunnel.wire.dns_records import address_record, owner_of

NAME = "cart.shop.svc.cluster.local"


def a_message(name: str = NAME, rtype: str = "A", **more: object) -> dns.message.Message:
    return dns.message.make_query(name, rtype, id=4711, **more)


def a_query(name: str = NAME, rtype: str = "A", **more: object) -> Query:
    query = wire.parse_query(a_message(name, rtype, **more).to_wire())
    assert isinstance(query, Query)
    return query


def refusal_of(data: bytes) -> dns.message.Message:
    refused = wire.parse_query(data)
    assert isinstance(refused, Refused)
    reply = dns.message.from_wire(refused.reply)
    assert reply.flags & dns.flags.QR
    return reply


def rendered(query: Query, reply: Reply, limit: int = 65535) -> dns.message.Message:
    data = wire.render(query, reply, limit=limit, message_id=4711)
    assert len(data) <= limit
    return dns.message.from_wire(data)


def records(query: Query, count: int) -> list[bytes]:
    owner = owner_of(query, query.name)
    return [address_record(owner, parse_ip(f"10.0.{n // 256}.{n % 256}"), 30) for n in range(count)]


# Reading queries.


def test_a_query_is_read() -> None:
    query = a_query("Cart.SHOP.svc.cluster.local", "AAAA")
    assert query.name == NAME
    assert query.rtype == dns.rdatatype.AAAA
    assert query.rclass == dns.rdataclass.IN
    assert query.opt is None
    assert b"Cart\x04SHOP" in query.question


@pytest.mark.parametrize(
    ("rtype", "name"),
    [("A", "a"), ("AAAA", "aaaa"), ("HTTPS", "https"), ("TYPE65280", "unknown"), ("ANY", "any")],
)
def test_types_have_names(rtype: str, name: str) -> None:
    assert a_query(rtype=rtype).type_name == name


@pytest.mark.parametrize(
    ("edns", "expected", "limit"),
    [
        ({"use_edns": 0, "payload": 1232}, Opt(1232, 0, dnssec_ok=False), 1232),
        ({"use_edns": 0, "payload": 4096, "want_dnssec": True}, Opt(4096, 0, dnssec_ok=True), 4096),
        (
            {"payload": 1400, "options": [dns.edns.GenericOption(10, b"a cookie")]},
            Opt(1400, 0, dnssec_ok=False),
            1400,
        ),
        ({"use_edns": 3, "payload": 100}, Opt(100, 3, dnssec_ok=False), 512),
        ({}, None, 512),
    ],
)
def test_what_edns_says_is_read(edns: dict[str, object], expected: Opt | None, limit: int) -> None:
    query = a_query(**edns)
    assert query.opt == expected
    assert query.udp_limit == limit


def test_the_root_is_a_name() -> None:
    assert a_query(".", "NS").name in {"", "."}


def test_odd_labels_are_escaped_and_so_never_mistaken_for_several() -> None:
    name = dns.name.Name([b"cart.shop", b"svc \xff", b""])
    assert a_query(name).name == r"cart\.shop.svc\032\255"


@pytest.mark.parametrize("size", range(12))
def test_less_than_a_header_deserves_no_answer(size: int) -> None:
    assert wire.parse_query(a_message().to_wire()[:size]) is None


def test_a_response_deserves_no_answer() -> None:
    message = a_message()
    assert wire.parse_query(dns.message.make_response(message).to_wire()) is None


@pytest.mark.parametrize("size", range(12, len(a_message(use_edns=0).to_wire())))
def test_a_query_cut_anywhere_is_malformed(size: int) -> None:
    reply = refusal_of(a_message(use_edns=0).to_wire()[:size])
    assert reply.rcode() == dns.rcode.FORMERR
    assert reply.id == 4711


@pytest.mark.parametrize("opcode", [dns.opcode.NOTIFY, dns.opcode.UPDATE, dns.opcode.STATUS])
def test_other_operations_are_not_implemented(opcode: dns.opcode.Opcode) -> None:
    message = a_message(rtype="SOA")
    message.set_opcode(opcode)
    refused = wire.parse_query(message.to_wire())
    assert isinstance(refused, Refused)
    assert refused.rcode is Rcode.NOTIMP
    assert refused.reply[3] & 0xF == Rcode.NOTIMP
    assert refused.reply[12:] == message.to_wire()[12:]


def test_an_operation_without_a_question_is_refused_without_one() -> None:
    refused = wire.parse_query(b"\0\1\x28\0" + bytes(8))
    assert isinstance(refused, Refused)
    assert refused.reply == b"\0\1\xa8\x84" + bytes(8)


def test_an_operation_with_a_broken_question_is_refused_without_it() -> None:
    refused = wire.parse_query(b"\0\1\x28\0\0\1" + bytes(6) + b"\x3f")
    assert isinstance(refused, Refused)
    assert refused.reply == b"\0\1\xa8\x84" + bytes(8)


@pytest.mark.parametrize("questions", [0, 2])
def test_one_question_is_the_rule(questions: int) -> None:
    message = a_message()
    message.question = message.question * questions
    assert refusal_of(message.to_wire()).rcode() == dns.rcode.FORMERR


def test_a_compressed_name_in_the_question_is_malformed() -> None:
    data = b"\0\1\1\0\0\1" + bytes(6) + b"\1a\xc0\x0b\0\1\0\1"
    assert refusal_of(data).rcode() == dns.rcode.FORMERR


@pytest.mark.parametrize(
    "opts",
    [
        pytest.param(b"\0\0\x29\x04\xd0\0\0\0\0\0\0" * 2, id="twice"),
        pytest.param(b"\1a\0\0\x29\x04\xd0\0\0\0\0\0\0", id="with a name"),
    ],
)
def test_a_wrong_opt_is_malformed(opts: bytes) -> None:
    data = bytearray(a_message().to_wire() + opts)
    data[11] = 2 if opts.startswith(b"\0") else 1
    assert refusal_of(bytes(data)).rcode() == dns.rcode.FORMERR


def test_many_records_in_a_query_are_malformed() -> None:
    data = bytearray(a_message().to_wire())
    data[9] = wire.RECORDS_IN_QUERY_MAX + 1
    assert refusal_of(bytes(data) + bytes(400)).rcode() == dns.rcode.FORMERR


def test_other_records_in_a_query_are_passed_over() -> None:
    message = a_message(use_edns=0)
    for name in (f"{NAME}.", f"x.{NAME}.", "example.org."):
        message.authority.append(dns.rrset.from_text(name, 1, "IN", "A", "192.0.2.1"))
    data = message.to_wire()
    assert data.count(b"\xc0\x0c") == 2
    query = wire.parse_query(data)
    assert isinstance(query, Query)
    assert query.opt is not None


@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_query_or_are_not(data: bytes) -> None:
    read = wire.parse_query(data)
    if isinstance(read, Refused):
        assert read.reply[:2] == data[:2]
        assert read.reply[2] & 0x80


@given(rest=st.binary(max_size=80), counts=st.tuples(*[st.integers(0, 3)] * 4))
def test_any_bytes_after_a_header_are_a_query_or_are_not(
    rest: bytes, counts: tuple[int, ...]
) -> None:
    header = b"\x12\x67\1\0" + b"".join(count.to_bytes(2, "big") for count in counts)
    assert wire.parse_query(header + rest) is not None


@given(labels=st.lists(st.binary(min_size=1, max_size=20), max_size=8), rtype=st.integers(0, 65535))
def test_what_dnspython_writes_is_read(labels: list[bytes], rtype: int) -> None:
    name = dns.name.Name([*labels, b""])
    message = dns.message.make_query(name, dns.rdatatype.RdataType.make(rtype))
    query = wire.parse_query(message.to_wire())
    assert isinstance(query, Query)
    assert query.rtype == rtype
    assert dns.name.from_text(query.name, dns.name.root) == name
    reply = wire.render(query, Reply(), limit=512, message_id=message.id)
    assert dns.message.from_wire(reply).question == message.question


# Building answers.


def test_an_answer_has_the_flags_of_the_spec() -> None:
    query = a_query()
    reply = rendered(query, Reply(answers=records(query, 1)))
    assert reply.id == 4711
    assert dns.flags.to_text(reply.flags) == "QR AA RD RA"
    assert [str(rrset) for rrset in reply.answer] == [f"{NAME}. 30 IN A 10.0.0.0"]
    assert (reply.authority, reply.additional, reply.opt) == ([], [], None)


def test_recursion_and_checking_are_copied() -> None:
    message = a_message()
    message.flags = dns.flags.CD
    query = wire.parse_query(message.to_wire())
    assert isinstance(query, Query)
    assert dns.flags.to_text(rendered(query, Reply()).flags) == "QR AA RA CD"


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ({"use_edns": 0, "payload": 1232}, (1232, 0, False)),
        ({"use_edns": 0, "payload": 100, "want_dnssec": True}, (512, 0, True)),
        ({"use_edns": 1, "payload": 4096}, (4096, 0, False)),
    ],
)
def test_opt_is_answered_with_opt(
    asked: dict[str, object],
    answered: tuple[int, int, bool],
) -> None:
    reply = rendered(a_query(**asked), Reply())
    assert reply.opt is not None
    assert (reply.payload, reply.edns, bool(reply.ednsflags & dns.flags.DO)) == answered


def test_response_codes_beyond_the_header_are_in_opt() -> None:
    reply = rendered(a_query(use_edns=1), Reply(rcode=Rcode.BADVERS, is_authoritative=False))
    assert reply.rcode() == dns.rcode.BADVERS
    assert not reply.flags & dns.flags.AA


def test_an_error_has_the_question_and_nothing_else() -> None:
    reply = dns.message.from_wire(wire.error(a_query(), Rcode.SERVFAIL, 4711))
    assert (reply.id, reply.rcode()) == (4711, dns.rcode.SERVFAIL)
    assert [str(question) for question in reply.question] == [f"{NAME}. IN A"]
    assert dns.flags.to_text(reply.flags) == "QR RD RA"


@pytest.mark.parametrize(
    ("edns", "limit", "fit"),
    [({}, 512, (512 - 12 - 33) // 16), ({"use_edns": 0, "payload": 1232}, 1232, 73)],
)
def test_what_does_not_fit_is_left_out_whole(edns: dict[str, object], limit: int, fit: int) -> None:
    query = a_query(**edns)
    reply = rendered(query, Reply(answers=records(query, 200)), limit=query.udp_limit)
    assert query.udp_limit == limit
    assert reply.flags & dns.flags.TC
    assert len(reply.answer[0]) == fit


def test_tcp_has_room_for_thousands() -> None:
    query = a_query()
    reply = rendered(query, Reply(answers=records(query, 4000)))
    assert not reply.flags & dns.flags.TC
    assert len(reply.answer[0]) == 4000


def test_an_authority_that_does_not_fit_is_left_out_without_a_word() -> None:
    query = a_query()
    reply = rendered(query, Reply(authority=tuple(records(query, 40))), limit=512)
    assert not reply.flags & dns.flags.TC
    assert 0 < len(reply.authority[0]) < 40


@pytest.mark.parametrize("has_edns", [False, True])
def test_additional_records_come_last_and_fill_what_room_is_left(*, has_edns: bool) -> None:
    query = a_query(use_edns=0 if has_edns else -1)
    first, *others = records(query, 60)
    reply = rendered(query, Reply(answers=[first], additional=tuple(others)), limit=512)
    assert not reply.flags & dns.flags.TC
    assert [len(rrset) for rrset in reply.answer] == [1]
    room = 512 - 12 - 33 - 16 - (11 if has_edns else 0)
    assert [len(rrset) for rrset in reply.additional] == [room // 16]
    assert (reply.opt is not None) == has_edns


@given(count=st.integers(0, 120), limit=st.integers(512, 2000), has_edns=st.booleans())
def test_any_answer_within_any_limit_can_be_read(count: int, limit: int, *, has_edns: bool) -> None:
    query = a_query(use_edns=0 if has_edns else -1)
    reply = rendered(query, Reply(answers=records(query, count)), limit)
    kept = len(reply.answer[0]) if reply.answer else 0
    assert bool(reply.flags & dns.flags.TC) == (kept < count)


# Recognizing answers.


def an_answer(question: bytes = b"\4Cart\0\0\x41\0\1", **changes: object) -> bytes:
    fields: dict[str, object] = {"number": 7, "flags": 0x8180, "questions": 1} | changes
    head = b"".join(int(str(fields[key])).to_bytes(2, "big") for key in fields)
    return head + bytes(6) + question


QUESTION = b"\4Cart\0\0\x41\0\1"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(an_answer(), True, id="ours"),
        pytest.param(an_answer(b"\4cART\0\0\x41\0\1"), True, id="another case"),
        pytest.param(an_answer(number=8), False, id="another id"),
        pytest.param(an_answer(flags=0x0180), False, id="a query"),
        pytest.param(an_answer(flags=0xA180), False, id="another operation"),
        pytest.param(an_answer(b"\4Carp\0\0\x41\0\1"), False, id="another name"),
        pytest.param(an_answer(b"\4Cart\0\0\x61\0\1"), False, id="a type that looks alike"),
        pytest.param(an_answer(b"\4Cart\0\0\x41\0\3"), False, id="another class"),
        pytest.param(an_answer(b"\4Cart\0\0\x41"), False, id="cut"),
        pytest.param(an_answer(questions=2), False, id="two questions"),
        pytest.param(an_answer(b"", questions=0), False, id="no question"),
        pytest.param(an_answer(b"", questions=0, flags=0x8181), True, id="FORMERR, no question"),
        pytest.param(an_answer(b"", questions=0, flags=0x8185), True, id="REFUSED, no question"),
        pytest.param(an_answer(b"", questions=0, flags=0x8189), True, id="NOTAUTH, no question"),
        pytest.param(an_answer(b"", questions=0, flags=0x8183), False, id="NXDOMAIN, no question"),
        pytest.param(an_answer()[:11], False, id="no header"),
    ],
)
def test_what_answers_a_question(data: bytes, expected: bool) -> None:
    assert wire.is_answer(data, 7, QUESTION) is expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(an_answer(b"", questions=0), True, id="no question"),
        pytest.param(an_answer(), True, id="the question again"),
        pytest.param(an_answer(number=8), False, id="another id"),
        pytest.param(an_answer(flags=0x0180), False, id="a query"),
        pytest.param(an_answer()[:11], False, id="no header"),
    ],
)
def test_what_goes_on_with_an_answer(data: bytes, expected: bool) -> None:
    assert wire.is_continuation(data, 7) is expected
    assert not wire.is_continuation(b"", 0)


@given(data=st.binary(max_size=64))
def test_random_bytes_are_hardly_an_answer(data: bytes) -> None:
    assert not wire.is_answer(data, 7, QUESTION) or data[:2] == b"\0\7"


def test_the_header_of_an_answer_is_read() -> None:
    message = dns.message.make_response(a_message())
    message.set_rcode(dns.rcode.NXDOMAIN)
    message.answer.append(dns.rrset.from_text(f"{NAME}.", 1, "IN", "A", "192.0.2.1", "192.0.2.2"))
    data = message.to_wire()
    assert wire.message_id_of(data) == 4711
    assert wire.rcode_of(data) == Rcode.NXDOMAIN
    assert wire.answer_count(data) == 2
    assert dns.message.from_wire(wire.with_id(data, 1)).id == 1


# TCP.


@given(messages=st.lists(st.binary(max_size=300), max_size=5), cuts=st.lists(st.integers(0, 2000)))
def test_messages_are_found_however_the_stream_is_cut(
    messages: list[bytes], cuts: list[int]
) -> None:
    splitter = MessageSplitter()
    stream = b"".join(map(wire.framed, messages))
    assert [m for piece in cut(stream, cuts) for m in splitter.feed(piece)] == messages
    assert splitter.is_empty


def test_an_incomplete_message_is_kept() -> None:
    splitter = MessageSplitter()
    assert list(splitter.feed(b"\0\3ab")) == []
    assert not splitter.is_empty
    assert list(splitter.feed(b"c\0\0")) == [b"abc", b""]

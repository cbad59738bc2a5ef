from __future__ import annotations

import dns.message
import dns.name
import pytest
from hypothesis import example, given, strategies as st

from ztunnel.model.network import parse_ip
from ztunnel.wire import dns as wire, dns_records
from ztunnel.wire.dns import Query, Reply

NAME = "cart.shop"


def a_query(name: str = NAME) -> Query:
    query = wire.parse_query(dns.message.make_query(name, "A").to_wire())
    assert isinstance(query, Query)
    return query


def printed(query: Query, *answers: bytes) -> list[str]:
    data = wire.render(query, Reply(answers=answers), limit=65535, message_id=0)
    return [str(rrset) for rrset in dns.message.from_wire(data).answer]


def test_records_are_what_dnspython_reads() -> None:
    query = a_query()
    owner = dns_records.owner_of(query, NAME)
    assert printed(
        query,
        dns_records.address_record(owner, parse_ip("10.0.0.1"), 30),
        dns_records.address_record(owner, parse_ip("2001:db8::1"), 31),
        dns_records.service_record(owner, b"\5web-0\7example\3org\0", 8080, 32, 50),
        dns_records.pointer_record(owner, "example.org", 33),
        dns_records.zone_record("example.org", 34),
    ) == [
        "cart.shop. 30 IN A 10.0.0.1",
        "cart.shop. 31 IN AAAA 2001:db8::1",
        "cart.shop. 32 IN SRV 0 50 8080 web-0.example.org.",
        "cart.shop. 33 IN PTR example.org.",
        "example.org. 34 IN SOA ns.dns.example.org. hostmaster.example.org. 1 7200 1800 86400 34",
    ]


def test_of_many_addresses_each_has_its_record() -> None:
    query = a_query()
    owner = dns_records.owner_of(query, NAME)
    ips = [parse_ip("10.0.0.1"), parse_ip("2001:db8::1"), parse_ip("10.0.0.2")]
    records = dns_records.address_records(owner, ips, 30)
    assert records == [dns_records.address_record(owner, ip, 30) for ip in ips]
    assert dns_records.address_records(owner, [], 30) == []


def test_an_owner_that_the_question_names_is_a_pointer() -> None:
    assert dns_records.owner_of(a_query(), NAME) == b"\xc0\x0c"


def test_an_owner_is_lower_case_whatever_the_question_is() -> None:
    query = a_query("CART.shop")
    owner = dns_records.owner_of(query, query.name)
    record = dns_records.address_record(owner, parse_ip("10.0.0.1"), 30)
    assert printed(query, record) == ["cart.shop. 30 IN A 10.0.0.1"]


def test_an_owner_that_only_begins_like_the_question_is_spelled_out() -> None:
    assert dns_records.owner_of(a_query("cart.shop.x"), NAME) == b"\4cart\4shop\0"


@pytest.mark.parametrize("asked", ["cart.shop.svc", "CART.shop.svc"])
def test_the_target_of_a_cname_can_be_pointed_to(asked: str) -> None:
    query = a_query(asked)
    owner = dns_records.owner_of(query, query.name)
    record, target = dns_records.cname_record(query, owner, NAME, 30)
    address = dns_records.address_record(target, parse_ip("10.0.0.1"), 30)
    assert printed(query, record, address) == [
        "cart.shop.svc. 30 IN CNAME cart.shop.",
        "cart.shop. 30 IN A 10.0.0.1",
    ]


@pytest.mark.parametrize("name", ["a" * 64, ".".join(["a" * 60] * 5), "a..b", r"\999"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a DNS name"):
        dns_records.encode_name(name)


def test_names_may_end_with_a_dot_or_not() -> None:
    assert dns_records.encode_name("a.b") == dns_records.encode_name("a.b.") == b"\1a\1b\0"


def test_the_root_is_a_name() -> None:
    assert dns_records.encode_name("") == dns_records.encode_name(".") == b"\0"


HOSTS = [
    "web-0.web.shop.svc.cluster.local",
    "a.b",
    "alone",
    f"{'x' * 63}.example",
    r"dot\.ted.example",
    "two words.example",
    "UPPER.example",
    f"{'a.' * 126}a",
]


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_is_encoded_as_any_name(host: str) -> None:
    assert dns_records.encode_host(host) == dns_records.encode_name(host)


@pytest.mark.parametrize(
    "host",
    [f"{'x' * 64}.example", ".example", "a..b", f"{'a.' * 127}a", f"{'x' * 63}.{'a.' * 95}b"],
)
def test_what_is_no_name_is_no_host(host: str) -> None:
    with pytest.raises(ValueError, match="not a DNS name"):
        dns_records.encode_name(host)
    with pytest.raises(ValueError, match="not a DNS name"):
        dns_records.encode_host(host)


@example(host="@..")
@example(host="@.@")
@given(host=st.text(alphabet="ab.-_\\ é*@", max_size=40))
def test_any_text_is_a_host_as_it_is_a_name(host: str) -> None:
    try:
        encoded = dns_records.encode_name(host)
    except ValueError:
        with pytest.raises(ValueError, match="not a DNS name"):
            dns_records.encode_host(host)
    else:
        assert dns_records.encode_host(host) == encoded

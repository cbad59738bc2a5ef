from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, strategies as st

from ztunnel.model.identity import Namespace
from ztunnel.model.network import Endpoint, HostPort, Port
from ztunnel.model.workload import Locality, Workload
from ztunnel.wire.headers import (
    Baggage,
    Forwarded,
    Traceparent,
    build_baggage,
    build_forwarded,
    first_value,
    format_authority,
    new_traceparent,
    parse_authority,
    parse_baggage,
    parse_forwarded,
    values_of,
)

SHOP = Workload(
    cluster_id="Kubernetes",
    namespace=Namespace("shop"),
    workload_name="cart",
    workload_type="deployment",
    canonical_name="cart-app",
    canonical_revision="v1",
    locality=Locality("eu", "eu-1", "rack"),
)


def test_fields_are_found_by_name_in_order():
    headers = [(b"a", b"1"), (b"b", b"2"), (b"a", b"3")]
    assert values_of(headers, b"a") == [b"1", b"3"]
    assert first_value(headers, b"a") == b"1"
    assert first_value(headers, b"c") is None


@pytest.mark.parametrize(
    ("text", "target"),
    [
        (b"10.0.0.1:8080", Endpoint.parse("10.0.0.1:8080")),
        (b"[2001:db8::1]:8080", Endpoint.parse("[2001:db8::1]:8080")),
        (b"[::ffff:10.0.0.1]:80", Endpoint.parse("10.0.0.1:80")),
        (
            b"host.ns.svc.cluster.local:8080",
            HostPort("host.ns.svc.cluster.local", Port(8080)),
        ),
        (b"Example.COM:1", HostPort("example.com", Port(1))),
        (b"example.com.:65535", HostPort("example.com.", Port(65535))),
        (b"256.1.1.1:80", HostPort("256.1.1.1", Port(80))),
    ],
)
def test_an_authority_is_an_address_or_a_host_with_a_port(text: bytes, target: Endpoint | HostPort):
    assert parse_authority(text) == target


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b":80",
        b"10.0.0.1",
        b"10.0.0.1:",
        b"10.0.0.1:0",
        b"10.0.0.1:65536",
        b"10.0.0.1:-1",
        b"10.0.0.1:+80",
        b"10.0.0.1: 80",
        b"10.0.0.1:\xef\xbc\x98\xef\xbc\x90",
        b"10.0.0.1:" + b"9" * 5000,
        b"::1:80",
        b"[::1]",
        b"[::1]80",
        b"[10.0.0.1:80",
        b"[example.com]:80",
        b"[fe80::1%eth0]:80",
        b"fe80::1%eth0:80",
        b"user@example.com:80",
        b"http://example.com:80",
        b"exa mple.com:80",
        b"example.com/x:80",
        b"-example.com:80",
        b"a" * 254 + b":80",
        "bücher.example:80".encode(),
    ],
)
def test_anything_else_is_no_authority(text: bytes):
    with pytest.raises(ValueError, match="authority"):
        parse_authority(text)


endpoints = st.builds(Endpoint, st.ip_addresses(), st.integers(1, 65535).map(Port))
hosts = st.builds(
    HostPort,
    st.from_regex(r"[a-z0-9]{1,20}(\.[a-z]{1,10}){0,3}", fullmatch=True),
    st.just(Port(80)),
)


@given(target=endpoints | hosts)
def test_an_authority_survives_print_and_parse(target: Endpoint | HostPort):
    parsed = parse_authority(format_authority(target))
    assert str(parsed) == str(target) or parsed == Endpoint.parse(str(target))


@given(junk=st.binary(max_size=60))
def test_any_bytes_are_an_authority_or_a_value_error(junk: bytes):
    try:
        target = parse_authority(junk)
    except ValueError:
        return
    assert 0 < target.port < 65536


def test_baggage_names_what_is_known_in_the_references_order():
    assert build_baggage(SHOP) == (
        b"k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=cart,"
        b"service.name=cart-app,service.version=v1,cloud.region=eu,cloud.availability_zone=eu-1"
    )


def test_baggage_of_an_unknown_workload_is_empty():
    assert build_baggage(Workload()) == b""


@pytest.mark.parametrize("kind", ["deployment", "CronJob", "pod", "Job"])
def test_every_kind_of_workload_names_itself(kind: str):
    baggage = build_baggage(Workload(workload_name="x", workload_type=kind))
    assert baggage == f"k8s.{kind.lower()}.name=x".encode()
    assert parse_baggage([baggage]) == Baggage(workload_name="x")


def test_baggage_survives_print_and_parse():
    assert parse_baggage([build_baggage(SHOP)]) == Baggage(
        cluster_id="Kubernetes",
        namespace="shop",
        workload_name="cart",
        canonical_name="cart-app",
        canonical_revision="v1",
        region="eu",
        zone="eu-1",
    )


@given(name=st.text(min_size=1, max_size=60), zone=st.text(max_size=60))
def test_no_value_breaks_out_of_its_member(name: str, zone: str):
    try:
        (name + zone).encode()
    except UnicodeEncodeError:
        return
    workload = Workload(canonical_name=name, locality=Locality(zone=zone))
    baggage = build_baggage(workload)
    assert baggage.isascii()
    assert not set(baggage) & set(b"\r\n\0 ")
    shown = Baggage(
        canonical_name=name if name.isprintable() else None,
        zone=zone if zone and zone.isprintable() else None,
    )
    assert parse_baggage([baggage]) == shown


@pytest.mark.parametrize(
    ("values", "baggage"),
    [
        pytest.param([], Baggage(), id="no field"),
        pytest.param([b""], Baggage(), id="empty field"),
        pytest.param(
            [b"service.name=a", b"service.version=b"],
            Baggage(canonical_name="a", canonical_revision="b"),
            id="two fields",
        ),
        pytest.param(
            [b"service.name=a,service.name=b"], Baggage(canonical_name="b"), id="later wins"
        ),
        pytest.param([b"k8s.pod.name=a,k8s.job.name=b"], Baggage(workload_name="b"), id="kinds"),
        pytest.param(
            [b"service.name=a,service.name="], Baggage(canonical_name="a"), id="empty value"
        ),
        pytest.param([b"service.name,cloud.region"], Baggage(), id="no value"),
        pytest.param([b"service.name=a=b"], Baggage(canonical_name="a"), id="second part only"),
        pytest.param(
            [b" service.name = a ; p=1"], Baggage(canonical_name="a"), id="blanks, property"
        ),
        pytest.param([b"service.name=a%20b%2Cc"], Baggage(canonical_name="a b,c"), id="escapes"),
        pytest.param([b"service.name=a%zz"], Baggage(canonical_name="a%zz"), id="no escape"),
        pytest.param([b"service.name=%ff"], Baggage(), id="not UTF-8"),
        pytest.param([b"service.name=a%0ab"], Baggage(), id="line break"),
        pytest.param([b"service.name=a,cloud.region=\xff"], Baggage(), id="not ASCII voids all"),
        pytest.param([b"SERVICE.NAME=a,other=b"], Baggage(), id="unknown keys"),
        pytest.param([b"service.name=" + b"a" * 257], Baggage(), id="a long value"),
        pytest.param([b"service.name=a," + b"x" * 8192], Baggage(), id="a long list"),
    ],
)
def test_baggage_of_a_peer(values: list[bytes], baggage: Baggage):
    assert parse_baggage(values) == baggage


@given(values=st.lists(st.binary(max_size=60), max_size=4))
def test_any_bytes_are_some_baggage(values: list[bytes]):
    parse_baggage([b"service.name=" + value for value in values])


@pytest.mark.parametrize(
    ("source", "host", "text"),
    [
        ("127.0.0.1:80", None, b'for="127.0.0.1:80"'),
        ("[::1]:80", None, b'for="[::1]:80"'),
        ("127.0.0.1:80", "example.com", b'for="127.0.0.1:80";host=example.com'),
        ("127.0.0.1:80", "evil\r\nx: y", b'for="127.0.0.1:80"'),
        ("127.0.0.1:80", "a;for=b", b'for="127.0.0.1:80"'),
    ],
)
def test_forwarded_as_the_reference_prints_it(source: str, host: str | None, text: bytes):
    assert build_forwarded(Endpoint.parse(source), host) == text


ONE = Endpoint.parse("127.0.0.1:80")


@pytest.mark.parametrize(
    ("text", "forwarded"),
    [
        (b'for="127.0.0.1:80";host=example.com', Forwarded(ONE, "example.com")),
        (b'host="example.com" ; for=127.0.0.1:80', Forwarded(ONE, "example.com")),
        (b"by=x; host=first;host=second", Forwarded(None, "first")),
        (b"host=", Forwarded()),
        (b'host=""', Forwarded()),
        (b"HOST=x", Forwarded()),
        (b"host=a b", Forwarded()),
        (b"host=" + b"a" * 254, Forwarded()),
        (b'for="unknown"', Forwarded()),
        (b"host=b\xc3\xbccher", Forwarded()),
        (b"", Forwarded()),
    ],
)
def test_forwarded_of_a_peer(text: bytes, forwarded: Forwarded):
    assert parse_forwarded(text) == forwarded


@given(junk=st.binary(max_size=60))
def test_any_bytes_are_some_forwarded(junk: bytes):
    parse_forwarded(junk)
    parse_forwarded(b"for=" + junk)


def test_a_new_traceparent_is_random_and_well_formed():
    one, two = new_traceparent(Random(1)), new_traceparent(Random(2))
    assert one != two
    assert len(one) == 55
    assert Traceparent.parse(one) is not None
    assert one.startswith(b"00-")
    assert one.endswith(b"-00")


TRACE = b"0af7651916cd43dd8448eb211c80319c"
PARENT = b"b7ad6b7169203331"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"00-" + b"0" * 52, id="the one that crashes the reference"),
        pytest.param(b"00-" + TRACE + b"-" + PARENT, id="three parts"),
        pytest.param(b"00-" + TRACE + b"-" + PARENT + b"-01-x", id="five parts"),
        pytest.param(b"ff-" + TRACE + b"-" + PARENT + b"-01", id="version ff"),
        pytest.param(b"00-" + b"0" * 32 + b"-" + PARENT + b"-01", id="trace of zeros"),
        pytest.param(b"00-" + TRACE + b"-" + b"0" * 16 + b"-01", id="parent of zeros"),
        pytest.param(b"00-" + TRACE.upper() + b"-" + PARENT + b"-01", id="upper case"),
        pytest.param(b"00-" + TRACE + b"-" + PARENT + b"-0g", id="no hex"),
        pytest.param(b"00-" + TRACE + b"-" + PARENT + b"-01\n", id="a newline"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_a_crafted_traceparent_is_absent(text: bytes):
    assert Traceparent.parse(text) is None


def test_a_peers_traceparent_is_read():
    text = b"00-" + TRACE + b"-" + PARENT + b"-01"
    assert Traceparent.parse(text) == Traceparent(TRACE.decode(), PARENT.decode(), "01")


@given(text=st.binary(max_size=60) | st.from_regex(rb"[0-9a-f-]{55}", fullmatch=True))
def test_any_bytes_are_a_traceparent_or_none(text: bytes):
    parsed = Traceparent.parse(text)
    assert parsed is None or bytes(parsed)[2:] == text[2:]

from __future__ import annotations

import random
from contextlib import suppress

import pytest
from hypothesis import given, strategies as st

from tests.support.builders import a_service, a_workload
from ztunnel.errors import RejectedError
from ztunnel.model.network import Endpoint, HostPort, Network, Port
from ztunnel.proxy.requests import TunnelRequest, request_head, response_headers, tunnel_request
from ztunnel.wire.headers import new_traceparent, parse_baggage

SOURCE = Endpoint.parse("192.0.2.1:40000")
TRACE = new_traceparent(random.Random(1))


def request(**more):
    head = request_head(
        more.pop("authority", Endpoint.parse("192.0.2.10:8080")),
        more.pop("workload", a_workload("frontend-0")),
    )
    return tunnel_request(
        head,
        **{
            "source": SOURCE,
            "service": None,
            "traceparent": TRACE,
        }
        | more,
    )


def test_a_request_is_a_connect_to_the_authority() -> None:
    headers = dict(request())
    assert headers[b":method"] == b"CONNECT"
    assert headers[b":authority"] == b"192.0.2.10:8080"
    assert headers[b"traceparent"] == bytes(TRACE)
    assert b"x-forwarded-network" not in headers
    assert {b":scheme", b":path"}.isdisjoint(headers)  # RFC 9113 s8.5


def test_pseudo_headers_come_first() -> None:
    names = [name for name, _ in request()]
    assert names[:2] == [b":method", b":authority"]


def test_a_request_says_which_service_was_meant_and_who_asks() -> None:
    read = TunnelRequest.read(request(service=a_service("cart.shop.svc.cluster.local")))
    assert read.forwarded_host == "cart.shop.svc.cluster.local"
    assert read.baggage().namespace == "shop"


def test_an_inner_request_names_our_network() -> None:
    assert dict(request(network=Network("north")))[b"x-forwarded-network"] == b"north"


@pytest.mark.parametrize(
    ("authority", "read"),
    [
        (b"192.0.2.10:8080", Endpoint.parse("192.0.2.10:8080")),
        (b"[2001:db8::1]:80", Endpoint.parse("[2001:db8::1]:80")),
        (b"cart.shop.svc:80", HostPort("cart.shop.svc", Port(80))),
    ],
)
def test_where_a_client_wants_to_go(authority: bytes, read: object) -> None:
    headers = [(b":method", b"CONNECT"), (b":authority", authority)]
    assert TunnelRequest.read(headers).authority() == read


@pytest.mark.parametrize(
    ("headers", "text"),
    [
        ([(b":method", b"GET")], "expected method CONNECT, got GET"),
        ([(b":method", b"\xff" * 100)], "got " + r"\\xff" * 32),
        ([], "expected method CONNECT"),
        ([(b":method", b"CONNECT")], "no valid authority pseudo header"),
        ([(b":method", b"CONNECT"), (b":authority", b"\xff:1")], "no valid authority"),
    ],
)
def test_what_is_not_a_usable_connect_is_400(headers: list, text: str) -> None:
    with pytest.raises(RejectedError, match=text) as caught:
        TunnelRequest.read(headers).authority()
    assert caught.value.status == 400


@given(headers=st.lists(st.tuples(st.binary(max_size=30), st.binary(max_size=60))))
def test_hostile_headers_raise_nothing_but_the_declared_error(headers: list) -> None:
    read = TunnelRequest.read([(b":method", b"CONNECT"), *headers])
    read.baggage()
    read.is_from_gateway(Network("x"))
    with suppress(RejectedError):
        read.authority()


@pytest.mark.parametrize(
    ("value", "crossed"),
    [(None, False), (b"north", False), (b"NORTH", False), (b"south", True), (b"", True)],
)
def test_a_request_that_crossed_networks_is_known_by_its_header(
    value: bytes | None, *, crossed: bool
) -> None:
    headers = [] if value is None else [(b"x-forwarded-network", value)]
    assert TunnelRequest.read(headers).is_from_gateway(Network("north")) is crossed


def test_an_answer_says_who_we_are_if_that_is_wanted() -> None:
    assert response_headers(None) == []
    [(name, value)] = response_headers(a_workload("cart-0", ns="bank"))
    assert name == b"baggage"
    assert parse_baggage([value]).namespace == "bank"

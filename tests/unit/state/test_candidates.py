from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from tests.support.builders import a_service
from ztunnel.model.identity import Namespace
from ztunnel.model.service import Service, Visibility
from ztunnel.state.candidates import Candidates

HOST = "api.example.com"


def named(ns: str, *, canonical: bool = False, hidden: bool = False, host: str = HOST) -> Service:
    visibility = Visibility.NAMESPACE if hidden else Visibility.PUBLIC
    return a_service(host, ns=ns, canonical=canonical, visibility=visibility)


def chosen(
    services: list[Service], client: str | None, preferred: str | None = None
) -> Service | None:
    candidates = Candidates()
    for service in services:
        candidates.put(service)
    return candidates.choose(
        None if client is None else Namespace(client),
        None if preferred is None else Namespace(preferred),
    )


A, B, C = named("a"), named("b"), named("c")
CANONICAL, CANONICAL_TOO = named("d", canonical=True), named("e", canonical=True)
HIDDEN = named("h", hidden=True)


@pytest.mark.parametrize(
    ("services", "client", "preferred", "expected"),
    [
        pytest.param([], "a", None, None, id="nobody"),
        pytest.param([A, B], "b", None, B, id="the client's namespace"),
        pytest.param([A, CANONICAL], "a", None, A, id="own namespace before canonical"),
        pytest.param([A, CANONICAL, B], "x", None, CANONICAL, id="canonical"),
        pytest.param([CANONICAL, CANONICAL_TOO], "x", None, CANONICAL_TOO, id="last canonical"),
        pytest.param([A, B], "x", None, A, id="first stored"),
        pytest.param([A, B], "x", "b", B, id="preferred namespace"),
        pytest.param([A, CANONICAL], "x", "a", CANONICAL, id="canonical before preferred"),
        pytest.param([A, B], "x", "y", A, id="preferred namespace has none"),
        pytest.param([A, HIDDEN], "x", "h", A, id="preferred but invisible"),
        pytest.param([A, HIDDEN], None, "h", HIDDEN, id="preferred, seen by all"),
        pytest.param([HIDDEN], "x", None, None, id="invisible"),
        pytest.param([HIDDEN, A], "x", None, A, id="the visible one"),
        pytest.param([HIDDEN], "h", None, HIDDEN, id="visible at home"),
        pytest.param([HIDDEN, A], None, None, HIDDEN, id="visibility off"),
    ],
)
def test_who_is_meant(
    services: list[Service], client: str | None, preferred: str | None, expected: Service | None
) -> None:
    assert chosen(services, client, preferred) == expected


def test_a_replaced_service_keeps_its_place() -> None:
    candidates = Candidates()
    for service in (A, B, named("a", host=HOST)):
        candidates.put(service)
    assert [service.namespace for service in candidates.all()] == ["a", "b"]
    assert len(candidates) == 2


def test_the_remembered_choice_follows_changes() -> None:
    candidates = Candidates()
    candidates.put(A)
    assert candidates.choose(Namespace("x")) == A
    candidates.put(CANONICAL)
    assert candidates.choose(Namespace("x")) == CANONICAL
    candidates.remove(CANONICAL)
    assert candidates.choose(Namespace("x")) == A
    candidates.remove(A)
    assert candidates.choose(Namespace("x")) is None
    assert candidates.inside(Namespace("a")) is None


def test_two_hosts_of_one_namespace_share_a_vip_without_flipping() -> None:
    first, second = named("a", host="one.example.com"), named("a", host="two.example.com")
    candidates = Candidates()
    candidates.put(first)
    candidates.put(second)
    candidates.put(first)
    assert candidates.choose(Namespace("a")) == first
    candidates.remove(first)
    assert candidates.choose(Namespace("a")) == second


a_named = st.builds(
    named, st.sampled_from("abc"), canonical=st.booleans(), hidden=st.booleans(), host=st.just(HOST)
)


@given(
    events=st.lists(st.tuples(st.booleans(), a_named), max_size=12),
    client=st.sampled_from([None, *"abcx"]),
    preferred=st.sampled_from([None, *"abx"]),
)
def test_changes_leave_what_building_it_anew_would_give(
    events: list[tuple[bool, Service]], client: str | None, preferred: str | None
) -> None:
    there: dict[str, Service] = {}
    candidates = Candidates()
    for is_put, service in events:
        if is_put:
            candidates.put(service)
            there[service.key] = service
        elif old := there.pop(service.key, None):
            candidates.remove(old)
        namespaces = (
            None if client is None else Namespace(client),
            None if preferred is None else Namespace(preferred),
        )
        assert list(candidates.all()) == list(there.values())
        assert len(candidates) == len(there)
        assert candidates.choose(*namespaces) == chosen(list(there.values()), client, preferred)

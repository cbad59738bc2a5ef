from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from cni.agent.errors import ExpiredError, KubeError
from cni.agent.mirror import Change, Changed, Mirror, Removed, decode_page
from cni.agent.objects import KubePod, decode_pod


def raw(name: str, version: int) -> dict[str, Any]:
    return {"metadata": {"name": name, "uid": f"u-{name}", "resourceVersion": str(version)}}


def pod(name: str, version: int) -> KubePod:
    return decode_pod(json.dumps(raw(name, version)).encode())


def line(kind: str, item: object) -> bytes:
    return json.dumps({"type": kind, "object": item}).encode()


def a_mirror(*pods: KubePod, version: str = "5") -> Mirror[KubePod]:
    mirror = Mirror(decode_pod)
    mirror.replace(pods, version)
    return mirror


def names(changes: list[Change[KubePod]]) -> list[tuple[str, str]]:
    return [(type(change).__name__, change.item.name) for change in changes]


def test_a_list_says_what_is_new_other_and_gone() -> None:
    mirror = a_mirror(pod("a", 1), pod("b", 1), pod("c", 1))
    changes = mirror.replace([pod("b", 1), pod("c", 2), pod("d", 3)], "9")
    assert names(changes) == [("Removed", "a"), ("Changed", "c"), ("Changed", "d")]
    assert mirror.version == "9"
    assert [change.before is None for change in changes if isinstance(change, Changed)] == [
        False,
        True,
    ]


def test_a_watch_goes_on_from_there() -> None:
    mirror = a_mirror(pod("a", 1))
    assert mirror.receive(line("ADDED", raw("b", 6))) == Changed(pod("b", 6), None)
    assert mirror.receive(line("MODIFIED", raw("b", 7))) == Changed(pod("b", 7), pod("b", 6))
    assert mirror.receive(line("DELETED", raw("b", 8))) == Removed(pod("b", 8))
    assert (mirror.version, set(mirror.items)) == ("8", {"u-a"})


def test_a_bookmark_only_moves_the_version() -> None:
    mirror = a_mirror()
    assert mirror.receive(line("BOOKMARK", {"metadata": {"resourceVersion": "99"}})) is None
    assert mirror.version == "99"


def test_an_expired_version_asks_for_a_list_and_keeps_what_we_have() -> None:
    mirror = a_mirror(pod("a", 1))
    with pytest.raises(ExpiredError, match="too old"):
        mirror.receive(line("ERROR", {"code": 410, "message": "too old"}))
    assert mirror.version is None
    assert set(mirror.items) == {"u-a"}


@pytest.mark.parametrize(
    "data",
    [
        line("ERROR", {"code": 500, "message": "etcd is down"}),
        line("NEWS", {}),
        line("ADDED", {"metadata": {"name": "x"}}),
        b"{",
        b"[]",
        b"\xff",
    ],
)
def test_other_errors_keep_the_version(data: bytes) -> None:
    mirror = a_mirror()
    with pytest.raises(KubeError):
        mirror.receive(data)
    assert mirror.version == "5"


def test_pages_tell_where_to_go_on_and_leave_out_what_cannot_be_read() -> None:
    body = {
        "metadata": {"resourceVersion": "3", "continue": "token"},
        "items": [raw("a", 1), {"metadata": {}}],
    }
    page = decode_page(json.dumps(body).encode(), decode_pod)
    assert (page.version, page.next, page.unreadable) == ("3", "token", 1)
    assert page.items == (pod("a", 1),)
    last = decode_page(b'{"metadata": {"resourceVersion": "3"}, "items": []}', decode_pod)
    assert last.next is None


def test_an_object_that_cannot_be_read_does_not_stop_those_after_it() -> None:
    mirror = a_mirror()
    broken = {"metadata": {"name": 1, "uid": "u", "resourceVersion": "6"}}
    assert mirror.receive(line("ADDED", broken)) is None
    assert (mirror.version, mirror.unreadable) == ("6", 1)


@given(st.binary(max_size=80))
def test_bytes_raise_only_the_declared_error(data: bytes) -> None:
    with pytest.raises(KubeError):
        a_mirror().receive(data)
    with pytest.raises(KubeError):
        decode_page(data, decode_pod)


EVENTS = st.lists(
    st.tuples(st.sampled_from(["put", "remove", "list"]), st.sampled_from("abc")), max_size=40
)


@given(EVENTS)
def test_it_agrees_with_the_server_after_any_history(events: list[tuple[str, str]]) -> None:
    server: dict[str, int] = {}
    mirror = a_mirror()
    told: dict[str, str] = {}
    for version, (event, name) in enumerate(events, 6):
        changes: list[Change[KubePod]] = []
        if event == "put":
            kind = "MODIFIED" if name in server else "ADDED"
            server[name] = version
            change = mirror.receive(line(kind, raw(name, version)))
            changes = [change] if change else []
        elif event == "remove" and name in server:
            del server[name]
            change = mirror.receive(line("DELETED", raw(name, version)))
            changes = [change] if change else []
        elif event == "list":  # after an interruption during which `name` came or went
            server.pop(name, None) or server.update({name: version})
            changes = mirror.replace([pod(one, at) for one, at in server.items()], str(version))
        for change in changes:
            if isinstance(change, Removed):
                told.pop(change.item.name, None)
            else:
                told[change.item.name] = change.item.version
        assert {item.name: item.version for item in mirror.items.values()} == told
        assert told == {one: str(at) for one, at in server.items()}

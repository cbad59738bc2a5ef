from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from ztunnel.dns.resolv_conf import ResolvConf


def test_resolvers_are_read_in_order_and_what_is_wrong_is_passed_over() -> None:
    text = """
# comment
search example.org
nameserver 192.0.2.1
nameserver\t2001:db8::1
  nameserver 192.0.2.2 # trailing
nameserver fe80::1%eth0
nameserver 169.254.20.10
nameserver nonsense
nameserver
options ndots:5
"""
    assert [str(server) for server in ResolvConf.parse(text).servers] == [
        "192.0.2.1:53",
        "[2001:db8::1]:53",
        "192.0.2.2:53",
        "169.254.20.10:53",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        (
            "search shop.svc.cluster.local svc.cluster.local",
            ("shop.svc.cluster.local", "svc.cluster.local"),
        ),
        ("search A.Example. .b . ", ("a.example", "b")),
        ("search a\nsearch b\tc", ("b", "c")),
        ("search a\nsearch", ()),
        ("domain a b", ("a",)),
        ("search a b\ndomain c", ("c",)),
        ("domain c\nsearch a b", ("a", "b")),
        ("search a\ndomain", ("a",)),
    ],
)
def test_the_last_search_list_counts(text: str, expected: tuple[str, ...]) -> None:
    assert ResolvConf.parse(text).search == expected


@given(text=st.text())
def test_any_text_is_read(text: str) -> None:
    ResolvConf.parse(text)

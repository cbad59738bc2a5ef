from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from ztunnel.errors import ResourceError
from ztunnel.model.policy import Action, PolicyScope
from ztunnel.wire.pb import security_pb2 as pb
from ztunnel.wire.policies import read_policy

FUTURE_FIELD = b"\xfa\x07\x02hi"  # number 127, two bytes


def a_message(match: pb.Match | None = None, **fields: object) -> pb.Authorization:
    message = pb.Authorization(name="p", namespace="shop", **fields)
    if match is not None:
        message.rules.add().clauses.add().matches.append(match)
    return message


def with_future_field(message: pb.Match) -> pb.Match:
    return pb.Match.FromString(message.SerializeToString() + FUTURE_FIELD)


def test_bytes_as_the_tables_say() -> None:
    # Authorization{1: "p", 2: "n", 3: 2, 4: 1, 5: Rule{1: Clause{2: Match{9: [80, 443]}}}, 6: true}
    match = b"\x4a\x03\x50\xbb\x03"
    clause = b"\x12\x05" + match
    rule = b"\x0a\x07" + clause
    found = read_policy(b"\x0a\x01p\x12\x01n\x18\x02\x20\x01\x2a\x09" + rule + b"\x30\x01", [])
    assert (found.key, found.scope, found.action) == (
        "n/p",
        PolicyScope.WORKLOAD_SELECTOR,
        Action.DENY,
    )
    assert found.rules[0][0][0].destination_ports == (80, 443)
    assert found.dry_run


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (pb.Authorization(), "name: empty"),
        (a_message(scope=9), "scope: 9"),
        (a_message(action=9), "action: 9"),
        (
            a_message(pb.Match(principals=[pb.StringMatch()])),
            "rules[0].clauses[0].matches[0].principals: neither",
        ),
        (
            a_message(pb.Match(not_source_ips=[pb.Address(address=b"12")])),
            "rules[0].clauses[0].matches[0].not_source_ips: 2 bytes",
        ),
        (
            a_message(pb.Match(destination_ips=[pb.Address(address=b"1234", length=33)])),
            "rules[0].clauses[0].matches[0].destination_ips: prefix length 33",
        ),
        (
            a_message(pb.Match(destination_ports=[65536])),
            "rules[0].clauses[0].matches[0].destination_ports: 65536",
        ),
        (
            a_message(pb.Match(extensions=[{"name": "moon-phase"}])),
            "rules[0].clauses[0].matches[0].extensions: 'moon-phase'",
        ),
        (
            a_message(with_future_field(pb.Match(destination_ports=[80]))),
            "rules[0].clauses[0].matches[0]: field 127",
        ),
    ],
)
def test_a_policy_that_is_not_understood_is_refused_whole(
    message: pb.Authorization, complaint: str
) -> None:
    with pytest.raises(ResourceError) as caught:
        read_policy(message.SerializeToString(), [])
    assert str(caught.value).startswith(complaint)


def test_a_field_beside_the_rules_from_the_future_is_no_harm() -> None:
    found = read_policy(a_message().SerializeToString() + FUTURE_FIELD, [])
    assert found.key == "shop/p"


@given(data=st.binary(max_size=200))
def test_garbage_raises_the_declared_error_only(data: bytes) -> None:
    try:
        read_policy(data, [])
    except ResourceError:
        return

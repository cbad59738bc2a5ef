from __future__ import annotations

from tests.support.builders import a_policy
from ztunnel.model.policy import Match, MatchKind, StringMatch


def test_a_policy_is_known_by_namespace_and_name() -> None:
    assert a_policy("only-frontend", ns="shop").key == "shop/only-frontend"


def test_a_match_that_says_nothing_has_no_field() -> None:
    assert Match() == Match(namespaces=(), destination_ports=())
    assert not any(getattr(Match(), field) for field in Match.__slots__)


def test_policies_are_equal_by_content_and_can_be_keys() -> None:
    assert len({a_policy(), a_policy(), a_policy("other")}) == 2
    assert StringMatch(MatchKind.EXACT, "a") != StringMatch(MatchKind.PREFIX, "a")

from __future__ import annotations

from hypothesis import given, strategies as st

from ztunnel.model.split_map import MASK, PARTS, SplitMap


@given(st.dictionaries(st.one_of(st.integers(0, 300), st.text(max_size=2)), st.integers(0, 9)))
def test_it_holds_what_a_dictionary_holds(plain: dict[int | str, int]) -> None:
    split: SplitMap[int | str, int] = SplitMap()
    for key, value in plain.items():
        split.of(key)[key] = value
    assert all(split.parts[hash(key) & MASK].get(key) == plain[key] for key in plain)
    assert len(split) == len(split.values()) == len(plain)
    assert sorted(split.values()) == sorted(plain.values())


def test_a_view_lives_and_knows_its_values() -> None:
    split: SplitMap[str, str] = SplitMap()
    view = split.values()
    assert not view
    split.of("a")["a"] = "b"
    assert list(view) == ["b"]
    assert "b" in view
    assert "a" not in view


def test_very_many_entries_are_spread_over_all_parts() -> None:
    split: SplitMap[str, int] = SplitMap()
    for number in range(100 * PARTS):
        key = f"pod-{number}"
        split.of(key)[key] = number
    assert max(map(len, split.parts)) < 200

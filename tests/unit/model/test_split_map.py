from __future__ import annotations

from hypothesis import given, strategies as st

from ztunnel.model.split_map import PARTS, SplitMap

KEYS = st.one_of(st.integers(0, 300), st.text(max_size=2))


@given(
    st.lists(st.tuples(st.sampled_from(["put", "default", "pop"]), KEYS, st.integers(1, 9))),
    st.lists(KEYS),
)
def test_it_does_what_a_dictionary_does(
    steps: list[tuple[str, int | str, int]], asked: list[int | str]
) -> None:
    split: SplitMap[int | str, int] = SplitMap()
    plain: dict[int | str, int] = {}
    for step, key, value in steps:
        match step:
            case "put":
                split[key] = plain[key] = value
            case "default":
                assert split.setdefault(key, value) == plain.setdefault(key, value)
            case _:
                assert split.pop(key) == plain.pop(key, None)
    for key in [*asked, *plain]:
        assert split.get(key) == plain.get(key)
        assert (key in split) == (key in plain)
    assert len(split) == len(split.values()) == len(plain)
    assert bool(split) == bool(plain)
    assert sorted(split.values()) == sorted(plain.values())


def test_a_view_lives_and_knows_its_values() -> None:
    split: SplitMap[str, str] = SplitMap()
    view = split.values()
    assert not view
    split["a"] = "b"
    assert list(view) == ["b"]
    assert "b" in view
    assert "a" not in view


def test_very_many_entries_are_spread_over_all_parts() -> None:
    split: SplitMap[str, int] = SplitMap()
    for number in range(100 * PARTS):
        split[f"pod-{number}"] = number
    sizes = [len(part) for part in split._parts.values()]
    assert len(sizes) == PARTS
    assert max(sizes) < 200

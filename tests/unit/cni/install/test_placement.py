from __future__ import annotations

import json

import pytest
from hypothesis import given, strategies as st

from cni.install.errors import ConflistError
from cni.install.placement import (
    SAVED_ENDING,
    STANDALONE_NAME,
    Delete,
    Mode,
    Move,
    Placement,
    Plan,
    Write,
    plan_install,
    plan_removal,
)

OURS = {"name": "istio-cni", "type": "istio-cni", "agent_decides": True}
CHAIN = b'{"name": "pods", "cniVersion": "1.0.0", "plugins": [{"type": "ptp"}]}\n'
LATER = b'{"name": "more", "plugins": [{"type": "bridge"}]}'
SINGLE = b'{"name": "pods", "cniVersion": "0.4.0", "type": "ptp"}\n'
BROKEN = b'{"name": "pods", "plugins": ['
CHAINED = Placement(Mode.CHAINED)
OWN = Placement(Mode.OWN_FILE)
STANDALONE = Placement(Mode.STANDALONE)


def carry_out(plan: Plan, files: dict[str, bytes], *, steps: int | None = None) -> dict[str, bytes]:
    after = dict(files)
    for action in plan.actions[:steps]:
        match action:
            case Write(name, data, _):
                after[name] = data
            case Move(name, target):
                after[target] = after.pop(name)
            case Delete(name):
                del after[name]
    return after


def installed(
    files: dict[str, bytes], placement: Placement = CHAINED, entry: dict[str, object] | None = None
) -> dict[str, bytes]:
    return carry_out(plan_install(files, placement, entry or OURS), files)


def removed(files: dict[str, bytes], placement: Placement = CHAINED) -> dict[str, bytes]:
    return carry_out(plan_removal(files, placement), files)


def types_in(data: bytes) -> list[str]:
    return [plugin["type"] for plugin in json.loads(data)["plugins"]]


def used_by_the_runtime(files: dict[str, bytes]) -> list[str]:
    """Give the plugins of the first file that a runtime would take."""
    for name in sorted(files):
        if name.endswith(".conflist"):
            return types_in(files[name])
        if name.endswith(".conf"):
            return [json.loads(files[name])["type"]]
    return []


some_files = st.dictionaries(
    st.sampled_from(
        ["05-a.conf", "05-a.conflist", "10-b.conf", "10-b.conflist", "20-c.conflist", "87.json"]
    ),
    st.sampled_from([CHAIN, LATER, SINGLE, BROKEN, b""]),
)
placements = st.sampled_from([CHAINED, OWN, STANDALONE])


@given(some_files, placements)
def test_in_and_out_again_leaves_every_file_as_it_was(
    files: dict[str, bytes], placement: Placement
) -> None:
    assert removed(installed(files, placement), placement) == files


@given(some_files, placements)
def test_a_second_pass_finds_nothing_to_do(files: dict[str, bytes], placement: Placement) -> None:
    once = installed(files, placement)
    assert plan_install(once, placement, OURS).actions == ()


@given(some_files, placements, st.integers(0, 3))
def test_a_pass_that_was_killed_is_completed_by_the_next(
    files: dict[str, bytes], placement: Placement, steps: int
) -> None:
    halfway = carry_out(plan_install(files, placement, OURS), files, steps=steps)
    assert installed(halfway, placement) == installed(files, placement)


@given(some_files, placements, st.integers(0, 4))
def test_a_removal_that_was_killed_is_completed_by_the_next(
    files: dict[str, bytes], placement: Placement, steps: int
) -> None:
    inside = installed(files, placement)
    halfway = carry_out(plan_removal(inside, placement), inside, steps=steps)
    assert removed(halfway, placement) == files


@given(some_files, placements, placements)
def test_changing_the_mode_is_as_if_it_had_always_been_so(
    files: dict[str, bytes], before: Placement, after: Placement
) -> None:
    changed = removed(installed(installed(files, before), after), after)
    assert changed == files


def test_we_stand_behind_the_plugins_of_the_first_file() -> None:
    after = installed({"10-b.conflist": CHAIN, "20-c.conflist": LATER})
    assert types_in(after["10-b.conflist"]) == ["ptp", "istio-cni"]
    assert after["20-c.conflist"] == LATER


def test_a_broken_file_is_passed_over_with_a_warning() -> None:
    files = {"05-a.conflist": BROKEN, "10-b.conflist": CHAIN, "00.json": CHAIN}
    plan = plan_install(files, CHAINED, OURS)
    assert [action.name for action in plan.actions] == ["10-b.conflist"]
    assert ["05-a.conflist" in warning for warning in plan.warnings] == [True]


@pytest.mark.parametrize("files", [{}, {"05-a.conflist": BROKEN}, {"00.json": CHAIN}])
@pytest.mark.parametrize("placement", [CHAINED, OWN])
def test_without_a_primary_we_wait(files: dict[str, bytes], placement: Placement) -> None:
    plan = plan_install(files, placement, OURS)
    assert plan.waiting_for != ""
    assert plan.actions == ()


def test_a_single_plugin_becomes_a_chain_and_comes_back_byte_for_byte() -> None:
    after = installed({"10-b.conf": SINGLE})
    assert sorted(after) == ["10-b.conf" + SAVED_ENDING, "10-b.conflist"]
    assert types_in(after["10-b.conflist"]) == ["ptp", "istio-cni"]
    assert json.loads(after["10-b.conflist"])["name"] == "pods"
    assert removed(after) == {"10-b.conf": SINGLE}


def test_at_no_moment_is_there_nothing_for_the_runtime() -> None:
    files = {"10-b.conf": SINGLE}
    plan = plan_install(files, CHAINED, OURS)
    for steps in range(len(plan.actions) + 1):
        assert "ptp" in used_by_the_runtime(carry_out(plan, files, steps=steps))
    inside = carry_out(plan, files)
    plan = plan_removal(inside, CHAINED)
    for steps in range(len(plan.actions) + 1):
        assert "ptp" in used_by_the_runtime(carry_out(plan, inside, steps=steps))


def test_a_single_plugin_that_is_written_again_is_wrapped_again() -> None:
    newer = b'{"name": "pods", "type": "bridge"}'
    after = installed({**installed({"10-b.conf": SINGLE}), "10-b.conf": newer})
    assert types_in(after["10-b.conflist"]) == ["bridge", "istio-cni"]
    assert removed(after) == {"10-b.conf": newer}


def test_a_single_plugin_written_again_at_the_very_end_stays() -> None:
    newer = b'{"name": "pods", "type": "bridge"}'
    inside = {**installed({"10-b.conf": SINGLE}), "10-b.conf": newer}
    assert removed(inside) == {"10-b.conf": newer}


def test_what_was_put_aside_is_forgotten_when_its_owner_has_made_all_anew() -> None:
    newer = {"10-b.conf": SINGLE, "10-b.conflist": LATER}
    assert removed({**newer, "10-b.conf" + SAVED_ENDING: SINGLE}) == newer


def test_a_chain_of_ours_that_somebody_extended_stays_a_chain() -> None:
    inside = installed({"10-b.conf": SINGLE})
    wrapped = json.loads(inside["10-b.conflist"])
    wrapped["plugins"].append({"type": "portmap"})
    after = removed({**inside, "10-b.conflist": json.dumps(wrapped).encode()})
    assert sorted(after) == ["10-b.conflist"]
    assert types_in(after["10-b.conflist"]) == ["ptp", "portmap"]


def test_an_overwritten_file_is_repaired() -> None:
    inside = installed({"10-b.conflist": CHAIN})
    assert installed({**inside, "10-b.conflist": LATER}) == installed({"10-b.conflist": LATER})


def test_a_new_primary_before_ours_is_joined_and_both_are_left() -> None:
    inside = installed({"10-b.conflist": CHAIN})
    after = installed({**inside, "05-a.conflist": LATER})
    assert types_in(after["05-a.conflist"]) == ["bridge", "istio-cni"]
    assert removed(after) == {"05-a.conflist": LATER, "10-b.conflist": CHAIN}


def test_new_settings_reach_the_entry() -> None:
    changed = {**OURS, "agent_decides": False}
    after = installed(installed({"10-b.conflist": CHAIN}), CHAINED, changed)
    assert json.loads(after["10-b.conflist"])["plugins"][1:] == [changed]


def test_what_the_reference_left_is_taken_over_and_removed() -> None:
    theirs = CHAIN.replace(b"]", b',{"type":"istio-cni","kubernetes":{}}]')
    after = installed({"10-b.conflist": theirs})
    assert json.loads(after["10-b.conflist"])["plugins"] == [{"type": "ptp"}, OURS]
    assert removed({"10-b.conflist": theirs}) == {"10-b.conflist": CHAIN}


def as_the_reference_would(files: dict[str, bytes]) -> dict[str, bytes]:
    """Join the chain as the reference's agent does, which looks at the type of entries only."""
    chain = json.loads(files["10-b.conflist"])
    if any(plugin["type"] == "istio-cni" for plugin in chain["plugins"]):
        return files
    chain["plugins"].append({"type": "istio-cni", "kubernetes": {}})
    return {**files, "10-b.conflist": json.dumps(chain, sort_keys=True, indent=2).encode()}


def test_two_agents_at_one_chain_come_to_rest_with_our_entry() -> None:
    for files in ({"10-b.conflist": CHAIN}, as_the_reference_would({"10-b.conflist": CHAIN})):
        settled = installed(as_the_reference_would(installed(files)))
        assert installed(settled) == as_the_reference_would(settled) == settled
        assert json.loads(settled["10-b.conflist"])["plugins"] == [{"type": "ptp"}, OURS]


def test_a_file_that_holds_nobody_but_us_goes_away() -> None:
    alone = json.dumps({"name": "x", "plugins": [OURS]}).encode()
    assert removed({"10-b.conflist": alone}) == {}
    assert plan_install({"10-b.conflist": alone}, CHAINED, OURS).waiting_for != ""


@pytest.mark.parametrize("chosen", ["20-c.conflist", "20-c.conf"])
def test_the_operator_may_choose_the_primary(chosen: str) -> None:
    files = {"10-b.conflist": CHAIN, "20-c.conflist": LATER}
    after = installed(files, Placement(Mode.CHAINED, conf_name=chosen))
    assert after["10-b.conflist"] == CHAIN
    assert types_in(after["20-c.conflist"]) == ["bridge", "istio-cni"]


def test_a_chosen_primary_is_waited_for() -> None:
    plan = plan_install(
        {"10-b.conflist": CHAIN}, Placement(Mode.CHAINED, conf_name="20-c.conflist"), OURS
    )
    assert (plan.waiting_for, plan.actions) == ("20-c.conflist", ())


def test_the_own_file_is_a_copy_and_follows_the_primary() -> None:
    after = installed({"10-b.conflist": CHAIN}, OWN)
    assert after["10-b.conflist"] == CHAIN
    assert types_in(after["02-istio-cni.conflist"]) == ["ptp", "istio-cni"]
    changed = CHAIN.replace(b'"ptp"', b'"ptp", "mtu": 9000')
    after = installed({**after, "10-b.conflist": changed}, OWN)
    assert json.loads(after["02-istio-cni.conflist"])["plugins"][0]["mtu"] == 9000


def test_the_own_file_follows_a_primary_that_is_renamed() -> None:
    inside = installed({"10-b.conflist": CHAIN}, OWN)
    moved = {"02-istio-cni.conflist": inside["02-istio-cni.conflist"], "30-d.conf": SINGLE}
    assert types_in(installed(moved, OWN)["02-istio-cni.conflist"]) == ["ptp", "istio-cni"]
    assert "30-d.conf" in installed(moved, OWN)


def test_the_own_file_does_not_outlive_the_primary_but_survives_its_rewriting() -> None:
    inside = installed({"10-b.conflist": CHAIN}, OWN)
    gone = {"02-istio-cni.conflist": inside["02-istio-cni.conflist"]}
    assert installed(gone, OWN) == {}
    half_written = {**gone, "10-b.conflist": BROKEN}
    assert installed(half_written, OWN) == half_written


def test_an_own_file_that_nobody_would_read_is_an_error() -> None:
    with pytest.raises(ConflistError, match="sort before"):
        plan_install({"01-a.conflist": CHAIN}, OWN, OURS)


def test_alone_we_are_a_file_of_our_own_and_touch_no_other() -> None:
    after = installed({"10-b.conflist": CHAIN}, STANDALONE)
    assert json.loads(after[STANDALONE_NAME]) == {"cniVersion": "0.3.1", **OURS}
    assert after["10-b.conflist"] == CHAIN


def test_alone_we_take_no_file_of_another() -> None:
    with pytest.raises(ConflistError, match="another plugin"):
        plan_install(
            {"istio.conf": SINGLE}, Placement(Mode.STANDALONE, conf_name="istio.conf"), OURS
        )

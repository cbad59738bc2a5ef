"""The benchmark suite works, and nothing has become absurdly slow; no absolute times."""

from __future__ import annotations

from pathlib import Path

import pytest

from perf import stalls
from perf.contender import Contender, Direct, Wish
from perf.envoy import Envoy, find_envoy
from perf.load import Load, build
from perf.node_proxies import NodeProxies
from perf.report import OURS, REFERENCE, table
from perf.results import Results, goals
from perf.rounds import Sample, measure
from perf.shapes import QUICK, SHAPES
from perf.summary import holds, ratio

pytestmark = [
    pytest.mark.netns,
    pytest.mark.interop,
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.requires_program("cc"),
]

QUICK_SHAPES = [shape for shape in SHAPES if shape.name in QUICK]
ROUNDS = 3
SECONDS = 0.25


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return Load(build(tmp_path))


async def test_the_runner_measures_and_we_have_not_fallen_far_behind_envoy(
    tmp_path: Path, load: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    contenders: list[Contender] = [Direct(), Envoy(find_envoy()), NodeProxies(OURS)]
    samples = await measure(
        QUICK_SHAPES, contenders, load, tmp_path, rounds=ROUNDS, seconds=SECONDS
    )
    assert len(samples) == len(QUICK_SHAPES) * len(contenders) * ROUNDS, capsys.readouterr().err
    assert all(sample.values["failures"] == 0 for sample in samples)
    names = [one.name for one in contenders]
    shown = table(Results(names, ROUNDS, SECONDS, samples), SHAPES)
    assert fallen_behind(samples) == [], shown


async def test_a_proxy_is_disturbed_in_every_way_and_tells_of_its_stalls(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stalls, "SECONDS", 0.3)
    monkeypatch.setattr(stalls, "LABEL_SETS", 20)
    monkeypatch.setattr(stalls, "IDENTITIES", 5)
    renewing = Wish(pods=5, settings=stalls.RENEWING.settings)
    monkeypatch.setattr(stalls, "RENEWING", renewing)
    monkeypatch.setattr(stalls, "DISTURBED", Wish(plane=(300, 20, 5), plain=20))
    found = await stalls.stalls(NodeProxies(OURS), load, tmp_path)
    metrics = {metric.key for metric in (*stalls.STALL_METRICS, *stalls.P99_METRICS)}
    assert set(found) == metrics
    assert all(value > 0 for value in found.values())


def fallen_behind(samples: list[Sample]) -> list[str]:
    """What is below the floor of the budget: medians, so that one bad moment does not count."""
    behind = []
    for shape in QUICK_SHAPES:
        for metric in shape.metrics:
            floor = goals().get(shape.name, {}).get(metric.key, {}).get("floor")
            found = ratio(samples, shape.name, OURS, REFERENCE, metric)
            if floor is None:
                continue
            assert found is not None
            if not holds(found.middle, goal=floor, metric=metric):
                behind.append(f"{shape.name}: {found.middle:.2f} x {REFERENCE}, floor {floor}")
    return behind

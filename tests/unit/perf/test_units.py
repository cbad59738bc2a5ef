"""The reference's micro-benchmarks run, and measure what they say."""

from __future__ import annotations

import pytest

from perf import units


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step once: how long it takes is not of interest here."""

    def run(action, repeats: int) -> float:
        action(0)
        return 1.0

    monkeypatch.setattr(units, "timed", run)


@pytest.mark.parametrize("kind", ["exact", "cidr"])
@pytest.mark.parametrize("hits", [False, True])
@pytest.mark.parametrize("size", [1, 10])
def test_a_service_is_found_where_there_is_one(kind: str, size: int, *, hits: bool) -> None:
    assert units.vip_match(size, kind, hits=hits) == 1.0


@pytest.mark.parametrize("scopes", [(), units.FAILOVER])
def test_an_endpoint_is_picked(scopes) -> None:
    assert units.load_balance(10, scopes) == 1.0


@pytest.mark.parametrize("kind", units.INSERTS)
def test_a_push_is_measured_by_the_workload(kind: str) -> None:
    assert units.INSERTS[kind](4) == 0.25


def test_labels_are_written_printed_and_forgotten() -> None:
    assert units.metrics_write() == units.metrics_encode() == 1.0
    assert units.insert_remove() == 1.0 / units.CHURNED

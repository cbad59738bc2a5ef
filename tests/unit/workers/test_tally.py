"""Several processes' metrics as one node's."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from ztunnel.errors import PeerError
from ztunnel.telemetry.exposition import Family, Kind
from ztunnel.telemetry.metrics import Metrics
from ztunnel.workers import tally as module
from ztunnel.workers.tally import OPENED, Exposition, Tally


def exposition(*families: Family) -> Exposition:
    read = Exposition()
    for family in families:
        for piece in family.text():
            read.feed(piece)
    return read


def a_counter(name: str = "made", **values: float) -> Family:
    family = Family(name, "Made", labels=("by",))
    for by, value in values.items():
        family.count(by).add(value)
    return family


def a_gauge(value: float, name: str = "open") -> Family:
    family = Family(name, "Open", kind=Kind.GAUGE)
    family.count().set(value)
    return family


def samples(tally: Tally, own: str = "") -> dict[str, float]:
    lines = "".join(tally.text([own])).splitlines()
    return {
        key: float(value)
        for key, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))
    }


def test_samples_of_the_same_labels_are_added_up() -> None:
    tally = Tally()
    tally.told(0, exposition(a_counter(a=1, b=2), a_gauge(3)))
    tally.told(1, exposition(a_counter(b=5, c=7), a_gauge(4)))
    own = "".join(a_counter(a=10).text())
    assert samples(tally, own) == {
        'made_total{by="a"}': 11, 'made_total{by="b"}': 7, 'made_total{by="c"}': 7, "open": 7,
    }  # fmt: skip


def test_histograms_are_added_up_with_their_sums() -> None:
    tally = Tally()
    for worker, value in enumerate((0.05, 5.0)):
        family = Family("lag", "Lag", kind=Kind.HISTOGRAM, buckets=(0.1, 1.0))
        family.histogram().observe(value)
        tally.told(worker, exposition(family))
    assert samples(tally) == {
        'lag_bucket{le="0.1"}': 1, 'lag_bucket{le="1.0"}': 1, 'lag_bucket{le="+Inf"}': 2,
        "lag_sum": 5.05, "lag_count": 2,
    }  # fmt: skip


def test_what_does_not_add_up_is_not_added_up() -> None:
    tally = Tally()
    metrics = Metrics(version="1.28")
    metrics.longest_stall.observe(0.5)
    metrics.active_proxies.set(3)
    metrics.proxies_started.add(3)
    own = "".join(metrics.text())
    for worker in range(2):
        read = Exposition()
        read.feed(own)
        tally.told(worker, read)
    found = samples(tally, own)
    assert found['istio_build{component="ztunnel",tag="1.28"}'] == 1
    assert found["workload_manager_active_proxy_count"] == 3
    assert found["workload_manager_proxies_started_total"] == 3
    assert found["process_max_fds"] == samples(Tally(), own)["process_max_fds"]
    assert found["ztunnel_event_loop_longest_stall_seconds"] == 0.5
    assert found["process_open_fds"] > samples(Tally(), own)["process_open_fds"]


def test_heads_stand_before_their_samples_and_the_end_once() -> None:
    tally = Tally()
    own = "".join(Metrics().text())
    read = Exposition()
    read.feed(own)
    tally.told(0, read)
    text = "".join(tally.text([own]))
    assert text.count("# EOF\n") == 1
    assert text.endswith("# EOF\n")
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        line for line in own.splitlines() if line.startswith("#")
    ]


def test_the_counters_of_a_worker_that_is_gone_stay_and_its_gauges_go() -> None:
    tally = Tally()
    tally.told(0, exposition(a_counter(a=2), a_gauge(3)))
    tally.bury(0)
    tally.bury(0)
    assert samples(tally) == {'made_total{by="a"}': 2}
    tally.told(0, exposition(a_counter(a=1), a_gauge(1)))
    assert samples(tally) == {'made_total{by="a"}': 3, "open": 1}


steps = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(["tell", "die"]), st.integers(0, 5)), max_size=30
)


@given(steps)
def test_no_counter_ever_falls(steps: list[tuple[int, str, int]]) -> None:
    tally, counted, seen = Tally(), dict.fromkeys(range(3), 0), 0.0
    for worker, what, more in steps:
        if what == "die":
            tally.bury(worker)
            counted[worker] = 0
        else:
            counted[worker] += more
            tally.told(worker, exposition(a_counter(OPENED, a=counted[worker])))
        now = samples(tally).get(OPENED + '_total{by="a"}', 0.0)
        assert now >= seen
        assert now == sum(tally.opened(number) for number in range(3))
        seen = now


def test_the_dead_are_remembered_within_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BURIED_MAX", 2)
    tally = Tally()
    for _ in range(2):
        tally.told(0, exposition(a_counter(a=1, b=1, c=1)))
        tally.bury(0)
    assert samples(tally) == {'made_total{by="a"}': 2, 'made_total{by="b"}': 2}


def test_what_is_no_metric_is_refused() -> None:
    with pytest.raises(PeerError, match="not a metric"):
        Exposition().feed("made_total one\n")

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from tests.support.builders import a_gateway, a_workload
from ztunnel.decide.outliers import (
    AVOIDED_MAX,
    FIRST_SECONDS,
    FORGIVEN_SECONDS,
    MAX_SECONDS,
    Outliers,
)
from ztunnel.model.network import Endpoint, Network, Port
from ztunnel.model.workload import TunnelProtocol, Workload

HERE = Network("")
PLAIN = a_workload("plain", ips=["192.0.2.1", "2001:db8::1"])
TUNNELLED = a_workload("tunnelled", ips=["192.0.2.2"], protocol=TunnelProtocol.HBONE)
GATEWAY = a_workload("gateway", ips=["192.0.2.1"], network="far")
FAR = a_workload(
    "far", ips=["192.0.2.1"], network="far", network_gateway=a_gateway("far/192.0.2.9")
)


def at(text: str) -> Endpoint:
    return Endpoint.parse(text)


def avoids(outliers: Outliers, one: tuple[Workload, int]) -> bool:
    return outliers.avoids(one[0], Port(one[1]), HERE)


def avoided_until(outliers: Outliers, one: tuple[Workload, int], now: float) -> float:
    """Let time pass in quarters of a second until it is not avoided; return when that is."""
    while True:
        outliers.expire(now)
        if not avoids(outliers, one):
            return now
        now += 0.25


@pytest.mark.parametrize(
    ("failed", "pick", "is_avoided"),
    [
        ("192.0.2.1:8080", (PLAIN, 8080), True),
        ("[2001:db8::1]:8080", (PLAIN, 8080), True),
        ("192.0.2.1:8080", (PLAIN, 8081), False),
        ("192.0.2.1:15008", (PLAIN, 8080), False),
        ("192.0.2.9:8080", (PLAIN, 8080), False),
        ("192.0.2.2:15008", (TUNNELLED, 8080), True),
        ("192.0.2.2:15008", (TUNNELLED, 8081), True),
        ("192.0.2.2:15088", (TUNNELLED, 15088), True),
        ("192.0.2.1:8080", (FAR, 8080), False),
        ("192.0.2.1:15008", (GATEWAY, 15008), True),
    ],
)
def test_whom_a_failed_dial_is_about(
    failed: str, pick: tuple[Workload, int], *, is_avoided: bool
) -> None:
    outliers = Outliers()
    outliers.failed(at(failed), 0.0)
    assert avoids(outliers, pick) is is_avoided


A_PICK = (PLAIN, 8080)
A_PEER = at("192.0.2.1:8080")


def test_each_failure_in_a_row_counts_twice_as_long_up_to_a_limit() -> None:
    outliers, now, seconds = Outliers(), 0.0, []
    for _ in range(7):
        outliers.failed(A_PEER, now)
        until = avoided_until(outliers, A_PICK, now)
        seconds.append(until - now)
        now = until
    assert seconds == [FIRST_SECONDS, 4, 8, 16, 32, MAX_SECONDS, MAX_SECONDS]


def test_dials_that_fail_together_are_one_failure() -> None:
    outliers = Outliers()
    for number in range(50):
        outliers.failed(A_PEER, number / 100)
    assert avoided_until(outliers, A_PICK, 0.5) == FIRST_SECONDS


def test_success_clears_the_name_at_once_and_for_good() -> None:
    outliers = Outliers()
    outliers.failed(A_PEER, 0.0)
    outliers.reached(A_PEER)
    assert not outliers
    outliers.failed(A_PEER, 1.0)
    outliers.expire(FIRST_SECONDS)  # the end of the first time is not that of the second
    assert avoids(outliers, A_PICK)
    assert avoided_until(outliers, A_PICK, 1.0) == 1.0 + FIRST_SECONDS


def test_old_failures_are_forgiven() -> None:
    outliers = Outliers()
    outliers.failed(A_PEER, 0.0)
    later = FIRST_SECONDS + FORGIVEN_SECONDS + 1
    outliers.failed(A_PEER, later)
    assert avoided_until(outliers, A_PICK, later) == later + FIRST_SECONDS


@given(
    events=st.lists(
        st.tuples(st.integers(0, 2000), st.sampled_from(["failed", "reached"]), st.floats(0, 3)),
        max_size=60,
    )
)
def test_the_table_stays_small_and_all_is_forgotten_in_the_end(
    events: list[tuple[int, str, float]],
) -> None:
    outliers, now = Outliers(), 0.0
    for port, event, seconds in events:
        now += seconds
        peer = Endpoint(A_PEER.ip, Port(port))
        if event == "failed":
            outliers.failed(peer, now)
            assert avoids(outliers, (PLAIN, port))
        else:
            outliers.reached(peer)
            assert not avoids(outliers, (PLAIN, port))
    outliers.expire(now + MAX_SECONDS)
    assert not outliers


def test_a_pod_that_scans_addresses_fills_no_memory() -> None:
    outliers = Outliers()
    for port in range(5 * AVOIDED_MAX):
        outliers.failed(Endpoint(A_PEER.ip, Port(port)), 0.0)
    picks = [(PLAIN, port) for port in range(5 * AVOIDED_MAX)]
    avoided = [pick[1] for pick in picks if avoids(outliers, pick)]
    assert avoided == list(range(4 * AVOIDED_MAX, 5 * AVOIDED_MAX))  # the latest
    outliers.expire(FIRST_SECONDS)
    assert not outliers

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.support.certs import a_name
from ztunnel.identity.rotation import (
    BACKOFF_MAX_SECONDS,
    IN_FLIGHT_MAX,
    CertificateState,
    Rotation,
    Urgency,
    backoff_seconds,
    renew_at,
)
from ztunnel.model.identity import Identity
from ztunnel.tls.certificate import WorkloadCertificate

NAMES = [a_name(str(n)) for n in range(12)]
ONE = NAMES[0]


def valid(identity: Identity, start: float, end: float) -> WorkloadCertificate:
    return WorkloadCertificate(
        identity=identity,
        chain_pem=b"",
        key_pem=b"",
        roots_pem=b"",
        not_before=start,
        not_after=end,
        serial=1,
    )


def a_rotation() -> Rotation:
    return Rotation(Random(1))


def with_certificate(until: float = 1000.0) -> Rotation:
    rotation = a_rotation()
    rotation.want(ONE, Urgency.CONNECTION, 0)
    assert rotation.take_due(0) == [ONE]
    rotation.succeeded(valid(ONE, 0, until), ONE, 0)
    return rotation


@given(
    start=st.floats(0, 2e9), lifetime=st.floats(1, 1e8), age=st.floats(0, 1.5), seed=st.integers()
)
def test_renewal_is_before_expiry_and_not_before_now(
    start: float, lifetime: float, age: float, seed: int
) -> None:
    certificate, now = valid(ONE, start, start + lifetime), start + age * lifetime
    renewal = renew_at(certificate, now, Random(seed))
    assert renewal >= now or now > certificate.not_after
    assert renewal <= max(certificate.not_after, now)


def test_renewal_is_about_half_way() -> None:
    times = [renew_at(valid(ONE, 0, 86400), 0, Random(seed)) for seed in range(200)]
    assert 0.4 * 86400 <= min(times) < 0.45 * 86400
    assert 0.55 * 86400 < max(times) <= 0.6 * 86400


@given(seed=st.integers())
def test_certificates_fetched_together_are_not_renewed_together(seed: int) -> None:
    random = Random(seed)
    times = sorted(renew_at(valid(ONE, 0, 86400), 0, random) for _ in range(100))
    assert max(later - sooner for sooner, later in pairwise(times)) < 86400 / 20
    busiest = max(sum(t <= other < t + 60 for other in times) for t in times)
    assert busiest <= IN_FLIGHT_MAX


@given(failures=st.integers(1, 10_000), seed=st.integers())
def test_back_off_is_bounded(failures: int, seed: int) -> None:
    pause = backoff_seconds(failures, Random(seed))
    assert 0.8 <= pause <= BACKOFF_MAX_SECONDS
    if failures > 8:
        assert pause >= 0.8 * BACKOFF_MAX_SECONDS


@pytest.mark.parametrize(
    ("failures", "low", "high"), [(1, 0.8, 1.2), (2, 1.6, 2.4), (5, 12.8, 19.2)]
)
def test_back_off_doubles(failures: int, low: float, high: float) -> None:
    assert low <= backoff_seconds(failures, Random(3)) <= high


def test_one_identity_is_fetched_once_for_all_who_want_it() -> None:
    rotation = a_rotation()
    for _ in range(5):
        rotation.want(ONE, Urgency.CONNECTION, 0)
    assert rotation.take_due(0) == [ONE]
    rotation.want(ONE, Urgency.CONNECTION, 0)
    assert rotation.take_due(0) == []


def test_connections_come_before_prefetches_before_renewals() -> None:
    rotation = with_certificate()
    rotation.want(NAMES[1], Urgency.PREFETCH, 700)
    rotation.want(NAMES[2], Urgency.PREFETCH, 700)
    rotation.want(NAMES[3], Urgency.CONNECTION, 700)
    rotation.want(NAMES[2], Urgency.CONNECTION, 700)
    assert rotation.take_due(700) == [NAMES[3], NAMES[2], NAMES[1], ONE]


def test_only_so_many_are_in_flight() -> None:
    rotation = a_rotation()
    for identity in NAMES:
        rotation.want(identity, Urgency.CONNECTION, 0)
    first = rotation.take_due(0)
    assert len(first) == IN_FLIGHT_MAX
    assert rotation.take_due(0) == []
    rotation.failed("no", first[0], 0)
    assert len(rotation.take_due(0)) == 1


def test_a_certificate_is_used_until_it_expires() -> None:
    rotation = with_certificate(until=1000)
    assert rotation.certificate(ONE, 999) is not None
    assert rotation.certificate(ONE, 1000) is None
    assert rotation.certificate(NAMES[1], 0) is None


def test_a_failed_renewal_leaves_the_certificate_in_use() -> None:
    rotation = with_certificate(until=1000)
    assert rotation.take_due(600) == [ONE]
    rotation.failed("CA down", ONE, 600)
    status = rotation.status(ONE, 600)
    assert status is not None
    assert status.state is CertificateState.AVAILABLE
    assert status.error == "CA down"
    assert 600.8 <= rotation.next_due() <= 601.2


def test_a_retry_is_not_later_than_expiry() -> None:
    rotation = with_certificate(until=1000)
    now = 600.0
    for _ in range(20):
        now = max(now, min(rotation.next_due(), 999.5))
        if rotation.take_due(now):
            rotation.failed("CA down", ONE, now)
        assert rotation.next_due() <= 1000


@given(lifetime=st.floats(2, 1e6), seed=st.integers())
def test_a_ca_that_answers_again_before_the_last_tenth_is_over_is_not_missed(
    lifetime: float, seed: int
) -> None:
    rotation, attempts = Rotation(Random(seed)), 0
    rotation.want(ONE, Urgency.CONNECTION, 0)
    rotation.take_due(0)
    rotation.succeeded(valid(ONE, 0, lifetime), ONE, 0)
    while (now := rotation.next_due()) < 0.9 * lifetime:
        assert rotation.take_due(now) == [ONE]
        rotation.failed("CA down", ONE, now)
        attempts += 1
    assert now < lifetime
    assert attempts < 20 + lifetime / (0.8 * BACKOFF_MAX_SECONDS)


def test_retries_in_a_hurry_do_not_lengthen_the_pause_after_expiry() -> None:
    rotation = with_certificate(until=10)
    while (now := rotation.next_due()) < 10:
        rotation.take_due(now)
        rotation.failed("CA down", ONE, now)
    rotation.take_due(10)
    rotation.failed("CA down", ONE, 10)
    assert rotation.next_due() <= 10 + 8 * 1.2


def test_a_certificate_may_be_renewed_before_its_time_but_not_against_the_back_off() -> None:
    rotation = with_certificate()
    rotation.renew(ONE, 1)
    assert rotation.take_due(1) == [ONE]
    rotation.renew(ONE, 1)
    assert rotation.take_due(1) == [], "it is on its way"
    rotation.failed("CA down", ONE, 1)
    rotation.renew(ONE, 1.1)
    assert rotation.take_due(1.1) == []
    rotation.renew(NAMES[1], 2)
    assert rotation.status(NAMES[1], 2) is None


def test_an_expired_certificate_with_a_failure_is_unavailable() -> None:
    rotation = with_certificate(until=1000)
    rotation.take_due(600)
    rotation.failed("CA down", ONE, 600)
    status = rotation.status(ONE, 1000)
    assert status is not None
    assert (status.state, status.certificate) == (CertificateState.UNAVAILABLE, None)


def test_wanting_an_expired_certificate_fetches_it_at_once() -> None:
    rotation = with_certificate(until=1000)
    rotation.want(ONE, Urgency.CONNECTION, 2000)
    assert rotation.take_due(2000) == [ONE]
    assert rotation.take_due(9000) == []


def test_wanting_an_unavailable_certificate_does_not_hurry_the_retry() -> None:
    rotation = a_rotation()
    rotation.want(ONE, Urgency.CONNECTION, 0)
    rotation.take_due(0)
    rotation.failed("CA down", ONE, 0)
    rotation.want(ONE, Urgency.CONNECTION, 0.1)
    assert rotation.take_due(0.1) == []
    assert rotation.take_due(1.2) == [ONE]


def test_a_forgotten_identity_is_neither_kept_nor_renewed() -> None:
    rotation = with_certificate()
    rotation.forget(ONE)
    rotation.forget(NAMES[1])
    assert rotation.certificate(ONE, 1) is None
    assert rotation.snapshot(1) == []
    assert rotation.take_due(10_000) == []


def test_the_result_of_a_fetch_that_nobody_needs_is_dropped() -> None:
    rotation = a_rotation()
    rotation.want(ONE, Urgency.CONNECTION, 0)
    rotation.take_due(0)
    rotation.forget(ONE)
    rotation.succeeded(valid(ONE, 0, 1000), ONE, 1)
    assert rotation.status(ONE, 1) is None
    assert rotation.certificate(ONE, 1) is None


def test_wanting_a_forgotten_identity_takes_the_fetch_under_way() -> None:
    rotation = a_rotation()
    rotation.want(ONE, Urgency.CONNECTION, 0)
    rotation.take_due(0)
    rotation.forget(ONE)
    rotation.want(ONE, Urgency.CONNECTION, 1)
    assert rotation.take_due(1) == []
    rotation.succeeded(valid(ONE, 0, 1000), ONE, 1)
    assert rotation.certificate(ONE, 1) is not None


def test_the_snapshot_is_sorted_and_says_how_it_stands() -> None:
    rotation = with_certificate()
    rotation.want(NAMES[3], Urgency.PREFETCH, 0)
    rotation.want(NAMES[2], Urgency.CONNECTION, 0)
    rotation.take_due(0)
    rotation.failed("CA down", NAMES[2], 0)
    assert [(s.identity, s.state.value, s.error) for s in rotation.snapshot(0)] == [
        (ONE, "Available", None),
        (NAMES[2], "Unavailable", "CA down"),
        (NAMES[3], "Initializing", None),
    ]


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order, what the node relies on holds."""

    def __init__(self) -> None:
        super().__init__()
        self.rotation = Rotation(Random(5))
        self.now = 0.0
        self.flying: list[Identity] = []
        self.wanted: set[Identity] = set()
        self.valid: dict[Identity, WorkloadCertificate] = {}

    @rule(identity=st.sampled_from(NAMES), urgency=st.sampled_from([*Urgency]))
    def want(self, identity: Identity, urgency: Urgency) -> None:
        self.rotation.want(identity, urgency, self.now)
        self.wanted.add(identity)

    @rule(identity=st.sampled_from(NAMES))
    def forget(self, identity: Identity) -> None:
        self.rotation.forget(identity)
        self.wanted.discard(identity)
        if identity not in self.flying:
            self.valid.pop(identity, None)

    @rule(identity=st.sampled_from(NAMES))
    def renew(self, identity: Identity) -> None:
        self.rotation.renew(identity, self.now)

    @rule(seconds=st.floats(0, 400))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def start(self) -> None:
        taken = self.rotation.take_due(self.now)
        assert not set(taken) & set(self.flying)
        self.flying += taken

    @precondition(lambda self: self.flying)
    @rule(lifetime=st.floats(1, 1000), index=st.integers(0, 100))
    def succeed(self, lifetime: float, index: int) -> None:
        identity = self.flying.pop(index % len(self.flying))
        made = valid(identity, self.now, self.now + lifetime)
        self.rotation.succeeded(made, identity, self.now)
        self.valid.pop(identity, None)
        if identity in self.wanted:
            self.valid[identity] = made

    @precondition(lambda self: self.flying)
    @rule(index=st.integers(0, 100))
    def fail(self, index: int) -> None:
        identity = self.flying.pop(index % len(self.flying))
        self.rotation.failed("no", identity, self.now)
        if identity not in self.wanted:
            self.valid.pop(identity, None)

    @invariant()
    def a_valid_certificate_is_never_dropped_and_an_expired_one_never_used(self) -> None:
        for identity in NAMES:
            known = self.valid.get(identity) if identity in self.wanted else None
            if known is not None and known.has_expired(self.now):
                known = None
            assert self.rotation.certificate(identity, self.now) is known

    @invariant()
    def the_newest_of_each_wanted_identity_are_known_as_such(self) -> None:
        newest = {one for name, one in self.valid.items() if name in self.wanted}
        valid = {one for one in newest if not one.has_expired(self.now)}
        assert valid <= self.rotation._newest <= newest
        assert all(self.rotation.is_newest(one) for one in valid)

    @invariant()
    def the_ca_is_not_flooded(self) -> None:
        assert len(self.flying) <= IN_FLIGHT_MAX

    @invariant()
    def exactly_the_wanted_are_listed(self) -> None:
        assert {s.identity for s in self.rotation.snapshot(self.now)} == self.wanted

    @invariant()
    def nobody_starves(self) -> None:
        horizon = self.now + BACKOFF_MAX_SECONDS + 1000
        pending = self.wanted - set(self.flying)
        if pending and not self.flying:
            assert self.rotation.next_due() <= horizon or self.rotation._ready


TestAnyOrder = AnyOrder.TestCase

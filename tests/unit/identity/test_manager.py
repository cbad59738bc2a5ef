from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest
import structlog.testing
import trio
import trio.testing
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.certs import a_name
from ztunnel.errors import IdentityError
from ztunnel.identity.manager import ISSUE_SECONDS, WAIT_SECONDS, CertificateManager, Standing
from ztunnel.identity.rotation import IN_FLIGHT_MAX, CertificateState
from ztunnel.model.identity import Identity
from ztunnel.tls.certificate import WorkloadCertificate

LIFETIME = 1000.0


class FakeCa:
    """Issues at once, or when `gate` opens; refuses while `refusal` is set."""

    def __init__(self) -> None:
        self.calls: list[Identity] = []
        self.gate: trio.Event | None = None
        self.refusal: str | None = None
        self.answers_as: Identity | None = None
        self.lifetime = LIFETIME
        self.in_flight = self.in_flight_max = 0

    def __str__(self) -> str:
        return "CA fake"

    async def issue(self, identity: Identity) -> WorkloadCertificate:
        self.calls.append(identity)
        self.in_flight += 1
        self.in_flight_max = max(self.in_flight, self.in_flight_max)
        try:
            await trio.lowlevel.checkpoint()
            if self.gate is not None:
                await self.gate.wait()
        finally:
            self.in_flight -= 1
        if self.refusal is not None:
            raise IdentityError(self.refusal)
        return WorkloadCertificate(
            identity=self.answers_as or identity,
            chain_pem=b"",
            key_pem=b"",
            roots_pem=b"",
            not_before=trio.current_time(),
            not_after=trio.current_time() + self.lifetime,
            serial=len(self.calls),
        )


@asynccontextmanager
async def a_manager(ca: FakeCa) -> AsyncIterator[CertificateManager]:
    manager = CertificateManager(ca, clock=trio.current_time, random=Random(1))
    async with trio.open_nursery() as nursery:
        await nursery.start(manager.run)
        yield manager
        nursery.cancel_scope.cancel()


async def test_a_certificate_is_fetched_once_for_all_waiters(autojump_clock: MockClock) -> None:
    ca, got = FakeCa(), []
    async with a_manager(ca) as manager:
        assert manager.cached(a_name()) is None

        async def wait() -> None:
            got.append(await manager.certificate_for(a_name()))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(wait)
        assert ca.calls == [a_name()]
        assert len(set(got)) == 1
        assert manager.cached(a_name()) is got[0]
        assert await manager.certificate_for(a_name()) is got[0]


async def test_a_certificate_is_renewed_half_way(autojump_clock: MockClock) -> None:
    ca = FakeCa()
    async with a_manager(ca) as manager:
        first = await manager.certificate_for(a_name())
        await trio.sleep(0.39 * LIFETIME)
        assert manager.cached(a_name()) is first
        await trio.sleep(0.22 * LIFETIME)
        second = manager.cached(a_name())
        assert second is not None
        assert second is not first
        assert len(ca.calls) == 2


async def test_a_refusal_names_identity_and_cause(autojump_clock: MockClock) -> None:
    ca = FakeCa()
    ca.refusal = "signing gRPC error (Unauthenticated): no such pod"
    async with a_manager(ca) as manager:
        with structlog.testing.capture_logs() as logs, pytest.raises(IdentityError) as caught:
            await manager.certificate_for(a_name())
        assert str(caught.value) == f"identity error: {a_name()}: {ca.refusal}"
        assert [(line["event"], line["log_level"]) for line in logs] == [
            ("certificate unavailable", "warning")
        ]
        with pytest.raises(IdentityError):
            await manager.certificate_for(a_name())
        assert len(ca.calls) == 1, "the stored error is given at once"


async def test_a_refused_certificate_is_retried(autojump_clock: MockClock) -> None:
    ca = FakeCa()
    ca.refusal = "not yet"
    async with a_manager(ca) as manager:
        with pytest.raises(IdentityError):
            await manager.certificate_for(a_name())
        ca.refusal = None
        await trio.sleep(1.5)
        assert manager.cached(a_name()) is not None


async def test_a_ca_that_is_down_does_not_take_a_valid_certificate(
    autojump_clock: MockClock,
) -> None:
    ca = FakeCa()
    async with a_manager(ca) as manager:
        first = await manager.certificate_for(a_name())
        ca.refusal = "CA down"
        await trio.sleep(0.99 * LIFETIME)
        assert manager.cached(a_name()) is first
        (status,) = manager.snapshot()
        assert (status.state, status.error) == (CertificateState.AVAILABLE, "CA down")
        await trio.sleep(0.02 * LIFETIME)
        assert manager.cached(a_name()) is None
        with pytest.raises(IdentityError, match="CA down"):
            await manager.certificate_for(a_name())
        assert len(ca.calls) < 30


async def test_a_ca_that_does_not_answer_is_given_up(autojump_clock: MockClock) -> None:
    ca = FakeCa()
    ca.gate = trio.Event()
    async with a_manager(ca) as manager:
        manager.prefetch(a_name())
        await trio.sleep(ISSUE_SECONDS + 0.1)
        with pytest.raises(IdentityError, match="no answer from CA fake within 30 s"):
            await manager.certificate_for(a_name())


async def test_a_connection_does_not_wait_for_ever_and_says_for_whom(
    autojump_clock: MockClock,
) -> None:
    ca = FakeCa()
    ca.gate = trio.Event()
    async with a_manager(ca) as manager:
        start = trio.current_time()
        with pytest.raises(IdentityError) as caught:
            await manager.certificate_for(a_name())
        assert trio.current_time() - start == pytest.approx(WAIT_SECONDS)
        assert str(caught.value) == (
            f"identity error: {a_name()}: no certificate within 8 s; CA fake has not answered yet"
        )
        ca.gate.set()
        await wait_all_tasks_blocked()
        assert manager.cached(a_name()) is not None, "the fetch went on"


async def test_only_so_many_calls_run_at_a_time(autojump_clock: MockClock) -> None:
    ca = FakeCa()
    ca.gate = trio.Event()
    async with a_manager(ca) as manager:
        for n in range(3 * IN_FLIGHT_MAX):
            manager.prefetch(a_name(str(n)))
        await wait_all_tasks_blocked()
        assert ca.in_flight == IN_FLIGHT_MAX
        ca.gate.set()
        await wait_all_tasks_blocked()
        assert len(ca.calls) == 3 * IN_FLIGHT_MAX
        assert ca.in_flight_max == IN_FLIGHT_MAX
        assert all(s.state is CertificateState.AVAILABLE for s in manager.snapshot())


async def test_a_connection_overtakes_prefetches(autojump_clock: MockClock) -> None:
    ca = FakeCa()
    manager = CertificateManager(ca, clock=trio.current_time, random=Random(1))
    for n in range(2 * IN_FLIGHT_MAX):
        manager.prefetch(a_name(str(n)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.certificate_for, a_name("urgent"))
        await wait_all_tasks_blocked()
        nursery.start_soon(manager.run)
        await wait_all_tasks_blocked()
        assert a_name("urgent") in ca.calls[:IN_FLIGHT_MAX]
        nursery.cancel_scope.cancel()


async def test_waiters_for_a_forgotten_identity_are_told(autojump_clock: MockClock) -> None:
    ca = FakeCa()
    ca.gate = trio.Event()
    async with a_manager(ca) as manager, trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(IdentityError, match="the identity is no longer needed"):
                await manager.certificate_for(a_name())

        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        manager.forget(a_name())
        await wait_all_tasks_blocked()
        ca.gate.set()
        await wait_all_tasks_blocked()
        assert manager.cached(a_name()) is None
        assert manager.snapshot() == []


async def test_a_certificate_of_someone_else_is_refused(autojump_clock: MockClock) -> None:
    ca = FakeCa()
    ca.answers_as = a_name("mallory")
    async with a_manager(ca) as manager:
        with pytest.raises(IdentityError, match="did not find expected SAN"):
            await manager.certificate_for(a_name())
        assert manager.cached(a_name()) is None


async def test_a_certificate_that_has_expired_already_is_refused(autojump_clock: MockClock) -> None:
    ca = FakeCa()
    ca.lifetime = 0
    async with a_manager(ca) as manager:
        with pytest.raises(IdentityError, match="has expired"):
            await manager.certificate_for(a_name())


async def test_a_waiter_that_gives_up_does_not_harm_the_others(autojump_clock: MockClock) -> None:
    ca = FakeCa()
    ca.gate = trio.Event()
    async with a_manager(ca) as manager, trio.open_nursery() as nursery:
        nursery.start_soon(manager.certificate_for, a_name())
        with trio.move_on_after(1) as scope:
            await manager.certificate_for(a_name())
        assert scope.cancelled_caught
        ca.gate.set()
    assert manager.cached(a_name()) is not None


async def test_when_the_manager_stops_nobody_waits_for_ever(autojump_clock: MockClock) -> None:
    ca = FakeCa()
    ca.gate = trio.Event()
    async with trio.open_nursery() as waiters:
        async with a_manager(ca) as manager:

            async def wait() -> None:
                with pytest.raises(IdentityError):
                    await manager.certificate_for(a_name())

            waiters.start_soon(wait)
            await wait_all_tasks_blocked()
        with trio.fail_after(1):
            await wait()


async def test_a_tunnel_is_judged_by_the_certificates_of_its_handshake(
    autojump_clock: MockClock,
) -> None:
    async with a_manager(FakeCa()) as manager:
        made = await manager.certificate_for(a_name())
        start, far = trio.current_time(), 10 * LIFETIME
        assert manager.standing(made, far) is Standing.CURRENT
        assert manager.standing(made, start) is Standing.EXPIRED, "the peer's"
        await trio.sleep(0.7 * LIFETIME)
        assert manager.standing(made, far) is Standing.ROTATED
        newer = manager.cached(a_name())
        assert newer is not None
        assert manager.standing(newer, far) is Standing.CURRENT
        await trio.sleep(0.4 * LIFETIME)
        assert manager.standing(made, far) is Standing.EXPIRED, "our own"
        manager.forget(a_name())
        assert manager.standing(newer, far) is Standing.ROTATED


async def test_a_certificate_may_be_replaced_before_its_time(autojump_clock: MockClock) -> None:
    ca = FakeCa()
    async with a_manager(ca) as manager:
        first = await manager.certificate_for(a_name())
        ca.gate = trio.Event()
        manager.renew(a_name())
        await wait_all_tasks_blocked()
        assert manager.cached(a_name()) is first
        ca.gate.set()
        await wait_all_tasks_blocked()
        assert manager.cached(a_name()) is not first
        assert len(ca.calls) == 2
        manager.renew(a_name("stranger"))
        await wait_all_tasks_blocked()
        assert len(ca.calls) == 2


async def test_each_attempt_is_told(autojump_clock: MockClock) -> None:
    ca, told = FakeCa(), []
    manager = CertificateManager(
        ca,
        clock=trio.current_time,
        random=Random(1),
        on_attempt=lambda identity, made: told.append((identity, made is not None)),
    )
    ca.refusal = "no"
    async with trio.open_nursery() as nursery:
        await nursery.start(manager.run)
        with pytest.raises(IdentityError):
            await manager.certificate_for(a_name())
        ca.refusal = None
        await trio.sleep(2)
        nursery.cancel_scope.cancel()
    assert told == [(a_name(), False), (a_name(), True)]


@pytest.mark.parametrize("seed", range(5))
async def test_a_ca_that_is_back_in_the_last_tenth_of_a_lifetime_is_not_missed(
    seed: int, autojump_clock: MockClock
) -> None:
    ca = FakeCa()
    ca.lifetime = 30.0
    manager = CertificateManager(ca, clock=trio.current_time, random=Random(seed))
    async with trio.open_nursery() as nursery:
        await nursery.start(manager.run)
        await manager.certificate_for(a_name())
        ca.refusal = "CA down"
        await trio.sleep(0.9 * 30)
        ca.refusal = None
        for _ in range(300):
            assert manager.cached(a_name()) is not None
            await trio.sleep(0.1)
        nursery.cancel_scope.cancel()

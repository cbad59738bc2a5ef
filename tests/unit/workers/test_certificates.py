from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.builders import an_identity
from tests.support.certs import AUTHORITY
from ztunnel.errors import IdentityError
from ztunnel.identity.manager import Standing
from ztunnel.model.identity import Identity
from ztunnel.tls.certificate import WorkloadCertificate
from ztunnel.workers.certificates import HandedCertificates

WHO = an_identity()


class Scene:
    """A worker's certificates, what it asked for, and the time."""

    def __init__(self) -> None:
        self.asked: list[Identity] = []
        self.now = 0.0
        self.held = HandedCertificates(self.asked.append, clock=lambda: self.now)
        self.outcomes: list[WorkloadCertificate | str] = []

    async def want(self) -> None:
        try:
            self.outcomes.append(await self.held.certificate_for(WHO))
        except IdentityError as error:
            self.outcomes.append(str(error))


@pytest.fixture
def scene() -> Scene:
    return Scene()


def a_certificate() -> WorkloadCertificate:
    return AUTHORITY.issue(WHO)


def a_copy(of: WorkloadCertificate) -> WorkloadCertificate:
    return WorkloadCertificate.load(
        chain_pem=of.chain_pem, key_pem=of.key_pem, roots_pem=of.roots_pem
    )


async def test_many_wait_for_one_answer(scene: Scene, nursery: trio.Nursery) -> None:
    for _ in range(3):
        nursery.start_soon(scene.want)
    await wait_all_tasks_blocked()
    assert scene.asked == [WHO]
    certificate = a_certificate()
    scene.held.hand(WHO, certificate, None)
    await wait_all_tasks_blocked()
    assert scene.outcomes == [certificate] * 3
    await scene.want()
    assert scene.asked == [WHO]


async def test_a_refusal_tells_why_and_the_next_asks_again(
    scene: Scene, nursery: trio.Nursery
) -> None:
    nursery.start_soon(scene.want)
    await wait_all_tasks_blocked()
    scene.held.hand(WHO, None, f"{WHO}: the CA said no")
    await wait_all_tasks_blocked()
    assert scene.outcomes == [f"identity error: {WHO}: the CA said no"]
    nursery.start_soon(scene.want)
    await wait_all_tasks_blocked()
    assert scene.asked == [WHO, WHO]
    nursery.cancel_scope.cancel()


async def test_without_an_answer_nobody_waits_for_ever(
    scene: Scene, autojump_clock: MockClock
) -> None:
    await scene.want()
    assert scene.outcomes == [f"identity error: {WHO}: no answer from the control process"]
    await scene.want()
    assert scene.asked == [WHO, WHO]


def test_a_renewed_certificate_takes_the_place_of_the_old_one(scene: Scene) -> None:
    old, new = a_certificate(), a_certificate()
    scene.held.hand(WHO, old, None)
    assert scene.held.standing(old, old.not_after) is Standing.CURRENT
    scene.held.hand(WHO, a_copy(old), None)  # answered twice
    assert scene.held.standing(old, old.not_after) is Standing.CURRENT
    scene.held.hand(WHO, new, None)
    assert scene.held.standing(old, old.not_after) is Standing.ROTATED
    assert scene.held.standing(new, new.not_after) is Standing.CURRENT


def test_expiry_of_either_end_ends_it(scene: Scene) -> None:
    own = a_certificate()
    scene.held.hand(WHO, own, None)
    scene.now = own.not_after - 1
    assert scene.held.standing(own, own.not_after) is Standing.CURRENT
    assert scene.held.standing(own, scene.now) is Standing.EXPIRED
    scene.now = own.not_after
    assert scene.held.standing(own, own.not_after + 1) is Standing.EXPIRED


async def test_an_expired_certificate_is_asked_for_again(
    scene: Scene, autojump_clock: MockClock
) -> None:
    certificate = a_certificate()
    scene.held.hand(WHO, certificate, None)
    scene.now = certificate.not_after
    await scene.want()
    assert scene.asked == [WHO]


async def test_a_failed_renewal_leaves_what_is_there(scene: Scene) -> None:
    certificate = a_certificate()
    scene.held.hand(WHO, certificate, None)
    scene.held.hand(WHO, None, "the CA is down")
    await scene.want()
    assert scene.outcomes == [certificate]


async def test_whoever_waits_for_a_forgotten_identity_hears_of_it(
    scene: Scene, nursery: trio.Nursery
) -> None:
    nursery.start_soon(scene.want)
    await wait_all_tasks_blocked()
    scene.held.hand(WHO, None, None)
    await wait_all_tasks_blocked()
    assert scene.outcomes == [f"identity error: {WHO}: the identity is no longer needed"]

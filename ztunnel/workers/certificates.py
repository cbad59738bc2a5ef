"""The certificates of a worker: handed to it by the control process, which alone calls the CA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from ztunnel.errors import IdentityError
from ztunnel.identity.manager import WAIT_SECONDS, Standing
from ztunnel.model.identity import Identity
from ztunnel.tls.certificate import WorkloadCertificate

GRACE_SECONDS = 0.5  # the control process waits as long, and its answer says why


@dataclass(slots=True, eq=False)
class _Waiting:
    """Those who wait for one certificate."""

    decided: trio.Event = field(default_factory=trio.Event)
    error: str | None = None


class HandedCertificates:
    """One certificate per identity. `ask` has the control process hand one over."""

    def __init__(self, ask: Callable[[Identity], None], *, clock: Callable[[], float]) -> None:
        """Judge by `clock`, in Unix seconds."""
        self._ask = ask
        self._clock = clock
        self._known: dict[Identity, WorkloadCertificate] = {}
        # By identity of the object, as in `identity.rotation`.
        self._newest: set[WorkloadCertificate] = set()
        self._waiting: dict[Identity, _Waiting] = {}

    def standing(self, certificate: WorkloadCertificate, peer_not_after: float) -> Standing:
        """Judge a tunnel made with `certificate`, to a peer whose own runs out at a Unix time."""
        now = self._clock()
        if now >= peer_not_after or certificate.has_expired(now):
            return Standing.EXPIRED
        return Standing.CURRENT if certificate in self._newest else Standing.ROTATED

    def cached(self, identity: Identity) -> WorkloadCertificate | None:
        """Give the certificate if it is here and valid; never waits."""
        known = self._known.get(identity)
        return known if known is not None and not known.has_expired(self._clock()) else None

    async def certificate_for(self, identity: Identity) -> WorkloadCertificate:
        """Give a valid certificate, asking for it if need be; many may wait for the same one.

        Raises:
            IdentityError: there is none, or no answer.
        """
        await trio.lowlevel.checkpoint()
        known = self.cached(identity)
        if known is not None:
            return known
        waiting = self._waiting.get(identity)
        if waiting is None:
            waiting = self._waiting[identity] = _Waiting()
            self._ask(identity)
        with trio.move_on_after(WAIT_SECONDS + GRACE_SECONDS):
            await waiting.decided.wait()
        if self._waiting.get(identity) is waiting:  # no answer: who comes next asks again
            del self._waiting[identity]
            raise IdentityError(f"identity error: {identity}: no answer from the control process")
        known = self._known.get(identity)
        if known is None or waiting.error is not None:
            error = waiting.error or f"{identity}: the identity is no longer needed"
            raise IdentityError(f"identity error: {error}")
        return known

    def hand(
        self, identity: Identity, certificate: WorkloadCertificate | None, error: str | None
    ) -> None:
        """Take the answer, or a renewed certificate; None with no error forgets the identity.

        The same certificate again changes nothing: tunnels made with it stay current.
        """
        known = self._known.get(identity)
        if certificate is not None and (known is None or known.chain_pem != certificate.chain_pem):
            self._put(identity, certificate)
        elif certificate is None and error is None:
            self._put(identity, None)
        waiting = self._waiting.pop(identity, None)
        if waiting is not None:
            waiting.error = error
            waiting.decided.set()

    def _put(self, identity: Identity, certificate: WorkloadCertificate | None) -> None:
        old = self._known.pop(identity, None)
        if old is not None:
            self._newest.discard(old)
        if certificate is not None:
            self._known[identity] = certificate
            self._newest.add(certificate)

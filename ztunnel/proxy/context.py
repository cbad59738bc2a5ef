"""What the proxy of one workload may use, and nothing more."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import trio

from ztunnel.decide.feedback import Feedback
from ztunnel.errors import DeniedError, LimitError, RouteError
from ztunnel.model.identity import Identity
from ztunnel.proxy.entrances import Entrances
from ztunnel.proxy.live import LiveConnections
from ztunnel.proxy.ways import Ways

if TYPE_CHECKING:
    import random
    from collections.abc import Awaitable, Callable

    from ztunnel.config import Config
    from ztunnel.identity.manager import Standing
    from ztunnel.model.network import Port
    from ztunnel.model.workload import Workload
    from ztunnel.proxy.handshakes import Handshakes
    from ztunnel.state.store import Changes, Store
    from ztunnel.telemetry.access_log import AccessLog
    from ztunnel.telemetry.metrics import Metrics
    from ztunnel.tls.certificate import WorkloadCertificate
    from ztunnel.tls.context import TlsContexts
    from ztunnel.transport.reactor import Reactor
    from ztunnel.transport.sockets import SocketFactory
    from ztunnel.wire.hbone.settings import HboneSettings
    from ztunnel.wire.zds import PodInfo

LOCAL_WORKLOAD_SECONDS = 5.0  # dataplane.md 2.1 step 4


class CertificateSource(Protocol):
    """Who holds the certificates of this node's workloads: see `identity.manager`."""

    def standing(self, certificate: WorkloadCertificate, peer_not_after: float) -> Standing:
        """Judge a tunnel made with `certificate`, to a peer whose own runs out at a Unix time."""

    def cached(self, identity: Identity) -> WorkloadCertificate | None:
        """Give the certificate if it is here and valid; never waits."""

    async def certificate_for(self, identity: Identity) -> WorkloadCertificate:
        """Give a valid certificate, fetching it if need be.

        Raises:
            IdentityError: there is none.
        """


class AddressSource(Protocol):
    """Who can ask the control plane for an address: see `xds.demand`."""

    async def fetch(self, what: str) -> object:
        """Get an address into the store, if it exists.

        Raises:
            RouteError: the control plane did not answer in time.
            LimitError: too many addresses are being waited for.
        """


class Places:
    """A bound on how many of something may be under way at once."""

    __slots__ = ("most", "taken")

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0

    def take(self) -> bool:
        """Take a place if one is free; whoever got one calls `give_back`."""
        if self.most and self.taken >= self.most:
            return False
        self.taken += 1
        return True

    def give_back(self) -> None:
        """Free a place."""
        self.taken -= 1


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeContext:
    """What all workloads of the node share."""

    config: Config
    store: Store
    certificates: CertificateSource
    tls: TlsContexts
    reactor: Reactor
    access_log: AccessLog
    metrics: Metrics
    rng: random.Random
    handshakes: Handshakes
    client_settings: HboneSettings
    server_settings: HboneSettings
    illegal_ports: frozenset[Port]
    demand: AddressSource | None = None  # None: what we were not told does not exist


@dataclass(slots=True, kw_only=True, eq=False)
class ProxyContext:
    """One workload's proxy: whom it serves, with which sockets."""

    node: NodeContext
    info: PodInfo
    sockets: SocketFactory
    spawn: Callable[[Callable[[], Awaitable[None]]], None]
    original_source: bool = False
    live: LiveConnections = field(default_factory=LiveConnections)
    connections: Places = field(default_factory=lambda: Places(0))
    ways: Ways = field(default_factory=Ways)
    entrances: Entrances = field(default_factory=Entrances)
    feedback: Feedback = field(init=False)
    _workload: Workload | None = None
    _version: int = -1

    def __post_init__(self) -> None:
        self.feedback = Feedback(self.node.config.balancing)

    def workload(self) -> Workload | None:
        """Look up the workload we serve, as the control plane describes it now."""
        store = self.node.store
        if self._version != store.version:
            info = self.info
            self._workload = store.workloads.local(
                name=info.name, namespace=info.namespace, service_account=info.service_account
            )
            self._version = store.version
        return self._workload

    async def known_workload(self) -> Workload:
        """Look up the workload we serve, waiting a while for the control plane to tell.

        Raises:
            RouteError: it did not.
        """
        changed = trio.Event()

        def on_change(changes: Changes) -> None:
            if changes.workloads:
                changed.set()

        stop = self.node.store.subscribe(on_change)
        try:
            with trio.move_on_after(LOCAL_WORKLOAD_SECONDS):
                await trio.lowlevel.checkpoint()
                if self.node.demand is not None and self.workload() is None:
                    await self._ask(self.node.demand)
                # No wait behind the look-up: whoever is judged by an old record stays so judged.
                while (workload := self.workload()) is None:
                    await changed.wait()
                    changed = trio.Event()
                return workload
        finally:
            stop()
        info = self.info
        raise RouteError(
            "failed to fetch information about local workload: "
            f"{info.service_account}.{info.namespace} ({info.name}); the control plane has not "
            f"sent it within {LOCAL_WORKLOAD_SECONDS:g}s"
        )

    async def _ask(self, demand: AddressSource) -> None:
        """Ask for our workload: with any answer come all workloads of the node (13)."""
        uid = f"{self.node.config.cluster_id}//Pod/{self.info.namespace}/{self.info.name}"
        with contextlib.suppress(RouteError, LimitError):  # the caller waits, and says what for
            await demand.fetch(uid)

    def lacks_policy(self, workload: Workload) -> bool:
        """Whether a policy that the workload names has not arrived, and we should wait for it."""
        node = self.node
        if not workload.policies or not node.config.policy_wait_seconds:
            return False
        return bool(node.store.policies.missing(workload))

    async def known_policies(self) -> Workload:
        """Wait for the policies that our workload names; return the workload as it then is.

        Without them an ALLOW policy's workload would be open, which is how the reference behaves
        (dataplane.md 17.25).

        Raises:
            DeniedError: they did not arrive in time.
            RouteError: the workload went away meanwhile.
        """
        seconds = self.node.config.policy_wait_seconds
        changed = trio.Event()
        stop = self.node.store.subscribe(lambda _: changed.set())
        try:
            with trio.move_on_after(seconds):
                while (workload := self.workload()) is not None and self.lacks_policy(workload):
                    await changed.wait()
                    changed = trio.Event()
        finally:
            stop()
        await trio.lowlevel.checkpoint()
        workload = await self.known_workload()
        if self.lacks_policy(workload):
            missing = ", ".join(self.node.store.policies.missing(workload))
            raise DeniedError(
                f"connection closed due to policy rejection: {missing} applies to the workload but "
                f"has not arrived within {seconds:g}s"
            )
        return workload

    def identity(self, workload: Workload) -> Identity:
        """Name the workload: its trust domain, with the account the node agent vouches for."""
        return Identity(workload.trust_domain, self.info.namespace, self.info.service_account)

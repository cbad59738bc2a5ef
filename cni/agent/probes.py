"""Keep the host's sets of probed addresses as they should be (cni.md 5).

How it works: who owns an address is decided here, at once and in the order in which things
happen; what follows from it is done by one thread, in that order. So when an address goes from
one pod to the next, the end of the old pod cannot take it from the new one.
"""

from __future__ import annotations

from collections.abc import Iterable

import structlog
import trio

from cni.agent.metrics import AgentMetrics
from cni.redirect.branch_eni import Detours
from cni.redirect.errors import RedirectError
from cni.redirect.host import (
    SET_PREFIX,
    HostPlan,
    apply_host,
    change_members,
    inspect_host,
    read_members,
    remove_host,
)
from ztunnel.linux.netns import PodNetns
from ztunnel.model.network import IpAddress
from ztunnel.model.workload import PodUid

log = structlog.get_logger(component="probes")


class ProbeSets:
    """The real `Probes`; with `plan` None no set is written: another strategy is used.

    `detours`: rules for pods with a network interface of their own; by default none are made,
    and those that an earlier agent made go.
    """

    def __init__(
        self,
        host: PodNetns,
        plan: HostPlan | None,
        metrics: AgentMetrics,
        *,
        detours: Detours | None = None,
    ) -> None:
        self.plan = plan
        self._detours = detours or Detours(host, makes=False)
        self._host = host
        self._owners: dict[IpAddress, PodUid] = {}
        self._limiter = trio.CapacityLimiter(1)
        self._metrics = metrics

    def remember(self, uid: PodUid, ips: Iterable[IpAddress]) -> None:
        """Go on with what an earlier agent exempted; for before the first `ensure`."""
        self._owners.update(dict.fromkeys(ips, uid))

    async def put(self, uid: PodUid, ips: Iterable[IpAddress]) -> None:
        """Exempt these addresses, and none else of this pod.

        Raises:
            RedirectError: the kernel refused it.
        """
        wanted = dict.fromkeys(ips, uid)
        gone = [ip for ip in self._owned(uid) if ip not in wanted]
        self._disown(gone)
        self._owners.update(wanted)
        await self._change(uid, wanted, gone)

    async def drop(self, uid: PodUid) -> None:
        """Exempt none of this pod's addresses.

        Raises:
            RedirectError: the kernel refused it.
        """
        gone = self._owned(uid)
        self._disown(gone)
        await self._change(uid, {}, gone)

    async def ensure(self) -> None:
        """Compare rule, sets and detours with what they should be, and repair them.

        Raises:
            RedirectError: they cannot be read or written.
        """
        plan = self.plan
        if plan is None:
            await trio.to_thread.run_sync(self._settle, dict(self._owners), limiter=self._limiter)
            return
        problems = await trio.to_thread.run_sync(
            inspect_host, self._host, plan, limiter=self._limiter
        )
        if problems:
            log.info("probe rule written", because="; ".join(problems[:3]))
            await trio.to_thread.run_sync(apply_host, self._host, plan, limiter=self._limiter)
        await trio.to_thread.run_sync(self._repair, limiter=self._limiter)

    async def remove(self) -> None:
        """Take everything away, for good.

        Raises:
            RedirectError: the kernel refused it.
        """
        failure: RedirectError | None = None
        try:
            await trio.to_thread.run_sync(self._detours.clear, limiter=self._limiter)
        except RedirectError as exc:
            failure = exc
        await trio.to_thread.run_sync(remove_host, self._host, limiter=self._limiter)
        if failure is not None:
            raise failure

    def _repair(self) -> None:
        """Make the sets equal to our list; in the thread, after all changes before it."""
        wanted = dict(self._owners)
        found = read_members(self._host)
        wrong = {ip: str(uid) for ip, uid in wanted.items() if found.get(ip) != uid}
        unknown = [ip for ip in found if ip not in wanted]
        change_members(self._host, wrong, unknown)
        self._settle(wanted)

    def _settle(self, wanted: Iterable[IpAddress]) -> None:
        if surplus := self._detours.settle(wanted):
            log.info("left-over routing rules removed", rules=", ".join(surplus))

    async def _change(
        self, uid: PodUid, wanted: dict[IpAddress, PodUid], gone: list[IpAddress]
    ) -> None:
        self._metrics.exempted.set(len(self._owners))
        if not (wanted or gone):
            await trio.lowlevel.checkpoint()
            return
        if self.plan is not None:
            shown, removed = " ".join(map(str, wanted)), " ".join(map(str, gone))
            log.debug("sets change", podUID=uid, ipset=SET_PREFIX, put=shown, removed=removed)
            await self._change_sets({ip: str(uid) for ip, uid in wanted.items()}, gone)
        await trio.to_thread.run_sync(
            _lead, self._detours, list(wanted), gone, limiter=self._limiter
        )

    async def _change_sets(self, wanted: dict[IpAddress, str], gone: list[IpAddress]) -> None:
        try:
            await trio.to_thread.run_sync(
                change_members, self._host, wanted, gone, limiter=self._limiter
            )
        except RedirectError:
            await self._rewrite(wanted, gone)

    async def _rewrite(self, wanted: dict[IpAddress, str], gone: list[IpAddress]) -> None:
        """Try again after writing the sets: somebody may have removed them."""
        assert self.plan is not None
        await trio.to_thread.run_sync(apply_host, self._host, self.plan, limiter=self._limiter)
        await trio.to_thread.run_sync(
            change_members, self._host, wanted, gone, limiter=self._limiter
        )

    def _owned(self, uid: PodUid) -> list[IpAddress]:
        return [ip for ip, owner in self._owners.items() if owner == uid]

    def _disown(self, ips: Iterable[IpAddress]) -> None:
        for ip in ips:
            del self._owners[ip]


def _lead(detours: Detours, wanted: list[IpAddress], gone: list[IpAddress]) -> None:
    detours.drop(gone)
    detours.put(wanted)

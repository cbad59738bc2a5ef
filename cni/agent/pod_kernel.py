"""What is done inside pods, in threads: netlink takes up to 20 ms, a look at all processes longer.

The limits are low on purpose: the kernel serializes changes of packet filters anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import structlog
import trio

from cni.agent.errors import NetnsError
from cni.agent.pod_netns import NodeView, Wanted, addresses_in
from cni.agent.runtime_client import RuntimeClient
from cni.redirect.apply import apply_redirect, inspect_redirect, read_stamp, remove_redirect
from cni.redirect.listeners import silent_ports
from cni.redirect.plan import RedirectPlan
from ztunnel.linux.netns import PodNetns
from ztunnel.model.network import IpAddress
from ztunnel.model.workload import PodUid

T = TypeVar("T")

THREADS_MAX = 4
PROBLEMS_SHOWN = 3

log = structlog.get_logger(component="netns")


class KernelThreads:
    """The real `PodKernel`."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(THREADS_MAX)

    async def inspect(self, netns: PodNetns, plan: RedirectPlan) -> list[str]:
        """Say in what the pod's rules and routes differ from the plan's."""
        return await self._run(inspect_redirect, netns, plan)

    async def apply(self, netns: PodNetns, plan: RedirectPlan, stamp: str) -> None:
        """Write rules and routes."""
        await self._run(apply_redirect, netns, plan, stamp)

    async def remove(self, netns: PodNetns) -> None:
        """Take rules and routes away."""
        await self._run(remove_redirect, netns)

    async def stamp(self, netns: PodNetns) -> str | None:
        """Give the stamp of the rules in the pod; None if there are no rules."""
        return await self._run(read_stamp, netns)

    async def silent_ports(self, netns: PodNetns) -> list[int]:
        """Give those of the proxy's ports at which nobody listens."""
        return await self._run(silent_ports, netns)

    async def _run(self, action: Callable[..., T], netns: PodNetns, *rest: object) -> T:
        # A copy, because the thread goes on when we are cancelled and the owner closes its own.
        with netns.duplicate() as copy:
            return await trio.to_thread.run_sync(
                partial(action, copy, *rest), limiter=self._limiter
            )


@dataclass(eq=False, slots=True)
class _Search:
    uid: PodUid
    ips: tuple[IpAddress, ...]
    is_over: bool = False
    found: PodNetns | None = None


class NetnsFinder:
    """The real `Spaces`. Searches that come while one is under way share the next one.

    The container runtime is asked first; pods that it does not lead to are looked for among the
    processes.
    """

    def __init__(self, node: NodeView, runtime: RuntimeClient) -> None:
        self.node = node
        self._runtime = runtime
        self._complaint = ""
        self._searches: list[_Search] = []
        # Not about shared state: who holds it searches for everybody who waits.
        self._searching = trio.Lock()

    async def find(self, uid: PodUid, ips: Iterable[IpAddress]) -> PodNetns | None:
        """Find a pod's namespace; the caller closes it."""
        search = _Search(uid, tuple(ips))
        self._searches.append(search)
        async with self._searching:
            if not search.is_over:
                await self._search()
        return search.found

    async def is_alive(self, netns: PodNetns) -> bool:
        """Whether a namespace still has an address: the runtime takes them away at the end."""
        try:
            addresses = await trio.to_thread.run_sync(addresses_in, netns)
        except NetnsError:
            return False
        return any(not (ip.is_loopback or ip.is_link_local) for ip in addresses)

    async def find_all(self, wanted: Wanted) -> dict[PodUid, PodNetns]:
        """Find the namespaces of these pods; the caller closes them."""
        found: dict[PodUid, PodNetns] = {}
        paths, problems = await self._runtime.paths_of(wanted.keys())
        if paths:
            found, more = await trio.to_thread.run_sync(self.node.open_sandboxes, paths, wanted)
            problems += more
        self._complain("; ".join(problems[:PROBLEMS_SHOWN]))
        missing = {uid: ips for uid, ips in wanted.items() if uid not in found}
        if missing:
            try:
                found |= await trio.to_thread.run_sync(self.node.find, missing)
            except BaseException:
                for netns in found.values():
                    netns.close()
                raise
        return found

    def _complain(self, what: str) -> None:
        """Log what is wrong, unless that is what was wrong the last time, or nothing is."""
        if what and what != self._complaint:
            log.warning("the container runtime does not lead to all pods", error=what)
        self._complaint = what

    async def _search(self) -> None:
        searches, self._searches = self._searches, []
        wanted = {search.uid: search.ips for search in searches}
        found = await self.find_all(wanted)
        for search in searches:
            search.is_over = True
            search.found = found.pop(search.uid, None)

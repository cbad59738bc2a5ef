"""Has one worker serve the pods that are wanted, whatever they were when it came up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import trio

from ztunnel.errors import UnreachableError
from ztunnel.telemetry.log import get
from ztunnel.workers.messages import Leave, Serve

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ztunnel.linux.netns import PodNetns
    from ztunnel.model.workload import PodUid
    from ztunnel.wire.zds import PodInfo
    from ztunnel.workers.orders import Orders

log = get("workers")

ORDER_SECONDS = 20.0  # to serve a pod or leave it
RETRY_SECONDS = 1.0  # for a pod that the worker could not serve


@dataclass(frozen=True, slots=True, eq=False)
class WantedPod:
    """A pod that every worker is to serve."""

    info: PodInfo
    netns: PodNetns


@dataclass(frozen=True, slots=True)
class _Refusal:
    pod: WantedPod
    error: str
    retry_at: float


class PodKeeper:
    """Compares what is wanted with what a worker serves, and mends it one pod at a time."""

    def __init__(
        self,
        worker: str,
        wanted: Mapping[PodUid, WantedPod],
        orders: Orders,
        *,
        changed: Callable[[], None],
    ) -> None:
        """`changed` is called when `standing` may have another answer."""
        self._worker = worker
        self._wanted = wanted
        self._orders = orders
        self._changed = changed
        self._served: dict[PodUid, WantedPod] = {}
        self._refused: dict[PodUid, _Refusal] = {}
        self._beginning: PodUid | None = None
        self._look = trio.Event()

    def look(self) -> None:
        """Compare again: what is wanted has changed."""
        self._look.set()

    def standing(self, uid: PodUid, pod: WantedPod) -> str | None:
        """Say how it stands with a pod: "" is served, None not decided, else why it is not."""
        if self._served.get(uid) is pod:
            return ""
        refusal = self._refused.get(uid)
        return refusal.error if refusal is not None and refusal.pod is pod else None

    def knows(self, uid: PodUid) -> bool:
        """Whether the worker serves a pod of this name, or is about to."""
        return uid in self._served or uid == self._beginning

    async def run(self) -> NoReturn:
        """Mend until cancelled.

        Raises:
            UnreachableError: the worker does not obey.
        """
        while True:
            self._look = trio.Event()
            if await self._mend_one():
                self._changed()
                continue
            retry_at = min((one.retry_at for one in self._refused.values()), default=math.inf)
            with trio.move_on_at(retry_at):
                await self._look.wait()

    async def _mend_one(self) -> bool:
        """Make one change, if one is due; whether one was."""
        wanted, now = self._wanted, trio.current_time()
        for uid, served in self._served.items():
            if wanted.get(uid) is not served:
                await self._order(Leave(self._orders.turn(), uid))
                del self._served[uid]
                return True
        for uid, refusal in tuple(self._refused.items()):
            if wanted.get(uid) is not refusal.pod:
                del self._refused[uid]
        for uid, pod in wanted.items():
            refused = self._refused.get(uid)
            if uid in self._served or (refused is not None and now < refused.retry_at):
                continue
            await self._serve(uid, pod)
            return True
        await trio.lowlevel.checkpoint()
        return False

    async def _serve(self, uid: PodUid, pod: WantedPod) -> None:
        order = Serve(self._orders.turn(), uid, pod.info)
        self._beginning = uid
        error = await self._order(order, fd=pod.netns.fileno())
        self._beginning = None
        if error is None:
            self._served[uid] = pod
            self._refused.pop(uid, None)
        else:
            log.warning("worker cannot serve a pod yet", worker=self._worker, pod=uid, error=error)
            self._refused[uid] = _Refusal(pod, error, trio.current_time() + RETRY_SECONDS)

    async def _order(self, order: Serve | Leave, *, fd: int | None = None) -> str | None:
        with trio.move_on_after(ORDER_SECONDS):
            return await self._orders.carry_out(order, fd=fd)
        what = type(order).__name__.lower()
        raise UnreachableError(
            f"{self._worker} has not obeyed within {ORDER_SECONDS:g} s: {what} {order.uid}"
        )

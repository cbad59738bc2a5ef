"""List and watch, patches and single pods: what we ask the Kubernetes API for (cni.md 3.2)."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar
from urllib.parse import quote

import msgspec
import structlog
import trio

from cni.agent.errors import ExpiredError, KubeError
from cni.agent.kube_http import REQUEST_SECONDS, KubeClient, Lines
from cni.agent.mirror import GONE, Change, Kept, Mirror, decode_page
from cni.agent.objects import STATUS_ANNOTATION, KubePod, Redirection, decode_pod
from ztunnel.model.identity import Namespace

PAGE_OBJECTS = 500
WATCH_SECONDS = 290  # we ask the server to end each watch by then; below usual idle timeouts
WATCH_GRACE_SECONDS = 15  # and hang up ourselves if it does not
FIRST_DELAY_SECONDS = 0.2
DELAY_SECONDS_MAX = 30.0
NOT_FOUND, CONFLICT = 404, 409

log = structlog.get_logger(component="kube")

T = TypeVar("T", bound=Kept)


@dataclass(frozen=True, slots=True)
class Collection(Generic[T]):
    """Which objects."""

    name: str
    path: str
    decode: Callable[[msgspec.Raw], T]
    query: Mapping[str, str] = field(default_factory=dict)


class Watcher(Generic[T]):
    """Keeps a mirror equal to the server's objects, whatever happens to server and network.

    `on_changes` gets all changes of one list, or one of a watch. `last_contact` is the
    `trio.current_time()` of the last answer, None before the first.
    """

    def __init__(
        self,
        client: KubeClient,
        collection: Collection[T],
        on_changes: Callable[[list[Change[T]]], None],
        *,
        rng: random.Random,
    ) -> None:
        self.mirror = Mirror(collection.decode)
        self.synced = trio.Event()
        self.last_contact: float | None = None
        self.lists = 0
        self._client = client
        self._collection = collection
        self._on_changes = on_changes
        self._rng = rng

    async def run(self) -> None:
        """Watch until cancelled."""
        silent = stale = FIRST_DELAY_SECONDS  # how long to wait for a server, and for a list
        while True:
            try:
                if self.mirror.version is None:
                    await self._list()
                await self._watch()
                silent = stale = FIRST_DELAY_SECONDS
                # A server that ends each watch at once must not be asked without pause.
                pause = self._rng.uniform(0, FIRST_DELAY_SECONDS)
            except ExpiredError as exc:
                self.mirror.expire()
                log.info("watch expired", kind=self._collection.name, error=str(exc))
                # It answers again, and after its restart always that: the list is not to wait for
                # as long as it was away.
                silent = FIRST_DELAY_SECONDS
                pause, stale = self._backed_off(stale)
            except KubeError as exc:
                log.warning("watch failed", kind=self._collection.name, error=str(exc))
                pause, silent = self._backed_off(silent)
            await trio.sleep(pause)

    def _backed_off(self, delay: float) -> tuple[float, float]:
        """Say how long to pause now, and what to begin with the next time."""
        return delay * self._rng.uniform(0.5, 1.0), min(delay * 2, DELAY_SECONDS_MAX)

    async def _list(self) -> None:
        items: list[T] = []
        unreadable = 0
        query = {**self._collection.query, "limit": str(PAGE_OBJECTS)}
        while True:
            page = decode_page(await self._get(query), self._collection.decode)
            items += page.items
            unreadable += page.unreadable
            if page.next is None:
                break
            query["continue"] = page.next
        if unreadable:
            log.warning("unreadable objects", kind=self._collection.name, count=unreadable)
        self.lists += 1
        changes = self.mirror.replace(items, page.version)
        log.info("listed", kind=self._collection.name, objects=len(items), changes=len(changes))
        self._on_changes(changes)
        self.synced.set()

    async def _get(self, query: Mapping[str, str]) -> bytes:
        try:
            body = await self._client.get(self._collection.path, query)
        except KubeError as exc:
            if exc.status == GONE:  # the list took so long that its version is gone
                raise ExpiredError(str(exc), status=GONE) from exc
            raise
        self.last_contact = trio.current_time()
        return body

    async def _watch(self) -> None:
        query = {
            **self._collection.query,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self.mirror.version or "",
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        try:
            with trio.move_on_after(WATCH_SECONDS + WATCH_GRACE_SECONDS + REQUEST_SECONDS):
                async with self._client.watch(self._collection.path, query) as answer:
                    lines = Lines()
                    while (piece := await answer.piece()) is not None:
                        self.last_contact = trio.current_time()
                        for line in lines.feed(piece):
                            self._take(line)
        except KubeError as exc:
            if exc.status == GONE:
                raise ExpiredError(str(exc), status=GONE) from exc
            raise

    def _take(self, line: bytes) -> None:
        unreadable = self.mirror.unreadable
        change = self.mirror.receive(line)
        if self.mirror.unreadable != unreadable:
            log.warning("unreadable object", kind=self._collection.name)
        if change is not None:
            log.debug("change", kind=self._collection.name, what=type(change).__name__)
            self._on_changes([change])


def pod_path(namespace: str, name: str) -> str:
    """Make the path of a pod."""
    return f"/api/v1/namespaces/{quote(namespace, safe='')}/pods/{quote(name, safe='')}"


async def fetch_pod(client: KubeClient, namespace: Namespace, name: str) -> KubePod | None:
    """Fetch one pod as it is now; None if there is none of that name.

    Raises:
        KubeError: the server does not answer, or refuses.
    """
    try:
        return decode_pod(await client.get(pod_path(namespace, name)))
    except KubeError as exc:
        if exc.status == NOT_FOUND:
            return None
        raise


async def annotate(client: KubeClient, pod: KubePod, status: Redirection | None) -> bool:
    """Write a pod's status annotation, or take it away; False if that very pod is gone.

    Raises:
        KubeError: the server does not answer, or refuses.
    """
    change = {
        "metadata": {
            # Another pod may have got the name meanwhile: the server then answers 409.
            "uid": pod.uid,
            "annotations": {STATUS_ANNOTATION: status.value if status else None},
        }
    }
    try:
        await client.merge_patch(f"{pod_path(pod.namespace, pod.name)}/status", change)
    except KubeError as exc:
        if exc.status in (NOT_FOUND, CONFLICT):
            return False
        raise
    return True

"""A copy of what the Kubernetes API has of one kind, by list and watch. Pure.

How it works: a list replaces everything and says what changed since the last one, deletions
included. A watch then goes on from the list's version, one JSON event a line. The version moves
with each event, and with bookmarks, so that an interrupted watch resumes where it was. A server
that no longer has that version says 410, as a status or inside an event: list again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import msgspec

from cni.agent.errors import ExpiredError, KubeError

GONE = 410
OBJECTS_MAX = (
    100_000  # of one kind; a node runs hundreds of pods, a cluster ten thousand namespaces
)


class Kept(Protocol):
    """What a mirror can hold."""

    @property
    def uid(self) -> Hashable: ...  # noqa: D102 - what tells two objects apart

    @property
    def version(self) -> str: ...  # noqa: D102 - equal versions mean equal objects


T = TypeVar("T", bound=Kept)


@dataclass(frozen=True, slots=True)
class Changed(Generic[T]):
    """An object is new or another; `before` is None for a new one."""

    item: T
    before: T | None


@dataclass(frozen=True, slots=True)
class Removed(Generic[T]):
    """An object is gone; `item` is its last form."""

    item: T


Change = Changed[T] | Removed[T]


class _Metadata(msgspec.Struct, rename={"resource_version": "resourceVersion", "next": "continue"}):
    resource_version: str = ""
    next: str = ""


class _List(msgspec.Struct):
    metadata: _Metadata
    items: list[msgspec.Raw]


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Bookmark(msgspec.Struct):
    metadata: _Metadata


class _Status(msgspec.Struct):
    code: int = 0
    message: str = ""


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a list; `next` is None on the last one."""

    items: tuple[T, ...]
    version: str
    next: str | None
    unreadable: int = 0


def decode_page(data: bytes, decode: Callable[[msgspec.Raw], T]) -> Page[T]:
    """Read a page of a list; objects that cannot be read are left out and counted.

    Raises:
        KubeError: it is no list.
    """
    page = _decoded(_List, data)
    items: list[T] = []
    for raw in page.items:
        try:
            items.append(decode(raw))
        except KubeError:
            continue
    metadata = page.metadata
    unreadable = len(page.items) - len(items)
    return Page(tuple(items), metadata.resource_version, metadata.next or None, unreadable)


class Mirror(Generic[T]):
    """The copy. `version` is where a watch goes on; None: list first."""

    def __init__(self, decode: Callable[[msgspec.Raw], T]) -> None:
        self.items: dict[Hashable, T] = {}
        self.version: str | None = None
        self.unreadable = 0  # objects of watches
        self._decode = decode

    def replace(self, items: Iterable[T], version: str) -> list[Change[T]]:
        """Take a whole list; return what is different."""
        fresh = {item.uid: item for item in items}
        if len(fresh) > OBJECTS_MAX:
            raise KubeError(f"more than {OBJECTS_MAX} objects")
        changes: list[Change[T]] = [
            Removed(item) for uid, item in self.items.items() if uid not in fresh
        ]
        for uid, item in fresh.items():
            before = self.items.get(uid)
            if before is None or before.version != item.version:
                changes.append(Changed(item, before))
        self.items = fresh
        self.version = version
        return changes

    def receive(self, line: bytes) -> Change[T] | None:
        """Take one event of a watch; None if it changes nothing.

        Raises:
            ExpiredError: list again.
            KubeError: the server reports an error, or this is no event.
        """
        event = _decoded(_Event, line)
        match event.type:
            case "ERROR":
                raise self._error(event.object)
            case "BOOKMARK":
                self.version = _version(event.object)
                return None
            case "ADDED" | "MODIFIED" | "DELETED":
                item = self._read(event.object)
                self.version = _version(event.object)
                return self._take(item, is_gone=event.type == "DELETED") if item else None
            case _:
                raise KubeError(f"a watch event of an unknown type: {event.type[:40]!r}")

    def expire(self) -> None:
        """Forget the version, so that a list comes next; what we have stays until then."""
        self.version = None

    def _read(self, data: msgspec.Raw) -> T | None:
        """Decode an object; one that cannot be read must not stop all that come after it."""
        try:
            return self._decode(data)
        except KubeError:
            self.unreadable += 1
            return None

    def _take(self, item: T, *, is_gone: bool) -> Change[T] | None:
        if is_gone:
            self.items.pop(item.uid, None)
            return Removed(item)
        before = self.items.get(item.uid)
        if before is None and len(self.items) >= OBJECTS_MAX:
            raise KubeError(f"more than {OBJECTS_MAX} objects")
        self.items[item.uid] = item
        return Changed(item, before)

    def _error(self, data: msgspec.Raw) -> KubeError:
        status = _decoded(_Status, data)
        if status.code == GONE:
            self.expire()
            return ExpiredError(status.message or "too old resource version", status=GONE)
        return KubeError(f"watch failed: {status.message[:200]}", status=status.code)


def _version(data: msgspec.Raw) -> str:
    version = _decoded(_Bookmark, data).metadata.resource_version
    if not version:
        raise KubeError("the API server sent nonsense: an object without a version")
    return version


S = TypeVar("S", bound=msgspec.Struct)


def _decoded(kind: type[S], data: bytes | msgspec.Raw) -> S:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError, ValueError) as exc:
        raise KubeError(f"the API server sent nonsense: {exc}") from exc

"""Delta xDS, the client's end of one session over many streams (state-and-xds.md 4). No I/O.

How it works: a session outlives its streams. `connect` opens a stream with one request per type,
in order, and tells the versions we hold so that the server sends only what differs; `receive`
digests one response and ends with exactly one request, the acknowledgement. Both give their work
as steps, because a response may hold a whole mesh: the shell does what a step says, rests, and
asks for the next one. A version counts as held only after the shell came back from the step that
carried the resource, so a stream that ends in the middle claims nothing we do not have.

Whatever is malformed is refused alone and named in the acknowledgement; the rest counts. What is
refused keeps the version it had before, which makes the server send it again on the next stream.

Differences from the reference: a resource whose version we hold (or, without a version, whose very
bytes) is not looked at again; an unknown type is refused, not acknowledged; a name that is both
sent and removed is removed, in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from google.protobuf.struct_pb2 import Struct

from ztunnel.errors import ResourceError
from ztunnel.wire.delta_response import DeltaResponse
from ztunnel.wire.held_versions import HeldVersions, mark_of
from ztunnel.wire.pb import xds_pb2 as pb
from ztunnel.wire.policies import read_policy
from ztunnel.wire.resources import (
    ADDRESS_TYPE,
    AUTHORIZATION_TYPE,
    Resource,
    key_of,
    read_address,
)

ADS_PATH = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
WILDCARD = "*"

# One step takes about 0.1 ms: 15 us for an address and 60 for a policy with all its indexes, 6 us
# for an address that is gone, 0.5 us for a field of the envelope or a version that is noted.
RESOURCES_PER_STEP: Mapping[str, int] = {ADDRESS_TYPE: 8, AUTHORIZATION_TYPE: 2}
REMOVED_PER_STEP = 16
FIELDS_PER_STEP = 200
NAMES_PER_STEP = 200

# An error that operators read in a status table; the rest is in our log.
REJECTIONS_SHOWN = 20
REJECTION_CHARS = 300
INVALID_ARGUMENT = 3  # google.rpc.Code; the reference leaves it 0, Envoy does not

_READERS: Mapping[str, Callable[[bytes, list[str]], Resource]] = {
    ADDRESS_TYPE: read_address,
    AUTHORIZATION_TYPE: read_policy,
}


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """Who we are (section 3). Metadata values are JSON."""

    id: str
    metadata: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Subscription:
    """What we want of one type: everything, or what we ask for by name."""

    type_url: str
    wildcard: bool = True


@dataclass(frozen=True, slots=True)
class Paused:
    """Nothing to do but rest."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """Send this request, whose pieces are to be joined end to end."""

    pieces: Sequence[bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Arrived:
    """Apply these as a whole. A removed name may be a workload's, a service's or a policy's."""

    type_url: str
    resources: Sequence[Resource]
    removed: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Handled:
    """A response was digested and answered; this is for logs, metrics and those who wait.

    `type_url` is None for a type we did not subscribe to. `value_bytes` counts what was inside
    the resources. `rejected` is `name: reason`, cut to what a person can read; `rejections` is how
    many there were. `answered` has the names, other names and removed names of an on-demand type,
    but not of what was rejected: whether that exists is still open.
    """

    type_url: str | None
    resources: int
    value_bytes: int
    rejections: int
    rejected: tuple[str, ...]
    notes: tuple[str, ...]
    answered: Collection[str]


Step: TypeAlias = Paused | Outgoing | Arrived | Handled


@dataclass(slots=True)
class _Outcome:
    """What is found out while one response is digested."""

    value_bytes: int = 0
    rejections: int = 0
    rejected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    answered: set[str] = field(default_factory=set)

    def reject(self, name: str, reason: str) -> None:
        self.rejections += 1
        if len(self.rejected) < REJECTIONS_SHOWN:
            self.rejected.append(f"{name}: {reason}"[:REJECTION_CHARS])

    def note(self, name: str, notes: Iterable[str]) -> None:
        for text in notes:
            if len(self.notes) < REJECTIONS_SHOWN:
                self.notes.append(f"{name}: {text}"[:REJECTION_CHARS])

    def answers(self, kind: _Type, envelope: pb.Resource) -> None:
        """Note the names that an on-demand client may have asked for this by."""
        if not kind.wildcard:
            self.answered.update((envelope.name, *envelope.aliases))

    def error(self) -> pb.Status | None:
        """Say what was refused, None if nothing was."""
        if not self.rejections:
            return None
        unshown = self.rejections - len(self.rejected)
        more = [f"and {unshown} more"] if unshown else []
        return pb.Status(code=INVALID_ARGUMENT, message="; ".join(self.rejected + more))


@dataclass(slots=True)
class _Type:
    """What we hold of one type."""

    wildcard: bool
    held: HeldVersions = field(default_factory=HeldVersions)
    # On-demand names this stream is subscribed to, and whether they were answered.
    asked: dict[str, bool] = field(default_factory=dict)
    has_answered: bool = False


class DeltaSession:
    """One client's session with whichever control plane it is connected to."""

    def __init__(self, node: NodeInfo, subscriptions: Sequence[Subscription]) -> None:
        assert all(wanted.type_url in _READERS for wanted in subscriptions)
        metadata = Struct()
        metadata.update(node.metadata)  # type: ignore[arg-type]  # JSON, and all of JSON fits
        self._node = pb.Node(id=node.id, metadata=metadata)
        self._types = {wanted.type_url: _Type(wanted.wildcard) for wanted in subscriptions}

    @property
    def is_synced(self) -> bool:
        """Whether every wildcard type had a response that was handled, good or bad (16.2)."""
        return all(kind.has_answered for kind in self._types.values() if kind.wildcard)

    def connect(self, wanted: Collection[str] = ()) -> Iterator[Step]:
        """Begin a new stream; `wanted` are on-demand names that somebody still waits for."""
        for type_url, kind in self._types.items():
            first = pb.DeltaDiscoveryRequest(node=self._node, type_url=type_url)
            kind.asked = {}
            if not kind.wildcard:
                # Both at once mean: subscribe to nothing, and do not take that for everything.
                first.resource_names_subscribe.append(WILDCARD)
                first.resource_names_unsubscribe.append(WILDCARD)
                kind.asked.update(dict.fromkeys(wanted, False))
            pieces = [first.SerializeToString()]
            # Encoded messages may be joined end to end: their maps are merged.
            for piece in kind.held.told(kind.asked):
                pieces.append(piece)
                yield Paused()
            yield Outgoing(pieces)

    def ask(self, names: Iterable[str]) -> list[bytes]:
        """Ask for on-demand addresses by name, unless an answer is under way already.

        What was answered before is given up first: a name that is subscribed to would not be
        answered again.
        """
        kind = self._types[ADDRESS_TYPE]
        assert not kind.wildcard, "a wildcard subscription has everything"
        new = [name for name in dict.fromkeys(names) if kind.asked.get(name, True)]
        again = self.forget(new)
        kind.asked.update(dict.fromkeys(new, False))
        return again + (_on_demand(resource_names_subscribe=new) if new else [])

    def forget(self, names: Iterable[str]) -> list[bytes]:
        """Give up on-demand names, so that the server does not keep them for us."""
        kind = self._types[ADDRESS_TYPE]
        old = [name for name in dict.fromkeys(names) if name in kind.asked]
        for name in old:
            del kind.asked[name]
        return _on_demand(resource_names_unsubscribe=old) if old else []

    def receive(self, data: bytes | bytearray) -> Iterator[Step]:
        """Digest one response; take every step before the next response is received.

        A `bytearray` is emptied thereby.

        Raises:
            ResourceError: this is no response at all; end the stream.
        """
        response = DeltaResponse(data)
        while response.scan(FIELDS_PER_STEP):
            yield Paused()
        outcome = _Outcome()
        kind = self._types.get(response.type_url)
        if kind is None:
            outcome.reject(response.type_url, "we did not subscribe to this type")
        else:
            yield from self._digest(response, kind, outcome)
            kind.has_answered = True
        answer = pb.DeltaDiscoveryRequest(
            type_url=response.type_url,
            response_nonce=response.nonce,
            error_detail=outcome.error(),
        )
        yield Outgoing([answer.SerializeToString()])
        yield Handled(
            type_url=response.type_url if kind else None,
            resources=len(response),
            value_bytes=outcome.value_bytes,
            rejections=outcome.rejections,
            rejected=tuple(outcome.rejected),
            notes=tuple(outcome.notes),
            answered=outcome.answered,
        )
        while response.release():
            yield Paused()

    def _digest(self, response: DeltaResponse, kind: _Type, outcome: _Outcome) -> Iterator[Step]:
        """Decode, and hand over as a whole what readers must not see half of.

        Workloads and services may arrive in any order, so they go over in slices. Policies go
        over together: an ALLOW without the DENY beside it is wider than either. Only the first
        ones go in slices too, as nothing is served before they are here.
        """
        url = response.type_url
        is_sliced = url == ADDRESS_TYPE or not kind.has_answered
        read: dict[str, tuple[Resource, bytes]] = {}
        slice_size = RESOURCES_PER_STEP[url]
        for number in range(len(response)):
            if number and number % slice_size == 0:
                if is_sliced and read:
                    yield from _hand_over(url, kind, read)
                    read = {}
                else:
                    yield Paused()
            self._read(response, number, kind, read, outcome)
        most = REMOVED_PER_STEP if is_sliced else len(response.removed)
        gone = response.take_removed(most)
        while read or gone:
            for name in gone:
                read.pop(name, None)  # sent and removed: removed it is
            yield from _hand_over(url, kind, read, gone)
            if not kind.wildcard:
                outcome.answered.update(gone)
            read, gone = {}, response.take_removed(most)
        for name in outcome.answered & kind.asked.keys():
            kind.asked[name] = True

    def _read(
        self,
        response: DeltaResponse,
        number: int,
        kind: _Type,
        read: dict[str, tuple[Resource, bytes]],
        outcome: _Outcome,
    ) -> None:
        """Decode one resource into `read`, or note why not."""
        name = ""
        notes: list[str] = []
        try:
            envelope = response.resource(number)
            name, version, payload = envelope.name, envelope.version, envelope.resource
            value = payload.value
            outcome.value_bytes += len(value)
            mark = mark_of(name, version, value)
            if kind.held.holds(name, mark):
                outcome.answers(kind, envelope)
                return
            _require(payload.type_url, response.type_url, "is of type")
            resource = _READERS[response.type_url](value, notes)
            key = key_of(resource)
            # Under another name we could never remove it again.
            _require(key, name, "describes")
        except ResourceError as exc:
            outcome.reject(name or f"resource {number}", str(exc))
            return
        if notes:
            outcome.note(name, notes)
        read.pop(key, None)  # sent twice: the last one counts, where it stands
        read[key] = resource, mark
        outcome.answers(kind, envelope)


def _require(found: str, wanted: str, what: str) -> None:
    if found != wanted:
        raise ResourceError(f"{what} {found!r}")


def _on_demand(**names: list[str]) -> list[bytes]:
    request = pb.DeltaDiscoveryRequest(type_url=ADDRESS_TYPE, **names)  # type: ignore[arg-type]
    return [request.SerializeToString()]


def _hand_over(
    type_url: str,
    kind: _Type,
    read: Mapping[str, tuple[Resource, bytes]],
    removed: Sequence[str] = (),
) -> Iterator[Step]:
    """Give what was read, and note the versions once it has been applied."""
    yield Arrived(type_url, [resource for resource, _ in read.values()], removed)
    for number, (name, (_, mark)) in enumerate(read.items(), 1):
        kind.held.put(name, mark)
        if number % NAMES_PER_STEP == 0:
            yield Paused()
    for number, name in enumerate(removed, 1):
        kind.held.remove(name)
        if number % NAMES_PER_STEP == 0:
            yield Paused()

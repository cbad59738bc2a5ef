"""Delta xDS, the server's end of one stream, as istiod behaves (state-and-xds.md 5). No I/O.

How it works: the first request for a type says what the client has; the answer is what differs.
Later requests acknowledge, refuse, or (on demand) ask by name. `push` sends what changed since.
A changed service takes all its workloads along, as with istiod, so that clients meet repeats.

Unlike istiod it spreads many addresses over several responses, so that a client need not hold all
of a mesh twice. Policies stay together, as some without the others may allow more than was meant.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from itertools import islice

from google.protobuf.message import DecodeError

from ztunnel.errors import PeerError
from ztunnel.model.service import Service
from ztunnel.model.workload import Workload
from ztunnel.wire.delta import WILDCARD
from ztunnel.wire.encode_resources import aliases_of, encode, type_of
from ztunnel.wire.pb import xds_pb2 as pb
from ztunnel.wire.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE, Resource, key_of

RESOURCES_PER_RESPONSE = 500


@dataclass(frozen=True, slots=True)
class Entry:
    """One resource as it is sent."""

    name: str
    resource: Resource
    data: bytes = field(repr=False)
    digest: str

    @classmethod
    def of(cls, resource: Resource) -> Entry:
        """Encode a resource; its version is a digest, equal on every replica."""
        data = encode(resource)
        return cls(key_of(resource), resource, data, blake2b(data, digest_size=8).hexdigest())


class Snapshot:
    """Everything there is to send at one moment."""

    def __init__(self, resources: Iterable[Resource] = ()) -> None:
        self.entries: dict[str, dict[str, Entry]] = {ADDRESS_TYPE: {}, AUTHORIZATION_TYPE: {}}
        for resource in resources:
            entry = Entry.of(resource)
            self.entries[type_of(resource)][entry.name] = entry

    def with_one(self, resource: Resource) -> Snapshot:
        """Return a copy in which this resource is new or replaced."""
        copy = Snapshot()
        copy.entries = {type_url: dict(entries) for type_url, entries in self.entries.items()}
        entry = Entry.of(resource)
        copy.entries[type_of(resource)][entry.name] = entry
        return copy

    def of(self, type_url: str) -> Mapping[str, Entry]:
        """Return the entries of a type by name."""
        return self.entries[type_url]

    def members(self, service_name: str) -> list[str]:
        """Name the workloads of a service."""
        return self._members.get(service_name, [])

    def on_node(self, node: str) -> list[str]:
        """Name the workloads of a node."""
        return self._by_node.get(node, [])

    def find(self, wanted: str) -> str | None:
        """Name the address that is known as `wanted`: by name, or by another name."""
        return wanted if wanted in self.of(ADDRESS_TYPE) else self._by_alias.get(wanted)

    def _workloads(self) -> Iterator[tuple[str, Workload]]:
        for name, entry in self.of(ADDRESS_TYPE).items():
            if isinstance(entry.resource, Workload):
                yield name, entry.resource

    @cached_property
    def _members(self) -> dict[str, list[str]]:
        members: dict[str, list[str]] = {}
        for name, workload in self._workloads():
            for key in workload.services:
                members.setdefault(key, []).append(name)
        return members

    @cached_property
    def _by_node(self) -> dict[str, list[str]]:
        by_node: dict[str, list[str]] = {}
        for name, workload in self._workloads():
            by_node.setdefault(workload.node, []).append(name)
        return by_node

    @cached_property
    def _by_alias(self) -> dict[str, str]:
        return {
            alias: name
            for name, entry in self.of(ADDRESS_TYPE).items()
            for alias in aliases_of(entry.resource)
        }


@dataclass(slots=True)
class _Watch:
    """What one client was sent of one type: name to digest."""

    wildcard: bool
    sent: dict[str, str]
    asked: set[str] = field(default_factory=set)


class ServerStream:
    """One client's stream. `refusals` has the texts of its NACKs, `acks` counts the rest."""

    def __init__(self) -> None:
        self.node_id = ""
        self.acks = 0
        self.refusals: list[str] = []
        self._node_name = ""
        self._watches: dict[str, _Watch] = {}
        self._nonces = 0

    def receive(self, data: bytes, snapshot: Snapshot) -> list[bytes]:
        """Digest a request and return the responses it calls for.

        Raises:
            PeerError: it is no request, or the first one does not say who asks.
        """
        try:
            request = pb.DeltaDiscoveryRequest.FromString(data)
        except DecodeError as exc:
            raise PeerError(f"not a request: {exc}") from exc
        if not self.node_id:
            self.node_id = request.node.id
            self._node_name = request.node.metadata.fields["NODE_NAME"].string_value
        if not self.node_id:
            raise PeerError("the first request has no node id")
        if request.type_url not in snapshot.entries:
            return []
        watch = self._watches.get(request.type_url)
        if watch is None:
            return self._begin(request, snapshot)
        if request.response_nonce:
            if request.HasField("error_detail"):
                self.refusals.append(request.error_detail.message)
            else:
                self.acks += 1
            return []
        return self._change(watch, request, snapshot)

    def push(self, snapshot: Snapshot, *, only: str | None = None) -> list[bytes]:
        """Return what changed since the last push: addresses, then policies.

        With `only` no other name is looked at, so that a small change in a large mesh is cheap.
        """
        responses: list[bytes] = []
        for type_url in snapshot.entries:
            watch = self._watches.get(type_url)
            if watch is None:
                continue
            entries = snapshot.of(type_url)
            names: Iterable[str] = entries.keys()
            if only is not None:
                names = [only] if only in entries else []
            elif not watch.wildcard:
                names = self._known(type_url, watch, snapshot)
            changed = [name for name in names if watch.sent.get(name) != entries[name].digest]
            with_members = dict.fromkeys(changed)
            for name in changed:
                if isinstance(entries[name].resource, Service):
                    with_members.update(dict.fromkeys(snapshot.members(name)))
            gone = [n for n in watch.sent if n not in entries] if only is None else []
            if with_members or gone:
                responses += self._respond(type_url, watch, with_members, gone, snapshot)
        return responses

    def _begin(self, request: pb.DeltaDiscoveryRequest, snapshot: Snapshot) -> list[bytes]:
        names = set(request.resource_names_subscribe) - set(request.resource_names_unsubscribe)
        wildcard = not request.resource_names_subscribe or WILDCARD in names
        has = dict(request.initial_resource_versions)
        # On demand, a name without a version is one that is still waited for.
        sent = {name: digest for name, digest in has.items() if wildcard or digest}
        watch = self._watches[request.type_url] = _Watch(wildcard, sent)
        entries = snapshot.of(request.type_url)
        watch.asked = names | (set() if wildcard else {n for n in has if not has[n]})
        wanted = entries.keys() if wildcard else self._known(request.type_url, watch, snapshot)
        # Policies have no version on the wire, so they are always sent again.
        changed = [name for name in wanted if has.get(name) != entries[name].digest]
        gone = [name for name in has if name not in entries and snapshot.find(name) is None]
        return self._respond(request.type_url, watch, changed, gone, snapshot)

    def _change(
        self, watch: _Watch, request: pb.DeltaDiscoveryRequest, snapshot: Snapshot
    ) -> list[bytes]:
        watch.asked.difference_update(request.resource_names_unsubscribe)
        new = list(request.resource_names_subscribe)
        if not new:
            return []
        watch.asked.update(new)
        found = {wanted: snapshot.find(wanted) for wanted in new}
        names = dict.fromkeys(name for name in found.values() if name is not None)
        for name in list(names):
            names.update(dict.fromkeys(snapshot.members(name)))
        near = self._near(request.type_url, snapshot)
        names.update(dict.fromkeys(name for name in near if name not in watch.sent))
        gone = [wanted for wanted, name in found.items() if name is None]
        return self._respond(request.type_url, watch, names, gone, snapshot)

    def _known(self, type_url: str, watch: _Watch, snapshot: Snapshot) -> list[str]:
        """Name what an on-demand client has, asked for, or is near to, as far as it exists."""
        found = (snapshot.find(name) for name in (*watch.sent, *watch.asked))
        names = [name for name in found if name is not None]
        return list(dict.fromkeys([*names, *self._near(type_url, snapshot)]))

    def _near(self, type_url: str, snapshot: Snapshot) -> list[str]:
        """Name the workloads of the client's node.

        On demand they come unasked, with the first answer and as they appear: the reference's
        proxy waits for its own workloads and never asks for them.
        """
        wanted = type_url == ADDRESS_TYPE and self._node_name
        return snapshot.on_node(self._node_name) if wanted else []

    def _respond(
        self,
        type_url: str,
        watch: _Watch,
        names: Iterable[str],
        gone: Iterable[str],
        snapshot: Snapshot,
    ) -> list[bytes]:
        """Return at least one response; what is gone is in the first."""
        left, removed = iter(names), list(gone)
        size = RESOURCES_PER_RESPONSE if type_url == ADDRESS_TYPE else None
        responses: list[bytes] = []
        while (some := list(islice(left, size))) or not responses:
            responses.append(self._response(type_url, watch, some, removed, snapshot))
            removed = []
        return responses

    def _response(
        self,
        type_url: str,
        watch: _Watch,
        names: Iterable[str],
        removed: Iterable[str],
        snapshot: Snapshot,
    ) -> bytes:
        self._nonces += 1
        response = pb.DeltaDiscoveryResponse(type_url=type_url, nonce=f"nonce-{self._nonces}")
        response.removed_resources.extend(removed)
        entries = snapshot.of(type_url)
        for name in names:
            entry = entries[name]
            resource = response.resources.add(name=name)
            if type_url == ADDRESS_TYPE:
                resource.version = entry.digest
            if not watch.wildcard:
                resource.aliases.extend(aliases_of(entry.resource))
            resource.resource.type_url = type_url
            resource.resource.value = entry.data
            watch.sent[name] = entry.digest
        for name in response.removed_resources:
            watch.sent.pop(name, None)
        return response.SerializeToString()

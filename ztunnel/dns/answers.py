"""What to say to a query: an answer of ours, or to ask upstream (dns-and-observability.md 2.3).

A core: it gets the query and whose it is, and returns a plan. It never waits.

Beyond the reference: other types of a mesh name are asked upstream, but "no such name" becomes
"no such record", or resolvers would forget the addresses, too; "no such record" of ours comes with
a SOA record, so that clients may remember it; SRV of services and pods, and reverse names.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ztunnel.decide import names, targets
from ztunnel.decide.names import Found, Viewpoint
from ztunnel.decide.targets import Target
from ztunnel.model.network import IpAddress, Port
from ztunnel.state.store import Store
from ztunnel.wire import dns, dns_records
from ztunnel.wire.dns import Query, Rcode, RecordType, Reply

TTL_SECONDS = 30
WEIGHTS = 100  # of all SRV records of one answer together, as CoreDNS has it
RECORD_BYTES_MIN = 16  # an A record of the name in the question

SUCCESS = "success"
NO_RECORDS = "no records"
UNSUPPORTED = "type not supported by the service"
BAD_VERSION = "unknown EDNS version"

_VERSIONS = {RecordType.A: 4, RecordType.AAAA: 6}


@dataclass(frozen=True, slots=True)
class Local:
    """Answer with `reply`; `endpoints` is how many addresses, hosts or names are in it."""

    reply: Reply
    result: str
    endpoints: int = 0


@dataclass(frozen=True, slots=True)
class Forward:
    """Ask upstream; `otherwise` is what to say if upstream knows no such name.

    None: say what upstream says.
    """

    otherwise: Reply | None = None


Plan = Local | Forward


def plan(query: Query, view: Viewpoint, store: Store) -> Plan:
    """Decide what to do about a query."""
    try:
        return _plan(query, view, store)
    except ValueError:
        # The control plane sent a name that DNS cannot carry.
        return Forward()


def shuffled(reply: Reply, rng: random.Random, limit: int) -> Reply:
    """Give the answers of a remembered reply another order, for a message of `limit` bytes.

    Of very many there are as many left as would not fit: so that there is more is seen.
    """
    count = len(reply.answers)
    if count < 2:  # noqa: PLR2004 - there is only one order
        return reply
    return Reply(
        rcode=reply.rcode,
        is_authoritative=reply.is_authoritative,
        leading=reply.leading,
        answers=rng.sample(reply.answers, min(count, limit // RECORD_BYTES_MIN + 1)),
        authority=reply.authority,
        additional=reply.additional,
    )


def _plan(query: Query, view: Viewpoint, store: Store) -> Plan:
    if query.rclass != dns.CLASS_IN:
        # The reference does not look at the class; ours is the only one that mesh names are in.
        return Forward()
    if query.rtype == RecordType.PTR and (ip := names.reversed_address(query.name)) is not None:
        decided = _reverse(query, ip, view, store)
    elif query.rtype == RecordType.SRV and (asked := targets.numbered(query.name)) is not None:
        decided = _at_port(query, *asked, view, store)
    else:
        found = names.find(query.name, view, store.services)
        if found is None:
            return Forward()
        decided = _about(query, found, view, store)
    if isinstance(decided, Local) and query.opt is not None and query.opt.version:
        # RFC 6891 s6.1.3; the reference pretends to speak any version.
        return Local(Reply(rcode=Rcode.BADVERS, is_authoritative=False), BAD_VERSION)
    return decided


def _about(query: Query, found: Found, view: Viewpoint, store: Store) -> Plan:
    version = _VERSIONS.get(query.rtype)  # type: ignore[call-overload]  # any number may be asked
    if version is not None:
        if not names.allows(found, version, view):
            return _empty(query, view, UNSUPPORTED)
        return _addresses(query, found, names.addresses(found, version, view, store.services), view)
    if query.rtype == RecordType.SRV:
        listed = targets.targets(found, view, store.services)
        if listed is not None:
            ours = _services(query, listed, view)
            # Its ports have weights and names that only the cluster's resolver may know.
            return Forward(otherwise=ours.reply) if found.service.vips else ours
    return Forward(otherwise=_empty(query, view, NO_RECORDS).reply)


def _at_port(query: Query, port: Port, name: str, view: Viewpoint, store: Store) -> Plan:
    """Answer for `_8080._tcp.name`; if that is no port that we know, it is not ours to deny."""
    found = names.find(name, view, store.services)
    listed = None if found is None else targets.targets(found, view, store.services, port)
    return _services(query, listed, view) if listed else Forward()


def _services(query: Query, listed: Sequence[Target], view: Viewpoint) -> Local:
    """Make SRV records that share what comes in, and give the addresses of their hosts, too."""
    owner = dns_records.owner_of(query, query.name)
    weight = max(1, WEIGHTS // max(1, len(listed)))
    hosts = {target.host: dns_records.encode_host(target.host) for target in listed}
    records = [
        dns_records.service_record(owner, hosts[target.host], target.port, TTL_SECONDS, weight)
        for target in listed
    ]
    addresses = {target.host: target.addresses for target in listed}
    additional = tuple(
        dns_records.address_record(encoded, ip, TTL_SECONDS)
        for host, encoded in hosts.items()
        for ip in addresses[host]
    )
    return _records(query, (), records, view, additional)


def _addresses(
    query: Query, found: Found, addresses: Sequence[IpAddress], view: Viewpoint
) -> Local:
    owner = dns_records.owner_of(query, query.name)
    leading: tuple[bytes, ...] = ()
    if addresses and found.owner != query.name:
        record, owner = dns_records.cname_record(query, owner, found.owner, TTL_SECONDS)
        leading = (record,)
    records = dns_records.address_records(owner, addresses, TTL_SECONDS)
    return _records(query, leading, records, view)


def _reverse(query: Query, ip: IpAddress, view: Viewpoint, store: Store) -> Plan:
    host = names.name_of(ip, view, store.services, store.workloads)
    if host is None:
        return Forward()
    record = dns_records.pointer_record(dns_records.owner_of(query, query.name), host, TTL_SECONDS)
    return _records(query, (), [record], view)


def _records(
    query: Query, leading: tuple[bytes, ...], records: Sequence[bytes], view: Viewpoint,
    additional: tuple[bytes, ...] = (),
) -> Local:  # fmt: skip
    if not records:
        return _empty(query, view, NO_RECORDS)
    reply = Reply(leading=leading, answers=records, additional=additional)
    return Local(reply, SUCCESS, len(records))


def _empty(query: Query, view: Viewpoint, result: str) -> Local:
    """Say "no such record": never "no such name", for the name may have other records."""
    domain = view.cluster_domain
    is_inside = query.name == domain or query.name.endswith(f".{domain}")
    zone = dns_records.zone_record(domain if is_inside else query.name, TTL_SECONDS)
    return Local(Reply(authority=(zone,)), result)

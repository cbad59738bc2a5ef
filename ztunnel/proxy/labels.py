"""Naming both ends of a connection, once, for its log line and its metrics.

Sources: dns-and-observability.md 7.2 ("how labels are filled") and 8.4, dataplane.md 3.8.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ztunnel.decide.route import Hop, HopProtocol
from ztunnel.telemetry.access_log import Ends
from ztunnel.telemetry.traffic import (
    NO_SERVICE,
    NOBODY,
    Labels,
    Party,
    Reporter,
    ServiceName,
)

if TYPE_CHECKING:
    from ztunnel.decide.admit import Admission
    from ztunnel.model.flow import Flow
    from ztunnel.model.identity import Identity
    from ztunnel.model.network import Endpoint, HostPort
    from ztunnel.model.service import Service
    from ztunnel.model.workload import Workload
    from ztunnel.proxy.context import NodeContext
    from ztunnel.proxy.requests import TunnelRequest
    from ztunnel.wire.headers import Baggage


class Description(NamedTuple):
    """Both ends of a connection; connections of one way share one."""

    ends: Ends
    labels: Labels


def describe_hop(identity: Identity, workload: Workload, hop: Hop) -> Description:
    """Describe an outbound connection: from our workload to the next hop."""
    tunnelled = hop.protocol is not HopProtocol.TCP
    there, service = hop.workload, hop.service
    ends = Ends(destination=hop.peer, hbone_target=hop.authority)
    _name_source(ends, workload, identity if tunnelled else None)
    if there is not None:
        _name_destination(ends, there, there.identity if tunnelled else None)
    if service is not None:
        ends.destination_service = service.hostname
    labels = Labels(
        Reporter.SOURCE,
        Party.of_workload(workload, identity if tunnelled else None),
        NOBODY if there is None else Party.of_workload(there, there.identity),
        _service_name(service),
        mutual_tls=tunnelled,
    )
    return Description(ends, labels)


def describe_far_side(
    known: Description, baggage: Baggage, identity: Identity | None
) -> Description:
    """Replace a double tunnel's destination by what its far end says of itself."""
    ends = replace(
        known.ends,
        destination_workload=baggage.workload_name,
        destination_namespace=baggage.namespace,
        destination_identity=identity,
        destination_cluster=baggage.cluster_id,
    )
    return Description(ends, known.labels._replace(destination=_party(baggage, identity)))


def describe_admission(
    node: NodeContext,
    admission: Admission,
    *,
    workload: Workload,
    identity: Identity,
    flow: Flow,
    local: Endpoint,
    request: TunnelRequest | None = None,
    target: Endpoint | HostPort | None = None,
) -> Description:
    """Describe an inbound connection that came to `local`; for plaintext there is no `request`.

    `target` is the request's authority. The caller is looked up by its address, unless the request
    came through a gateway; failing that, what it says of itself is shown. Its principal is always
    the one TLS proved.
    """
    ends = Ends(destination=local, hbone_target=target)
    caller: Workload | None = None
    network = node.config.network
    if request is None or not request.is_from_gateway(network):
        caller = node.store.workloads.by_address(network, flow.source_endpoint.ip)
    if caller is not None:
        source = Party.of_workload(caller, flow.source)
        _name_source(ends, caller, flow.source)
    elif request is not None and node.config.baggage_enabled:
        baggage = request.baggage()
        source = _party(baggage, flow.source)
        ends.source_workload = baggage.workload_name
        ends.source_namespace = baggage.namespace
        ends.source_identity = flow.source
        ends.source_cluster = baggage.cluster_id
    else:
        source = NOBODY._replace(principal=str(flow.source or ""))
        ends.source_identity = flow.source
    _name_destination(ends, workload, identity if flow.source is not None else None)
    if admission.service is not None:
        ends.destination_service = admission.service.hostname
    labels = Labels(
        Reporter.DESTINATION,
        source,
        Party.of_workload(workload, identity),
        _service_name(admission.service),
        mutual_tls=flow.source is not None,
    )
    return Description(ends, labels)


def _name_source(ends: Ends, workload: Workload, identity: Identity | None) -> None:
    ends.source_workload = workload.name or workload.canonical_name
    ends.source_namespace = workload.namespace
    ends.source_identity = identity
    ends.source_cluster = workload.cluster_id


def _name_destination(ends: Ends, workload: Workload, identity: Identity | None) -> None:
    ends.destination_workload = workload.name or workload.canonical_name
    ends.destination_namespace = workload.namespace
    ends.destination_identity = identity
    ends.destination_cluster = workload.cluster_id


def _service_name(service: Service | None) -> ServiceName:
    if service is None:
        return NO_SERVICE
    return ServiceName(service.hostname, service.namespace, service.name)


def _party(baggage: Baggage, identity: Identity | None) -> Party:
    return Party(
        workload=baggage.workload_name or "",
        canonical_service=baggage.canonical_name or "",
        canonical_revision=baggage.canonical_revision or "",
        namespace=baggage.namespace or "",
        principal=str(identity or ""),
        app=baggage.workload_name or "",
        cluster=baggage.cluster_id or "",
        region=baggage.region or "",
        zone=baggage.zone or "",
    )

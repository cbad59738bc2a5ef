"""Naming both ends of a connection, once, for its log line and its metrics.

Sources: dns-and-observability.md 7.2 ("how labels are filled") and 8.4, dataplane.md 3.8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ztunnel.decide.route import Hop, HopProtocol
from ztunnel.telemetry.traffic import (
    NO_SERVICE,
    NOBODY,
    Labels,
    Party,
    Reporter,
    ServiceName,
)

if TYPE_CHECKING:
    from ztunnel.model.flow import Flow
    from ztunnel.model.identity import Identity
    from ztunnel.model.service import Service
    from ztunnel.model.workload import Workload
    from ztunnel.proxy.context import NodeContext
    from ztunnel.proxy.requests import TunnelRequest
    from ztunnel.telemetry.access_log import Record
    from ztunnel.wire.headers import Baggage


def name_hop(record: Record, identity: Identity, workload: Workload, hop: Hop) -> None:
    """Name both ends of an outbound connection for its log line."""
    tunnelled = hop.protocol is not HopProtocol.TCP
    _name_source(record, workload, identity if tunnelled else None)
    record.destination = hop.peer
    record.hbone_target = hop.authority
    if hop.workload is not None:
        _name_destination(record, hop.workload, hop.workload.identity if tunnelled else None)
    if hop.service is not None:
        record.destination_service = hop.service.hostname


def label_hop(identity: Identity, workload: Workload, hop: Hop) -> Labels:
    """Label an outbound connection: from our workload to the next hop."""
    tunnelled = hop.protocol is not HopProtocol.TCP
    destination = NOBODY
    if hop.workload is not None:
        destination = Party.of_workload(hop.workload, hop.workload.identity)
    return Labels(
        Reporter.SOURCE,
        Party.of_workload(workload, identity if tunnelled else None),
        destination,
        _service_name(hop.service),
        mutual_tls=tunnelled,
    )


def describe_far_side(
    record: Record, labels: Labels, baggage: Baggage, identity: Identity | None
) -> Labels:
    """Replace a double tunnel's destination by what its far end says of itself."""
    record.destination_workload = baggage.workload_name
    record.destination_namespace = baggage.namespace
    record.destination_identity = identity
    record.destination_cluster = baggage.cluster_id
    return labels._replace(destination=_party(baggage, identity))


def describe_admission(
    record: Record,
    node: NodeContext,
    *,
    workload: Workload,
    identity: Identity,
    flow: Flow,
    service: Service | None,
    request: TunnelRequest | None,
) -> Labels:
    """Describe an inbound connection; `request` is None for plaintext.

    The caller is looked up by its address, unless the request came through a gateway; failing that,
    what it says of itself is shown. Its principal is always the one TLS proved.
    """
    caller: Workload | None = None
    network = node.config.network
    if request is None or not request.is_from_gateway(network):
        caller = node.store.workloads.by_address(network, flow.source_endpoint.ip)
    if caller is not None:
        source = Party.of_workload(caller, flow.source)
        _name_source(record, caller, flow.source)
    elif request is not None and node.config.baggage_enabled:
        source = _party_of_baggage(record, request.baggage(), flow.source)
    else:
        source = NOBODY._replace(principal=str(flow.source or ""))
        record.source_identity = flow.source
    _name_destination(record, workload, identity if flow.source is not None else None)
    return Labels(
        Reporter.DESTINATION,
        source,
        Party.of_workload(workload, identity),
        _name_service(record, service),
        mutual_tls=flow.source is not None,
    )


def _name_source(record: Record, workload: Workload, identity: Identity | None) -> None:
    record.source_workload = workload.name or workload.canonical_name
    record.source_namespace = workload.namespace
    record.source_identity = identity
    record.source_cluster = workload.cluster_id


def _name_destination(record: Record, workload: Workload, identity: Identity | None) -> None:
    record.destination_workload = workload.name or workload.canonical_name
    record.destination_namespace = workload.namespace
    record.destination_identity = identity
    record.destination_cluster = workload.cluster_id


def _name_service(record: Record, service: Service | None) -> ServiceName:
    if service is None:
        return NO_SERVICE
    record.destination_service = service.hostname
    return _service_name(service)


def _service_name(service: Service | None) -> ServiceName:
    if service is None:
        return NO_SERVICE
    return ServiceName(service.hostname, service.namespace, service.name)


def _party_of_baggage(record: Record, baggage: Baggage, identity: Identity | None) -> Party:
    record.source_workload = baggage.workload_name
    record.source_namespace = baggage.namespace
    record.source_identity = identity
    record.source_cluster = baggage.cluster_id
    return _party(baggage, identity)


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

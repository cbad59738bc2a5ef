"""Manifests in Kubernetes terms to resources, as istiod makes them (state-and-xds.md 5, 7 and 15).

Understood: Namespace, Node, Pod, Service, Gateway (waypoints), AuthorizationPolicy and
PeerAuthentication, as many documents as one likes in one file, written as for `kubectl apply`. A
pod needs its `status.podIP`, because nobody schedules here. What else a file holds is passed over.

A pod is in the mesh if its namespace or the pod itself has the label
`istio.io/dataplane-mode: ambient`; on a real cluster the node agent marks captured pods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import yaml

from ztunnel.devmesh.kubernetes_policies import (
    ROOT_NAMESPACE,
    PeerAuthentication,
    authorization_policy,
    mapping,
    match_labels,
    mutual_tls_policies,
    selects,
    sequence,
    static_strict,
)
from ztunnel.devmesh.kubernetes_services import (
    GATEWAY_NAME_LABEL,
    Waypoints,
    read_service,
    selector_of,
    served_ports,
    waypoint_service,
)
from ztunnel.errors import ResourceError
from ztunnel.model.identity import Namespace, ServiceAccount, TrustDomain
from ztunnel.model.network import Network, Port, parse_ip
from ztunnel.model.policy import Policy, PolicyScope
from ztunnel.model.service import Service
from ztunnel.model.workload import (
    Health,
    Locality,
    NetworkMode,
    PolicyKey,
    ServiceKey,
    TunnelProtocol,
    Workload,
    WorkloadUid,
)
from ztunnel.wire.resources import Resource

DATAPLANE_MODE = "istio.io/dataplane-mode"
REDIRECTION = "ambient.istio.io/redirection"
NETWORK_LABEL = "topology.istio.io/network"
REGION_LABEL = "topology.kubernetes.io/region"
ZONE_LABEL = "topology.kubernetes.io/zone"
SUBZONE_LABEL = "topology.istio.io/subzone"
CANONICAL_NAMES = ("service.istio.io/canonical-name", "app.kubernetes.io/name", "app")
CANONICAL_REVISIONS = (
    "service.istio.io/canonical-revision",
    "app.kubernetes.io/version",
    "version",
)

T = TypeVar("T")

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class Manifest:
    """One document."""

    kind: str
    name: str
    namespace: str
    labels: dict[str, str]
    annotations: dict[str, str]
    spec: Mapping[str, object]
    status: Mapping[str, object]
    document: Mapping[str, object] = field(repr=False)

    @classmethod
    def read(cls, value: object) -> Manifest:
        """Read what all kinds have in common.

        Raises:
            ResourceError: it is malformed.
        """
        document = mapping(value, "document")
        metadata = mapping(document.get("metadata"), "metadata")
        name = str(metadata.get("name", ""))
        if not name or "kind" not in document:
            raise ResourceError("a document needs a `kind` and a `metadata.name`")
        return cls(
            kind=str(document["kind"]),
            name=name,
            namespace=str(metadata.get("namespace", "default")),
            labels=_texts(metadata.get("labels"), "metadata.labels"),
            annotations=_texts(metadata.get("annotations"), "metadata.annotations"),
            spec=mapping(document.get("spec"), "spec"),
            status=mapping(document.get("status"), "status"),
            document=document,
        )


def parse_manifests(text: str, *, cluster_domain: str = "cluster.local") -> list[Resource]:
    """Convert a file of manifests to what a control plane would send.

    Raises:
        ResourceError: some of it is malformed; the text names the object.
    """
    try:
        documents = [doc for doc in yaml.load_all(text, Loader=_LOADER) if doc is not None]
    except yaml.YAMLError as exc:
        raise ResourceError(f"not YAML: {exc}") from exc
    manifests = [Manifest.read(document) for document in documents]
    return _Cluster(manifests, cluster_domain).resources()


class _Cluster:
    """All objects of a cluster, by kind."""

    def __init__(self, manifests: list[Manifest], domain: str) -> None:
        self._by_kind: dict[str, list[Manifest]] = {}
        for manifest in manifests:
            self._by_kind.setdefault(manifest.kind, []).append(manifest)
        self._domain = domain
        self._namespaces = {m.name: m.labels for m in self._of("Namespace")}
        self._nodes = {m.name: m.labels for m in self._of("Node")}
        self._waypoints = Waypoints(
            {(m.namespace, m.name): m.labels for m in self._gateways()}, domain, self._namespaces
        )
        self._peers = [
            _about(m, partial(PeerAuthentication.read, m.name, m.namespace, m.spec))
            for m in self._of("PeerAuthentication")
        ]
        self._made: list[tuple[Manifest | None, Service]] = []
        self._selectors: list[tuple[PolicyKey, str, dict[str, str]]] = []

    def resources(self) -> list[Resource]:
        """Convert everything."""
        policies = {policy.key: policy for policy in self._authorization_policies()}
        self._made = list(self._services())
        workloads: list[Workload] = []
        for pod in self._of("Pod"):
            workload = _about(pod, partial(self._workload, pod, policies))
            if workload is not None:
                workloads.append(workload)
        if any(peer.mode == "STRICT" for peer in self._peers):
            policies[static_strict().key] = static_strict()
        return [*workloads, *(service for _, service in self._made), *policies.values()]

    def _of(self, kind: str) -> list[Manifest]:
        return self._by_kind.get(kind, [])

    def _gateways(self) -> Iterator[Manifest]:
        for gateway in self._of("Gateway"):
            if gateway.spec.get("gatewayClassName") == "istio-waypoint":
                yield gateway

    def _authorization_policies(self) -> Iterator[Policy]:
        for manifest in self._of("AuthorizationPolicy"):
            read = partial(
                authorization_policy, manifest.name, manifest.namespace, manifest.document
            )
            policy = _about(manifest, read)
            if policy is None:
                continue
            if policy.scope is PolicyScope.WORKLOAD_SELECTOR:
                labels = match_labels(manifest.spec) or {}
                self._selectors.append((policy.key, policy.namespace, labels))
            yield policy

    def _services(self) -> Iterator[tuple[Manifest | None, Service]]:
        named: set[tuple[str, str]] = set()
        for manifest in self._of("Service"):
            if manifest.spec.get("type") == "ExternalName":
                continue
            named.add((manifest.namespace, manifest.name))
            waypoint = self._waypoints.of_service(manifest.namespace, manifest.labels)
            read = partial(
                read_service, manifest.name, manifest.namespace, manifest.spec, domain=self._domain
            )
            yield manifest, _about(manifest, partial(read, waypoint=waypoint))
        for gateway in self._gateways():
            if (gateway.namespace, gateway.name) not in named:
                yield None, waypoint_service(gateway.name, gateway.namespace, self._domain)

    def _workload(self, pod: Manifest, policies: dict[PolicyKey, Policy]) -> Workload | None:
        addresses = [mapping(item, "podIPs").get("ip") for item in _list(pod.status, "podIPs")]
        addresses = addresses or [pod.status.get("podIP")]
        ips = tuple(parse_ip(str(ip)) for ip in addresses if ip)
        if not ips or pod.status.get("phase") in {"Succeeded", "Failed"}:
            return None
        keys, made = mutual_tls_policies(pod.namespace, pod.labels, self._peers)
        policies.update({policy.key: policy for policy in made})
        on_host = pod.spec.get("hostNetwork") is True
        in_mesh = self._is_captured(pod) and not on_host
        node = str(pod.spec.get("nodeName", ""))
        owner = _owner(pod)
        return Workload(
            uid=WorkloadUid(f"Kubernetes//Pod/{pod.namespace}/{pod.name}"),
            name=pod.name,
            namespace=Namespace(pod.namespace),
            trust_domain=TrustDomain("cluster.local"),
            service_account=ServiceAccount(str(pod.spec.get("serviceAccountName", "default"))),
            ips=ips,
            network=Network(pod.labels.get(NETWORK_LABEL, "")),
            protocol=TunnelProtocol.HBONE if in_mesh else TunnelProtocol.NONE,
            network_mode=NetworkMode.HOST_NETWORK if on_host else NetworkMode.STANDARD,
            native_tunnel=GATEWAY_NAME_LABEL in pod.labels,
            waypoint=self._waypoints.of_workload(pod.namespace, pod.labels),
            workload_name=owner,
            workload_type="pod",
            canonical_name=_first(pod.labels, CANONICAL_NAMES, owner),
            canonical_revision=_first(pod.labels, CANONICAL_REVISIONS, "latest"),
            node=node,
            cluster_id="Kubernetes",
            locality=_locality(self._nodes.get(node, {})),
            health=Health.HEALTHY if _is_ready(pod) else Health.UNHEALTHY,
            policies=(*self._selecting(pod), *keys),
            services=self._served(pod),
        )

    def _is_captured(self, pod: Manifest) -> bool:
        # A waypoint is a tunnel's end itself.
        if GATEWAY_NAME_LABEL in pod.labels or pod.annotations.get(REDIRECTION) == "enabled":
            return True
        of_namespace = self._namespaces.get(pod.namespace, {}).get(DATAPLANE_MODE)
        return pod.labels.get(DATAPLANE_MODE, of_namespace) == "ambient"

    def _selecting(self, pod: Manifest) -> list[PolicyKey]:
        return [
            key
            for key, namespace, labels in self._selectors
            if namespace in {pod.namespace, ROOT_NAMESPACE} and selects(labels, pod.labels)
        ]

    def _served(self, pod: Manifest) -> dict[ServiceKey, dict[Port, Port]]:
        served: dict[ServiceKey, dict[Port, Port]] = {}
        for manifest, service in self._made:
            if service.namespace != pod.namespace:
                continue
            if manifest is None:
                if pod.labels.get(GATEWAY_NAME_LABEL) == service.name:
                    served[service.key] = dict(service.ports)
            elif (wanted := selector_of(manifest.spec)) and selects(wanted, pod.labels):
                served[service.key] = served_ports(manifest.spec, pod.spec)
        return served


def _about(manifest: Manifest, read: Callable[[], T]) -> T:
    """Read one object; what is wrong with it is told with its name."""
    try:
        return read()
    except (ResourceError, ValueError) as exc:
        where = f"{manifest.kind} {manifest.namespace}/{manifest.name}"
        raise ResourceError(f"{where}: {exc}") from exc


def _texts(value: object, place: str) -> dict[str, str]:
    return {key: str(text) for key, text in mapping(value, place).items()}


def _list(owner: Mapping[str, object], name: str) -> list[object]:
    return list(sequence(owner.get(name), name))


def _first(labels: Mapping[str, str], names: tuple[str, ...], default: str) -> str:
    return next((labels[name] for name in names if name in labels), default)


def _locality(labels: Mapping[str, str]) -> Locality:
    region, zone, subzone = (labels.get(n, "") for n in (REGION_LABEL, ZONE_LABEL, SUBZONE_LABEL))
    return Locality(region, zone, subzone)


def _is_ready(pod: Manifest) -> bool:
    """Tell whether a pod wants traffic; one that says nothing about itself does."""
    if "deletionTimestamp" in mapping(pod.document.get("metadata"), "metadata"):
        return False
    for item in _list(pod.status, "conditions"):
        condition = mapping(item, "conditions")
        if condition.get("type") == "Ready":
            return str(condition.get("status")) == "True"
    return True


def _owner(pod: Manifest) -> str:
    """Name what a pod belongs to: the Deployment above its ReplicaSet, or else its owner."""
    for item in _list(mapping(pod.document.get("metadata"), "metadata"), "ownerReferences"):
        owner = mapping(item, "ownerReferences")
        name = str(owner.get("name", ""))
        return name.rpartition("-")[0] if owner.get("kind") == "ReplicaSet" else name
    return pod.name

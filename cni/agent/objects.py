"""Pods and namespaces as the Kubernetes API tells about them, cut to what we need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

import msgspec

from cni.agent.errors import KubeError
from ztunnel.model.identity import Namespace, ServiceAccount
from ztunnel.model.network import IpAddress, parse_ip
from ztunnel.model.workload import PodUid

NamespaceUid = NewType("NamespaceUid", str)

STATUS_ANNOTATION = "ambient.istio.io/redirection"
_TERMINAL = ("Succeeded", "Failed")


class Redirection(StrEnum):
    """What the status annotation of a pod may say (cni.md 3.3)."""

    ENABLED = "enabled"  # peers may use the tunnel
    PENDING = "pending"  # redirected, but no proxy serves it


@dataclass(frozen=True, slots=True, kw_only=True)
class KubePod:
    """One pod; `ips` is empty until the kubelet has reported them."""

    uid: PodUid
    name: str
    namespace: Namespace
    service_account: ServiceAccount
    version: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    host_network: bool = False
    is_over: bool = False  # it has run to its end and will not start again
    ips: tuple[IpAddress, ...] = ()
    host_ips: tuple[IpAddress, ...] = ()

    @property
    def status(self) -> str | None:
        """What the status annotation says; None if there is none."""
        return self.annotations.get(STATUS_ANNOTATION)

    @property
    def full_name(self) -> str:
        """Namespace and name, for people."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class KubeNamespace:
    """One namespace."""

    uid: NamespaceUid
    name: Namespace
    version: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


class _Metadata(msgspec.Struct, rename="camel"):
    name: str
    uid: str
    namespace: str = ""
    resource_version: str = ""
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class _Ip(msgspec.Struct):
    ip: str = ""


class _Spec(msgspec.Struct, rename="camel"):
    service_account_name: str = ""
    host_network: bool = False


class _Status(msgspec.Struct, rename={"pod_ip": "podIP", "pod_ips": "podIPs",
                                      "host_ip": "hostIP", "host_ips": "hostIPs"}):  # fmt: skip
    phase: str = ""
    pod_ip: str = ""
    pod_ips: list[_Ip] | None = None
    host_ip: str = ""
    host_ips: list[_Ip] | None = None


class _Pod(msgspec.Struct):
    metadata: _Metadata
    spec: _Spec = msgspec.field(default_factory=_Spec)
    status: _Status = msgspec.field(default_factory=_Status)


class _Namespace(msgspec.Struct):
    metadata: _Metadata


_pods = msgspec.json.Decoder(_Pod)
_namespaces = msgspec.json.Decoder(_Namespace)


def decode_pod(data: bytes | msgspec.Raw) -> KubePod:
    """Read a pod.

    Raises:
        KubeError: it is none.
    """
    try:
        pod = _pods.decode(data)
        status = pod.status
        ips = _addresses(status.pod_ips, status.pod_ip)
        host_ips = _addresses(status.host_ips, status.host_ip)
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise KubeError(f"not a pod: {exc}") from exc
    metadata = pod.metadata
    return KubePod(
        uid=PodUid(metadata.uid),
        name=metadata.name,
        namespace=Namespace(metadata.namespace),
        service_account=ServiceAccount(pod.spec.service_account_name or "default"),
        version=metadata.resource_version,
        labels=metadata.labels or {},
        annotations=metadata.annotations or {},
        host_network=pod.spec.host_network,
        is_over=status.phase in _TERMINAL,
        ips=ips,
        host_ips=host_ips,
    )


def decode_namespace(data: bytes | msgspec.Raw) -> KubeNamespace:
    """Read a namespace.

    Raises:
        KubeError: it is none.
    """
    try:
        metadata = _namespaces.decode(data).metadata
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise KubeError(f"not a namespace: {exc}") from exc
    return KubeNamespace(
        uid=NamespaceUid(metadata.uid),
        name=Namespace(metadata.name),
        version=metadata.resource_version,
        labels=metadata.labels or {},
    )


def _addresses(several: list[_Ip] | None, one: str) -> tuple[IpAddress, ...]:
    texts = [item.ip for item in several or ()] or [one]
    return tuple(dict.fromkeys(parse_ip(text) for text in texts if text))

"""Questions to `ztunnel.decide.names`, and what is known when they are asked."""

from __future__ import annotations

from typing import Any

from tests.support.builders import a_service, a_store, a_workload
from ztunnel.decide import names
from ztunnel.decide.names import Viewpoint
from ztunnel.model.identity import Namespace
from ztunnel.model.network import Network
from ztunnel.model.service import Service
from ztunnel.model.workload import Workload
from ztunnel.state.store import Store

DOMAIN = "cluster.local"


def a_view(ns: str = "ns1", *, network: str = "", **more: Any) -> Viewpoint:
    return Viewpoint(namespace=Namespace(ns), network=Network(network), **more)


def kube(name: str, ns: str = "ns1") -> str:
    return f"{name}.{ns}.svc.{DOMAIN}"


def a_kube_service(name: str, ns: str = "ns1", *vips: str, **more: Any) -> Service:
    return a_service(kube(name, ns), ns=ns, vips=vips, **more)


def a_pod(name: str, ip: str, *, of: str, ns: str = "ns1", **more: Any) -> Workload:
    return a_workload(name, ns=ns, ips=[ip], services={f"{ns}/{of}": {80: 8080}}, **more)


def found_for(name: str, store: Store, view: Viewpoint | None = None) -> str | None:
    found = names.find(name, view or a_view(), store.services)
    return found.service.hostname if found else None


def addresses_of(
    name: str, store: Store, version: int = 4, view: Viewpoint | None = None
) -> list[str] | None:
    view = view or a_view()
    found = names.find(name, view, store.services)
    if found is None:
        return None
    return [str(ip) for ip in names.addresses(found, version, view, store.services)]


HEADLESS = kube("web")


def a_headless_store(*more: Workload, **service: Any) -> Store:
    return a_store(
        a_service(HEADLESS, ns="ns1", **service),
        a_pod("web-0", "10.1.0.1", of=HEADLESS),
        a_pod("web-1", "10.1.0.2", of=HEADLESS),
        *more,
    )

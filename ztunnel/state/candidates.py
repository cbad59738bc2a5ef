"""Services that share one VIP or one host name, and who gets which (state-and-xds.md 10.1)."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ztunnel.model.identity import Namespace
from ztunnel.model.service import Service, Visibility
from ztunnel.model.workload import ServiceKey


def _best(services: Iterable[Service]) -> Service | None:
    """Return the last canonical one, else the first."""
    first = canonical = None
    for service in services:
        first = first or service
        if service.canonical:
            canonical = service
    return canonical or first


class Candidates:
    """Services found under one key, in the order they were first stored.

    A thousand namespaces may each declare the same host name: the choice for a stranger is
    remembered, and the choice for a namespace looks at that namespace's own services only.
    """

    __slots__ = ("_any", "_by_key", "_by_namespace", "_is_fresh", "_public")

    def __init__(self) -> None:
        self._by_key: dict[ServiceKey, Service] = {}
        self._by_namespace: dict[Namespace, dict[ServiceKey, Service]] = {}
        self._any: Service | None = None
        self._public: Service | None = None
        self._is_fresh = False

    def __len__(self) -> int:
        return len(self._by_key)

    def all(self) -> Collection[Service]:
        """Return all of them, oldest first."""
        return self._by_key.values()

    def put(self, service: Service) -> None:
        """Add a service, or replace it where it stands."""
        self._by_key[service.key] = service
        self._by_namespace.setdefault(service.namespace, {})[service.key] = service
        self._is_fresh = False

    def remove(self, service: Service) -> None:
        """Drop a service that was added."""
        del self._by_key[service.key]
        namesakes = self._by_namespace[service.namespace]
        del namesakes[service.key]
        if not namesakes:
            del self._by_namespace[service.namespace]
        self._is_fresh = False

    def inside(self, namespace: Namespace) -> Service | None:
        """Return the best service of this namespace."""
        return _best(self._by_namespace.get(namespace, {}).values())

    def choose(
        self, client_namespace: Namespace | None, preferred_namespace: Namespace | None = None
    ) -> Service | None:
        """Return the service a client of `client_namespace` means; None when it may see none.

        Own namespace, then canonical, then `preferred_namespace`, then first stored. Without a
        client namespace visibility does not count.
        """
        if client_namespace is not None and (own := self.inside(client_namespace)):
            return own
        if not self._is_fresh:
            self._refresh()
        default = self._any if client_namespace is None else self._public
        if preferred_namespace is None or default is None or default.canonical:
            return default
        preferred = self._by_namespace.get(preferred_namespace, {}).values()
        return _best(_visible(preferred, client_namespace)) or default

    def _refresh(self) -> None:
        self._any = _best(self._by_key.values())
        self._public = _best(s for s in self._by_key.values() if s.visibility is Visibility.PUBLIC)
        self._is_fresh = True


def _visible(services: Iterable[Service], client_namespace: Namespace | None) -> Iterable[Service]:
    if client_namespace is None:
        return services
    return (s for s in services if s.visibility is Visibility.PUBLIC)

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


class _Many:
    """Two or more services that share a key, and who of them is meant."""

    __slots__ = ("any", "by_key", "by_namespace", "is_fresh", "public")

    def __init__(self) -> None:
        self.by_key: dict[ServiceKey, Service] = {}
        self.by_namespace: dict[Namespace, dict[ServiceKey, Service]] = {}
        self.any: Service | None = None
        self.public: Service | None = None
        self.is_fresh = False

    def put(self, service: Service) -> None:
        self.by_key[service.key] = service
        self.by_namespace.setdefault(service.namespace, {})[service.key] = service
        self.is_fresh = False

    def remove(self, service: Service) -> None:
        del self.by_key[service.key]
        namesakes = self.by_namespace[service.namespace]
        del namesakes[service.key]
        if not namesakes:
            del self.by_namespace[service.namespace]
        self.is_fresh = False

    def refresh(self) -> None:
        self.any = _best(self.by_key.values())
        self.public = _best(s for s in self.by_key.values() if s.visibility is Visibility.PUBLIC)
        self.is_fresh = True


class Candidates:
    """Services found under one key, in the order they were first stored.

    A thousand namespaces may each declare the same host name: the choice for a stranger is
    remembered, and the choice for a namespace looks at that namespace's own services only.
    Nearly every key has one service, which is stored bare to save memory.
    """

    __slots__ = ("_many", "_only")

    def __init__(self) -> None:
        self._only: Service | None = None
        self._many: _Many | None = None

    def __len__(self) -> int:
        return len(self.all())

    def all(self) -> Collection[Service]:
        """Return all of them, oldest first."""
        if self._many is not None:
            return self._many.by_key.values()
        return () if self._only is None else (self._only,)

    def put(self, service: Service) -> None:
        """Add a service, or replace it where it stands."""
        only = self._only
        if self._many is None and (only is None or only.key == service.key):
            self._only = service
            return
        if self._many is None:
            assert only is not None
            self._many, self._only = _Many(), None
            self._many.put(only)
        self._many.put(service)

    def remove(self, service: Service) -> None:
        """Drop a service that was added."""
        if self._many is None:
            self._only = None
            return
        self._many.remove(service)
        if len(self._many.by_key) == 1:
            [self._only] = self._many.by_key.values()
            self._many = None

    def inside(self, namespace: Namespace) -> Service | None:
        """Return the best service of this namespace."""
        if self._many is not None:
            return _best(self._many.by_namespace.get(namespace, {}).values())
        only = self._only
        return only if only is not None and only.namespace == namespace else None

    def choose(
        self, client_namespace: Namespace | None, preferred_namespace: Namespace | None = None
    ) -> Service | None:
        """Return the service a client of `client_namespace` means; None when it may see none.

        Own namespace, then canonical, then `preferred_namespace`, then first stored. Without a
        client namespace visibility does not count.
        """
        if client_namespace is not None and (own := self.inside(client_namespace)):
            return own
        many = self._many
        if many is None:
            return next(iter(_visible(self.all(), client_namespace)), None)
        if not many.is_fresh:
            many.refresh()
        default = many.any if client_namespace is None else many.public
        if preferred_namespace is None or default is None or default.canonical:
            return default
        preferred = many.by_namespace.get(preferred_namespace, {}).values()
        return _best(_visible(preferred, client_namespace)) or default


def _visible(services: Iterable[Service], client_namespace: Namespace | None) -> Iterable[Service]:
    if client_namespace is None:
        return services
    return (s for s in services if s.visibility is Visibility.PUBLIC)

"""Istio's proxy config: the YAML a mesh or a pod sets for its proxies (state-and-xds.md 1.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import yaml

from ztunnel.model.network import PORT_MAX
from ztunnel.model.settings import ServerUrl, server_url

PREFIX = "ISTIO_META_"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyConfig:
    """The keys we read; None is absent. Metadata keys have no `ISTIO_META_` prefix."""

    discovery_address: ServerUrl | None = None
    admin_port: int | None = None
    stats_port: int | None = None
    concurrency: int | None = None  # 0: all cores
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read YAML or JSON text.

        Raises:
            ValueError: it is not a proxy config; the message names the key.
        """
        return cls._of(_mapping(text))

    @classmethod
    def parse_mesh(cls, text: str) -> Self:
        """Read the `defaultConfig` of a mesh config.

        Raises:
            ValueError: it is not one; the message names the key.
        """
        return cls._of(_mapping(text).get("defaultConfig") or {})

    def merged(self, over: ProxyConfig) -> ProxyConfig:
        """Give this with what `over` has; its metadata is added key by key."""

        def first(wins: int | None, loses: int | None) -> int | None:
            return loses if wins is None else wins

        return ProxyConfig(
            discovery_address=over.discovery_address or self.discovery_address,
            admin_port=first(over.admin_port, self.admin_port),
            stats_port=first(over.stats_port, self.stats_port),
            concurrency=first(over.concurrency, self.concurrency),
            metadata={**self.metadata, **over.metadata},
        )

    @classmethod
    def _of(cls, raw: object) -> Self:
        if not isinstance(raw, dict):
            raise ValueError("proxy config is not a mapping; write keys and values")  # noqa: TRY004
        address = raw.get("discoveryAddress")
        return cls(
            discovery_address=server_url(str(address)) if address else None,
            admin_port=_number(raw, "proxyAdminPort", 1),
            stats_port=_number(raw, "statsPort", 1),
            concurrency=_number(raw, "concurrency", 0),
            metadata=_metadata(raw.get("proxyMetadata") or {}),
        )


def _mapping(text: str) -> dict[str, Any]:
    try:
        parsed = yaml.safe_load(text) or {}
    except yaml.YAMLError as exc:
        raise ValueError(f"not YAML: {' '.join(str(exc).split())}") from exc
    if not isinstance(parsed, dict):
        raise ValueError("not a mapping; write YAML keys and values")  # noqa: TRY004
    return parsed


def _number(raw: Mapping[str, object], key: str, low: int) -> int | None:
    value = raw.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= PORT_MAX:
        raise ValueError(f"{key} is out of range; write {low} to {PORT_MAX}")
    return value


def _metadata(raw: object) -> dict[str, str]:
    if not isinstance(raw, dict) or any(isinstance(v, dict | list) for v in raw.values()):
        raise ValueError("proxyMetadata holds more than texts; write key: text")
    return {str(key).removeprefix(PREFIX): _scalar(value) for key, value in raw.items()}


def _scalar(value: object) -> str:
    """Undo what YAML made of an unquoted `true` or of nothing."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)

"""Authorization policy (state-and-xds.md 6.3, `istio.security.Authorization`)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ztunnel.model.identity import Namespace, ServiceAccount
from ztunnel.model.network import IpNetwork
from ztunnel.model.workload import PolicyKey


class PolicyScope(StrEnum):
    """Whom the policy is about."""

    GLOBAL = "Global"
    NAMESPACE = "Namespace"
    WORKLOAD_SELECTOR = "WorkloadSelector"


class Action(StrEnum):
    """What a match means."""

    ALLOW = "Allow"
    DENY = "Deny"


class MatchKind(StrEnum):
    """How a string is compared; case-sensitive."""

    EXACT = "Exact"
    PREFIX = "Prefix"
    SUFFIX = "Suffix"
    PRESENCE = "Presence"


@dataclass(frozen=True, slots=True)
class StringMatch:
    """One comparison; `text` is empty for PRESENCE, which means "not empty"."""

    kind: MatchKind
    text: str = ""


@dataclass(frozen=True, slots=True)
class ServiceAccountMatch:
    """Both must be equal; the trust domain is ignored."""

    namespace: Namespace
    service_account: ServiceAccount


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Every field must hold: its positive list empty or one element matching, no negative one."""

    namespaces: tuple[StringMatch, ...] = ()
    not_namespaces: tuple[StringMatch, ...] = ()
    principals: tuple[StringMatch, ...] = ()
    not_principals: tuple[StringMatch, ...] = ()
    service_accounts: tuple[ServiceAccountMatch, ...] = ()
    not_service_accounts: tuple[ServiceAccountMatch, ...] = ()
    source_ips: tuple[IpNetwork, ...] = ()
    not_source_ips: tuple[IpNetwork, ...] = ()
    destination_ips: tuple[IpNetwork, ...] = ()
    not_destination_ips: tuple[IpNetwork, ...] = ()
    destination_ports: tuple[int, ...] = ()
    not_destination_ports: tuple[int, ...] = ()


Clause = tuple[Match, ...]  # any match; empty = always
Rule = tuple[Clause, ...]  # every clause; empty = always


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """An authorization policy. Key: `namespace/name`. Any rule matches; no rules = never."""

    name: str
    namespace: Namespace
    scope: PolicyScope
    action: Action
    rules: tuple[Rule, ...]
    dry_run: bool = False

    @property
    def key(self) -> PolicyKey:
        """`namespace/name`."""
        return PolicyKey(f"{self.namespace}/{self.name}")

"""Protobuf authorization policies to nouns (state-and-xds.md 6.3, 8.3 and 16.21).

A policy is understood as a whole or rejected as a whole. The reference drops what it cannot read,
and a condition that is dropped lets more through than was meant.
"""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from ztunnel.errors import ResourceError
from ztunnel.model.identity import Namespace, ServiceAccount
from ztunnel.model.network import IpNetwork
from ztunnel.model.policy import (
    Action,
    Clause,
    Match,
    MatchKind,
    Policy,
    PolicyScope,
    Rule,
    ServiceAccountMatch,
    StringMatch,
)
from ztunnel.wire.addresses import read_network, read_port
from ztunnel.wire.pb import security_pb2 as pb

SCOPES: Mapping[int, PolicyScope] = {
    pb.GLOBAL: PolicyScope.GLOBAL,
    pb.NAMESPACE: PolicyScope.NAMESPACE,
    pb.WORKLOAD_SELECTOR: PolicyScope.WORKLOAD_SELECTOR,
}
ACTIONS: Mapping[int, Action] = {pb.ALLOW: Action.ALLOW, pb.DENY: Action.DENY}
MATCH_KINDS = {
    "exact": MatchKind.EXACT,
    "prefix": MatchKind.PREFIX,
    "suffix": MatchKind.SUFFIX,
}
STRING_FIELDS = ("namespaces", "not_namespaces", "principals", "not_principals")
ADDRESS_FIELDS = ("source_ips", "not_source_ips", "destination_ips", "not_destination_ips")
PORT_FIELDS = ("destination_ports", "not_destination_ports")
ACCOUNT_FIELDS = ("service_accounts", "not_service_accounts")


def read_policy(data: bytes, notes: list[str]) -> Policy:  # noqa: ARG001 as `read_address`
    """Decode an `istio.security.Authorization`.

    Raises:
        ResourceError: there is anything in it that we do not understand; the text names the field.
    """
    try:
        message = pb.Authorization.FromString(data)
    except DecodeError as exc:
        raise ResourceError(f"not an Authorization message: {exc}") from exc
    if not message.name:
        raise ResourceError("name: empty")
    scope, action = SCOPES.get(message.scope), ACTIONS.get(message.action)
    if scope is None:
        raise ResourceError(f"scope: {message.scope} is not known")
    if action is None:
        raise ResourceError(f"action: {message.action} is not known")
    return Policy(
        name=message.name,
        namespace=Namespace(message.namespace),
        scope=scope,
        action=action,
        rules=tuple(_rule(rule, f"rules[{i}]") for i, rule in enumerate(message.rules)),
        dry_run=message.dry_run,
    )


def _rule(message: pb.Rule, field: str) -> Rule:
    _refuse_unknown(message, field)
    clauses = enumerate(message.clauses)
    return tuple(_clause(clause, f"{field}.clauses[{i}]") for i, clause in clauses)


def _clause(message: pb.Clause, field: str) -> Clause:
    _refuse_unknown(message, field)
    return tuple(_match(match, f"{field}.matches[{i}]") for i, match in enumerate(message.matches))


def _match(message: pb.Match, field: str) -> Match:
    _refuse_unknown(message, field)
    if message.extensions:
        raise ResourceError(f"{field}.extensions: {message.extensions[0].name!r} is not known")
    strings = {
        name: tuple(_string(match, f"{field}.{name}") for match in getattr(message, name))
        for name in STRING_FIELDS
    }
    addresses = {
        name: tuple(_cidr(cidr, f"{field}.{name}") for cidr in getattr(message, name))
        for name in ADDRESS_FIELDS
    }
    ports = {
        name: tuple(int(read_port(port, f"{field}.{name}")) for port in getattr(message, name))
        for name in PORT_FIELDS
    }
    accounts = {
        name: tuple(_account(account, f"{field}.{name}") for account in getattr(message, name))
        for name in ACCOUNT_FIELDS
    }
    return Match(**strings, **addresses, **ports, **accounts)  # type: ignore[arg-type]  # by name


def _string(message: pb.StringMatch, field: str) -> StringMatch:
    kind = message.WhichOneof("match_type")
    if kind == "presence":
        return StringMatch(MatchKind.PRESENCE)
    if kind is None:
        raise ResourceError(f"{field}: neither exact, prefix, suffix nor presence is set")
    return StringMatch(MATCH_KINDS[kind], getattr(message, kind))


def _cidr(message: pb.Address, field: str) -> IpNetwork:
    return read_network(message.address, message.length, field)


def _account(message: pb.ServiceAccountMatch, field: str) -> ServiceAccountMatch:
    _refuse_unknown(message, field)
    return ServiceAccountMatch(
        Namespace(message.namespace), ServiceAccount(message.service_account)
    )


def _refuse_unknown(message: Message, field: str) -> None:
    """Refuse a field from the future: it may hold a condition."""
    unknown = UnknownFieldSet(message)
    if len(unknown):
        raise ResourceError(f"{field}: field {unknown[0].field_number} is not known")

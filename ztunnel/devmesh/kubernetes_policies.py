"""AuthorizationPolicy and PeerAuthentication as istiod converts them (state-and-xds.md 7 and 15).

A node proxy judges connections, not requests. What an HTTP attribute would decide is therefore
left out: an ALLOW rule with one becomes nothing at all, a DENY rule keeps its other parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_network

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
from ztunnel.model.workload import PolicyKey

ROOT_NAMESPACE = "istio-system"
STATIC_STRICT = "istio_converted_static_strict"
STATIC_STRICT_KEY = PolicyKey(f"{ROOT_NAMESPACE}/{STATIC_STRICT}")
CONVERTED_PREFIX = "converted_peer_authentication_"
DRY_RUN = "istio.io/dry-run"

_ACTIONS = {"ALLOW": Action.ALLOW, "DENY": Action.DENY}
_SOURCE_FIELDS = {
    "principals": "principals",
    "namespaces": "namespaces",
    "serviceAccounts": "service_accounts",
    "ipBlocks": "source_ips",
}
_OPERATION_FIELDS = {"ports": "destination_ports"}
_WHEN_FIELDS = {
    "source.principal": "principals",
    "source.namespace": "namespaces",
    "source.serviceAccount": "service_accounts",
    "source.ip": "source_ips",
    "destination.ip": "destination_ips",
    "destination.port": "destination_ports",
}
ANONYMOUS = Match(not_principals=(StringMatch(MatchKind.PRESENCE),))


class _HttpOnlyError(Exception):
    """A rule needs to see requests."""


def authorization_policy(
    name: str, namespace: str, document: Mapping[str, object]
) -> Policy | None:
    """Convert an AuthorizationPolicy; None when it is not for node proxies.

    Raises:
        ResourceError: it is malformed; the text names the field.
    """
    spec = mapping(document.get("spec"), "spec")
    action = _ACTIONS.get(str(spec.get("action", "ALLOW")))
    if action is None or spec.get("targetRefs") or spec.get("targetRef"):
        return None
    scope = PolicyScope.GLOBAL if namespace == ROOT_NAMESPACE else PolicyScope.NAMESPACE
    if match_labels(spec) is not None:
        scope = PolicyScope.WORKLOAD_SELECTOR
    rules = []
    for number, rule in enumerate(sequence(spec.get("rules"), "rules")):
        field = f"rules[{number}]"
        try:
            rules.append(_rule(mapping(rule, field), namespace, action, field))
        except _HttpOnlyError:
            continue
    metadata = mapping(document.get("metadata"), "metadata")
    annotations = mapping(metadata.get("annotations"), "metadata.annotations")
    return Policy(
        name=name,
        namespace=Namespace(namespace),
        scope=scope,
        action=action,
        rules=tuple(rules),
        dry_run=annotations.get(DRY_RUN) == "true",
    )


def match_labels(spec: Mapping[str, object]) -> dict[str, str] | None:
    """Return the labels a policy selects by; None when it selects everything."""
    selector = mapping(spec.get("selector"), "selector")
    labels = mapping(selector.get("matchLabels"), "selector.matchLabels")
    return {key: str(value) for key, value in labels.items()} or None


@dataclass(frozen=True, slots=True)
class PeerAuthentication:
    """Which connections must be mutual TLS; `mode` is "" where it inherits."""

    name: str
    namespace: str
    mode: str
    labels: dict[str, str] | None
    port_modes: Mapping[int, str]

    @classmethod
    def read(cls, name: str, namespace: str, spec: Mapping[str, object]) -> PeerAuthentication:
        """Read the `spec` of one.

        Raises:
            ResourceError: it is malformed.
        """
        ports = mapping(spec.get("portLevelMtls"), "portLevelMtls")
        return cls(
            name,
            namespace,
            _mode(spec.get("mtls")),
            match_labels(spec),
            {int(port): _mode(mtls) for port, mtls in ports.items()},
        )


def mutual_tls_policies(
    namespace: str, labels: Mapping[str, str], known: Iterable[PeerAuthentication]
) -> tuple[list[PolicyKey], list[Policy]]:
    """Return the made-up policies a workload is under, and those of them made for its ports.

    The nearest that says something counts: workload, then namespace, then the mesh.
    """
    mesh = own = ""
    selected: PeerAuthentication | None = None
    for peer in known:
        if peer.labels is None and peer.namespace == namespace:
            own = peer.mode or own
        elif peer.labels is None and peer.namespace == ROOT_NAMESPACE:
            mesh = peer.mode or mesh
        elif peer.labels is not None and peer.namespace == namespace and selected is None:
            selected = peer if selects(peer.labels, labels) else None
    if namespace == ROOT_NAMESPACE:
        mesh = own
    is_strict = ((selected.mode if selected else "") or own or mesh) == "STRICT"
    if selected is not None and (policy := _port_policy(selected, is_strict=is_strict)):
        return [policy.key], [policy]
    return ([STATIC_STRICT_KEY] if is_strict else []), []


def static_strict() -> Policy:
    """Make the policy that refuses plaintext, for the workloads that list it."""
    return Policy(
        name=STATIC_STRICT,
        namespace=Namespace(ROOT_NAMESPACE),
        scope=PolicyScope.WORKLOAD_SELECTOR,
        action=Action.DENY,
        rules=(((ANONYMOUS,),),),
    )


def selects(wanted: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Tell whether `labels` has all that is wanted."""
    return all(labels.get(key) == value for key, value in wanted.items())


def mapping(value: object, field: str) -> Mapping[str, object]:
    """Return a map, an empty one for nothing.

    Raises:
        ResourceError: it is something else.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ResourceError(f"{field}: expected a map")
    return {str(key): inner for key, inner in value.items()}


def sequence(value: object, field: str) -> Sequence[object]:
    """Return a list, an empty one for nothing.

    Raises:
        ResourceError: it is something else.
    """
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ResourceError(f"{field}: expected a list")
    return value


def _mode(mtls: object) -> str:
    mode = str(mapping(mtls, "mtls").get("mode", ""))
    return "" if mode == "UNSET" else mode


def _port_policy(peer: PeerAuthentication, *, is_strict: bool) -> Policy | None:
    """Make the policy for ports that differ from the rest; None without such ports."""
    strict = tuple(p for p, mode in peer.port_modes.items() if mode == "STRICT")
    lenient = tuple(p for p, mode in peer.port_modes.items() if mode and mode != "STRICT")
    if is_strict and lenient:
        ports = Match(not_destination_ports=lenient)
    elif not is_strict and strict:
        ports = Match(destination_ports=strict)
    else:
        return None
    return Policy(
        name=CONVERTED_PREFIX + peer.name,
        namespace=Namespace(peer.namespace),
        scope=PolicyScope.WORKLOAD_SELECTOR,
        action=Action.DENY,
        rules=(((ANONYMOUS,), (ports,)),),
    )


def _rule(rule: Mapping[str, object], namespace: str, action: Action, field: str) -> Rule:
    """Convert a rule: one clause for `from`, one for `to`, one for each `when`."""
    clauses: list[Clause] = []
    for part, inner, fields in (
        ("from", "source", _SOURCE_FIELDS),
        ("to", "operation", _OPERATION_FIELDS),
    ):
        items = sequence(rule.get(part), f"{field}.{part}")
        matches = []
        for number, item in enumerate(items):
            place = f"{field}.{part}[{number}]"
            wanted = mapping(mapping(item, place).get(inner), f"{place}.{inner}")
            matches.append(_match(wanted, fields, namespace, action, place))
        if matches:
            clauses.append(tuple(matches))
    for number, item in enumerate(sequence(rule.get("when"), f"{field}.when")):
        clauses.append((_condition(mapping(item, field), namespace, action, f"when[{number}]"),))
    return tuple(clauses)


def _condition(item: Mapping[str, object], namespace: str, action: Action, field: str) -> Match:
    key = str(item.get("key", ""))
    renamed = {
        name: values
        for name, values in ((key, item.get("values")), (_negated(key), item.get("notValues")))
        if values is not None
    }
    return _match(renamed, _WHEN_FIELDS, namespace, action, field)


def _match(
    wanted: Mapping[str, object],
    fields: Mapping[str, str],
    namespace: str,
    action: Action,
    place: str,
) -> Match:
    """Convert the attributes we can see; one we cannot makes an ALLOW rule void."""
    known = {name: (noun, False) for name, noun in fields.items()}
    known |= {_negated(name): (noun, True) for name, noun in fields.items()}
    found: dict[str, tuple[object, ...]] = {}
    for name, values in wanted.items():
        if name not in known:
            if action is Action.ALLOW:
                raise _HttpOnlyError
            continue
        noun, is_negative = known[name]
        items = tuple(
            _value(noun, str(value), namespace, place) for value in sequence(values, place)
        )
        found[f"not_{noun}" if is_negative else noun] = items
    return Match(**found)  # type: ignore[arg-type]  # by name, as the tables above say


def _negated(name: str) -> str:
    return "not" + name[:1].upper() + name[1:]


def _value(noun: str, text: str, namespace: str, place: str) -> object:
    try:
        match noun:
            case "source_ips" | "destination_ips":
                return _cidr(text)
            case "destination_ports":
                return int(text)
            case "service_accounts":
                owner, _, account = text.rpartition("/")
                return ServiceAccountMatch(Namespace(owner or namespace), ServiceAccount(account))
            case _:
                return string_match(text)
    except ValueError as exc:
        raise ResourceError(f"{place}: {exc}") from exc


def _cidr(text: str) -> IpNetwork:
    return ip_network(text, strict=False)


def string_match(text: str) -> StringMatch:
    """Read Istio's way to write a match: `*`, `prefix*`, `*suffix` or the text itself."""
    if text == "*":
        return StringMatch(MatchKind.PRESENCE)
    if text.startswith("*"):
        return StringMatch(MatchKind.SUFFIX, text[1:])
    if text.endswith("*"):
        return StringMatch(MatchKind.PREFIX, text[:-1])
    return StringMatch(MatchKind.EXACT, text)

"""Kubernetes label selectors, and the setting that is a list of pairs of them (cni.md 3.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import yaml

Labels = Mapping[str, str]


class Operator(StrEnum):
    """How a label's value is compared."""

    IN = "In"
    NOT_IN = "NotIn"  # a label that is not there passes
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


@dataclass(frozen=True, slots=True)
class Requirement:
    """One condition on one label."""

    key: str
    operator: Operator
    values: frozenset[str] = frozenset()

    def matches(self, labels: Labels) -> bool:
        """Whether these labels fulfil it."""
        value = labels.get(self.key)
        match self.operator:
            case Operator.IN:
                return value is not None and value in self.values
            case Operator.NOT_IN:
                return value is None or value not in self.values
            case Operator.EXISTS:
                return value is not None
            case Operator.DOES_NOT_EXIST:
                return value is None


@dataclass(frozen=True, slots=True)
class Selector:
    """All requirements together; without any it matches everything."""

    requirements: tuple[Requirement, ...] = ()

    def matches(self, labels: Labels) -> bool:
        """Whether these labels fulfil all requirements."""
        return all(requirement.matches(labels) for requirement in self.requirements)


@dataclass(frozen=True, slots=True)
class Enablement:
    """One way into the mesh: both selectors must match."""

    pod: Selector = Selector()
    namespace: Selector = Selector()

    def matches(self, pod: Labels, namespace: Labels) -> bool:
        """Whether a pod with these labels in a namespace with those is meant."""
        return self.pod.matches(pod) and self.namespace.matches(namespace)


MODE_LABEL = "istio.io/dataplane-mode"
_AMBIENT = Requirement(MODE_LABEL, Operator.IN, frozenset({"ambient"}))
# The reference's chart: the pod's own label, or its namespace's unless the pod says `none`.
DEFAULT_ENABLEMENTS = (
    Enablement(pod=Selector((_AMBIENT,))),
    Enablement(
        pod=Selector((Requirement(MODE_LABEL, Operator.NOT_IN, frozenset({"none"})),)),
        namespace=Selector((_AMBIENT,)),
    ),
)


def parse_enablements(text: str) -> tuple[Enablement, ...]:
    """Read a YAML list of `{podSelector, namespaceSelector}`; an empty list lets nobody in.

    Raises:
        ValueError: it is not one; what we do not know is an error, too.
    """
    try:
        entries = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        raise ValueError(f"not YAML: {exc}") from exc
    return tuple(_enablement(entry) for entry in _list(entries, "selectors"))


def _enablement(entry: object) -> Enablement:
    fields = _mapping(entry, "selector entry", {"podSelector", "namespaceSelector"})
    return Enablement(
        pod=_selector(fields.get("podSelector")),
        namespace=_selector(fields.get("namespaceSelector")),
    )


def _selector(value: object) -> Selector:
    fields = _mapping(value, "selector", {"matchLabels", "matchExpressions"})
    labels = _mapping(fields.get("matchLabels"), "matchLabels", None)
    equal = [
        Requirement(key, Operator.IN, frozenset({_text(wanted)})) for key, wanted in labels.items()
    ]
    rest = [_requirement(item) for item in _list(fields.get("matchExpressions"), "expressions")]
    return Selector((*equal, *rest))


def _requirement(value: object) -> Requirement:
    fields = _mapping(value, "expression", {"key", "operator", "values"})
    operator = Operator(_text(fields.get("operator")))
    values = frozenset(_text(item) for item in _list(fields.get("values"), "values"))
    if (operator in (Operator.IN, Operator.NOT_IN)) != bool(values):
        raise ValueError(f"operator {operator} with {len(values)} values")
    key = _text(fields.get("key"))
    if not key:
        raise ValueError("an expression without a key")
    return Requirement(key, operator, values)


def _list(value: object, what: str) -> Sequence[Any]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ValueError(f"{what} is not a list")  # noqa: TRY004 - the text is wrong, not the caller
    return value


def _mapping(value: object, what: str, known: set[str] | None) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{what} is not a mapping")
    unknown = set(value) - known if known is not None else set()
    if unknown:
        raise ValueError(f"{what} has unknown fields: {', '.join(sorted(unknown))}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"not a text: {value!r}")  # noqa: TRY004 - the text is wrong
    return value

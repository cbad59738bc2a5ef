"""Whether a DaemonSet wants a pod on a node, as far as the pod's template says (cni.md 2.5).

The part of the scheduler's rules that is required: `nodeSelector` and the required node affinity.
"""

from __future__ import annotations

from collections.abc import Mapping

Object = Mapping[str, object]


def wants_node(daemonset: Object, node: Object) -> bool:
    """Whether the pods of a DaemonSet (as the API gives it) may be on a node (likewise)."""
    spec = _object(_object(_object(daemonset.get("spec")).get("template")).get("spec"))
    metadata = _object(node.get("metadata"))
    labels = {str(key): str(value) for key, value in _object(metadata.get("labels")).items()}
    selector = _object(spec.get("nodeSelector"))
    if any(labels.get(key) != value for key, value in selector.items()):
        return False
    affinity = _object(_object(spec.get("affinity")).get("nodeAffinity"))
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    if required is None:
        return True
    terms = map(_object, _list(_object(required).get("nodeSelectorTerms")))
    fields = {"metadata.name": str(metadata.get("name", ""))}
    return any(_matches(term, labels, fields) for term in terms)


def _matches(term: Object, labels: Mapping[str, str], fields: Mapping[str, str]) -> bool:
    """Whether all of a term holds. One that demands nothing matches nothing."""
    by_label = [_object(item) for item in _list(term.get("matchExpressions"))]
    by_field = [_object(item) for item in _list(term.get("matchFields"))]
    return bool(by_label or by_field) and (
        all(_holds(item, labels) for item in by_label)
        and all(_holds(item, fields) for item in by_field)
    )


def _holds(requirement: Object, values: Mapping[str, str]) -> bool:
    value = values.get(str(requirement.get("key")))
    wanted = [str(item) for item in _list(requirement.get("values"))]
    match requirement.get("operator"):
        case "In":
            return value in wanted
        case "NotIn":
            return value not in wanted
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "Gt" | "Lt" as operator:
            return _compares(operator, value, wanted)
        case _:
            return False


def _compares(operator: str, value: str | None, wanted: list[str]) -> bool:
    try:
        number, limit = int(value or ""), int(wanted[0])
    except (ValueError, IndexError):
        return False
    return number > limit if operator == "Gt" else number < limit


def _object(value: object) -> Object:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []

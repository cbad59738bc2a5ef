"""The network configuration on stdin (cni.md 1.2), and the previous result inside it.

Beside the reference's keys there is one of ours, `agent_decides` (see `cni.plugin.event`).
"""

from __future__ import annotations

from cni.plugin.environment import is_identifier
from cni.plugin.errors import Code, PluginError
from cni.plugin.spans import Span, read_document

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TypeVar

    T = TypeVar("T")

SUPPORTED_VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
DEFAULT_VERSION = "0.1.0"  # what a configuration without cniVersion counts as
DEFAULT_RUN_DIR = "/var/run/istio-cni"
LOG_LEVELS = ("debug", "info", "warn", "error", "none")


class NetConf:
    """What every command needs to know."""

    __slots__ = ("log_level", "members", "run_dir", "text", "version")

    def __init__(
        self, text: str, members: Mapping[str, Span], *, version: str, run_dir: str, log_level: str
    ) -> None:
        self.text = text
        self.members = members
        self.version = version
        self.run_dir = run_dir
        self.log_level = log_level


class Enrolment:
    """What ADD needs to know: which pods are not ours, and who decides about the others."""

    __slots__ = ("agent_decides", "agent_namespace", "ambient_enabled", "exclude_namespaces")

    def __init__(
        self,
        *,
        ambient_enabled: bool,
        agent_decides: bool,
        agent_namespace: str,
        exclude_namespaces: frozenset[str],
    ) -> None:
        self.ambient_enabled = ambient_enabled
        self.agent_decides = agent_decides
        self.agent_namespace = agent_namespace
        self.exclude_namespaces = exclude_namespaces


class PreviousResult:
    """What the plugins before us made: decoded, and the very text."""

    __slots__ = ("members", "text")

    def __init__(self, text: str, members: Mapping[str, object]) -> None:
        self.text = text
        self.members = members


def parse_netconf(raw: bytes) -> NetConf:
    """Read the configuration.

    Raises:
        PluginError: it is not JSON, has no valid name, or an unknown version.
    """
    try:
        text = raw.decode()
        members = read_document(text)
    except ValueError as exc:
        raise PluginError(Code.UNDECODABLE, "error unmarshalling network config", str(exc)) from exc
    name = _text(members, "name")
    if not name:
        raise PluginError(Code.BAD_CONFIG, "missing network name")
    if not is_identifier(name):
        raise PluginError(Code.BAD_CONFIG, "invalid characters in network name", repr(name))
    version = _text(members, "cniVersion") or DEFAULT_VERSION
    if version not in SUPPORTED_VERSIONS:
        raise PluginError(
            Code.INCOMPATIBLE_VERSION,
            "incompatible CNI versions",
            f'config is "{version}", plugin supports {list(SUPPORTED_VERSIONS)}',
        )
    level = _text(members, "plugin_log_level")
    return NetConf(
        text,
        members,
        version=version,
        run_dir=_text(members, "cni_agent_run_dir") or DEFAULT_RUN_DIR,
        # A level nobody knows is no reason to stop pods from starting.
        log_level=level if level in LOG_LEVELS else "info",
    )


def is_at_least(version: str, floor: str) -> bool:
    """Whether one supported version is another, or newer."""
    return SUPPORTED_VERSIONS.index(version) >= SUPPORTED_VERSIONS.index(floor)


def parse_enrolment(conf: NetConf) -> Enrolment:
    """Read the keys that decide whether a pod is the mesh's business.

    Raises:
        PluginError: one of them is of the wrong type.
    """
    excluded = _value(conf.members, "exclude_namespaces", list)
    if not all(isinstance(namespace, str) for namespace in excluded or ()):
        raise _wrong_type("exclude_namespaces")
    return Enrolment(
        ambient_enabled=bool(_value(conf.members, "ambient_enabled", bool)),
        agent_decides=bool(_value(conf.members, "agent_decides", bool)),
        agent_namespace=_text(conf.members, "pod_namespace"),
        exclude_namespaces=frozenset(map(str, excluded or ())),
    )


def parse_previous(conf: NetConf) -> PreviousResult | None:
    """Read the previous result; None if we are the first or only plugin.

    Raises:
        PluginError: it is not an object.
    """
    members = _value(conf.members, "prevResult", dict)
    if members is None:
        return None
    span = conf.members["prevResult"]
    return PreviousResult(conf.text[span.start : span.end], members)


def _text(members: Mapping[str, Span], key: str) -> str:
    return _value(members, key, str) or ""


def _value(members: Mapping[str, Span], key: str, kind: type[T]) -> T | None:
    """Give a member; None if it is missing or null."""
    span = members.get(key)
    if span is None or span.value is None:
        return None
    if not isinstance(span.value, kind):
        raise _wrong_type(key)
    return span.value


def _wrong_type(key: str) -> PluginError:
    return PluginError(Code.UNDECODABLE, "error unmarshalling network config", f"type of {key}")

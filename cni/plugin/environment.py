"""What the runtime says by environment variables: command, sandbox and pod (cni.md 1.1)."""

from __future__ import annotations

import re

from cni.plugin.errors import Code, PluginError

TYPE_CHECKING = False  # `typing` itself would cost 2 ms of every pod's start
if TYPE_CHECKING:
    from collections.abc import Mapping

_NEEDS = {
    "ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"),
    "CHECK": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"),
    # Removing a sandbox comes a second time with an empty CNI_NETNS: not needed.
    "DEL": ("CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"),
    "GC": ("CNI_PATH",),
    "STATUS": ("CNI_PATH",),
    "VERSION": (),
}
_ARGS = {
    "IgnoreUnknown",
    "K8S_POD_NAME",
    "K8S_POD_NAMESPACE",
    "K8S_POD_INFRA_CONTAINER_ID",
    "K8S_POD_UID",
}
_TRUE = {"1", "true", "True", "TRUE"}
_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")  # CNI spec, "CNI_CONTAINERID" and "name"
_IFNAME_BYTES_MAX = 15  # IFNAMSIZ with the terminator is 16


class Pod:
    """Whom the sandbox is for. Names are empty if the runtime is not Kubernetes'."""

    __slots__ = ("name", "namespace", "uid")

    def __init__(self, name: str, namespace: str, uid: str) -> None:
        self.name = name
        self.namespace = namespace
        self.uid = uid


class Call:
    """One command of the runtime. Sandbox and pod may be empty for others than ADD and CHECK."""

    __slots__ = ("command", "container_id", "netns", "pod", "same_netns_allowed")

    def __init__(
        self, command: str, *, container_id: str, netns: str, same_netns_allowed: bool, pod: Pod
    ) -> None:
        self.command = command
        self.container_id = container_id
        self.netns = netns
        self.same_netns_allowed = same_netns_allowed
        self.pod = pod


def parse_environment(env: Mapping[str, str]) -> Call:
    """Read the command and what it is about.

    Raises:
        PluginError: the command is unknown, or a variable is missing or malformed.
    """
    command = env.get("CNI_COMMAND", "")
    if command not in _NEEDS:
        raise PluginError(Code.BAD_ENVIRONMENT, f"unknown CNI_COMMAND: {command}")
    missing = [name for name in _NEEDS[command] if not env.get(name)]
    if missing:
        raise PluginError(
            Code.BAD_ENVIRONMENT, f"required env variables [{','.join(missing)}] missing"
        )
    if "CNI_IFNAME" in _NEEDS[command]:
        _check_id(env["CNI_CONTAINERID"])
        _check_ifname(env["CNI_IFNAME"])
    return Call(
        command,
        container_id=env.get("CNI_CONTAINERID", ""),
        netns=env.get("CNI_NETNS", ""),
        same_netns_allowed=env.get("CNI_NETNS_OVERRIDE", "").upper() in ("1", "TRUE"),
        pod=_parse_pod(command, env.get("CNI_ARGS", "")),
    )


def is_identifier(text: str) -> bool:
    """Whether `text` may be the name of a network or of a container."""
    return _ID.fullmatch(text) is not None


def _check_id(container_id: str) -> None:
    if not is_identifier(container_id):
        raise PluginError(
            Code.BAD_ENVIRONMENT, "invalid characters in containerID", repr(container_id)
        )


def _check_ifname(ifname: str) -> None:
    is_bad_character = any(char in "/:" or char.isspace() for char in ifname)
    if is_bad_character or ifname in (".", "..") or len(ifname.encode()) > _IFNAME_BYTES_MAX:
        raise PluginError(Code.BAD_ENVIRONMENT, "invalid interface name", repr(ifname))


def _parse_pod(command: str, args: str) -> Pod:
    """Read whom a command is about; only ADD fails if nobody can tell."""
    try:
        return _parse_args(args)
    except PluginError:
        if command == "ADD":
            raise
        return Pod("", "", "")


def _parse_args(args: str) -> Pod:
    """Read `CNI_ARGS`: `K=V` pairs with `;` between them, in any order."""
    pairs: dict[str, str] = {}
    for pair in args.split(";") if args else ():
        key, equals, value = pair.partition("=")
        if not equals or "=" in value:
            raise PluginError(Code.BAD_ENVIRONMENT, "CNI_ARGS: invalid pair", repr(pair))
        pairs[key] = value
    unknown = sorted(pairs.keys() - _ARGS)
    if unknown and pairs.get("IgnoreUnknown") not in _TRUE:
        raise PluginError(Code.BAD_ENVIRONMENT, f"CNI_ARGS: unknown args {unknown}")
    return Pod(
        pairs.get("K8S_POD_NAME", ""),
        pairs.get("K8S_POD_NAMESPACE", ""),
        pairs.get("K8S_POD_UID", ""),
    )

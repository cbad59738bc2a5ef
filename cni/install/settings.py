"""What the operator chose about the installation (cni.md 2.1, daemonset.md 3.1 and 9.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cni.install.conflist import PLUGIN_TYPE
from cni.install.errors import InstallConfigError
from cni.install.files import CONF_ENDINGS
from cni.install.placement import Mode, Placement

_TRUE = frozenset({"1", "t", "T", "true", "TRUE", "True"})  # Go's strconv.ParseBool
_FALSE = frozenset({"0", "f", "F", "false", "FALSE", "False", ""})
# The chart sets one name and the reference's binary reads the other.
_OWN_NAMES = ("ISTIO_OWNED_CNI_CONFIG_FILENAME", "ISTIO_OWNED_CNI_CONF_FILENAME")


@dataclass(frozen=True, slots=True, kw_only=True)
class InstallSettings:
    """Where things go, and what the plugin is told."""

    conf_folder: Path
    bin_folder: Path
    host_bin_folder: str  # the host's path of `bin_folder`; empty: find it
    run_dir: str
    placement: Placement
    group_may_read: bool
    ambient_enabled: bool
    exclude_namespaces: tuple[str, ...]
    agent_namespace: str
    plugin_log_level: str
    writes_kubeconfig: bool
    kubeconfig_mode: int
    safe_upgrade_disabled: bool

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Self:
        """Read the settings.

        Raises:
            InstallConfigError: some are malformed or contradict each other; lists them all.
        """
        problems: list[str] = []

        def flag(name: str, *, default: bool) -> bool:
            text = env.get(name)
            if text is None:
                return default
            if text not in _TRUE | _FALSE:
                problems.append(f"{name}={text!r}: not true or false")
            return text in _TRUE

        mode = _mode(
            flag("CHAINED_CNI_PLUGIN", default=True), flag("ISTIO_OWNED_CNI_CONFIG", default=False)
        )
        if mode is None:
            problems.append("ISTIO_OWNED_CNI_CONFIG needs CHAINED_CNI_PLUGIN")
        settings = cls(
            conf_folder=Path(env.get("MOUNTED_CNI_NET_DIR") or "/host/etc/cni/net.d"),
            bin_folder=Path(env.get("MOUNTED_CNI_BIN_DIR") or "/host/opt/cni/bin"),
            host_bin_folder=env.get("CNI_BIN_DIR", ""),
            run_dir=env.get("CNI_AGENT_RUN_DIR") or "/var/run/istio-cni",
            placement=_placement(env, mode or Mode.CHAINED, problems),
            group_may_read=flag("CNI_CONF_GROUP_READ", default=False),
            ambient_enabled=flag("AMBIENT_ENABLED", default=False),
            exclude_namespaces=_names(env.get("EXCLUDE_NAMESPACES", "")),
            agent_namespace=env.get("POD_NAMESPACE", ""),
            plugin_log_level=env.get("PLUGIN_LOG_LEVEL") or "info",
            writes_kubeconfig=flag("WRITE_PLUGIN_KUBECONFIG", default=False),
            kubeconfig_mode=_mode_bits(env.get("KUBECONFIG_MODE") or "0600", problems),
            safe_upgrade_disabled=flag("AMBIENT_DISABLE_SAFE_UPGRADE", default=False),
        )
        if problems:
            raise InstallConfigError("; ".join(problems))
        return settings

    def entry(self) -> dict[str, object]:
        """Give the plugin's configuration, as it stands in the chain (cni.md 1.2).

        It lacks the reference's selectors: our plugin leaves that decision to the agent.
        """
        return {
            "name": PLUGIN_TYPE,
            "type": PLUGIN_TYPE,
            "ipam": {},
            "dns": {},
            "plugin_log_level": self.plugin_log_level,
            "cni_agent_run_dir": self.run_dir,
            "ambient_enabled": self.ambient_enabled,
            "agent_decides": True,
            "exclude_namespaces": list(self.exclude_namespaces),
            "pod_namespace": self.agent_namespace,
        }


def _mode(is_chained: bool, has_own_file: bool) -> Mode | None:  # noqa: FBT001, two settings
    """Give the mode that two settings mean; None if they contradict each other."""
    if is_chained:
        return Mode.OWN_FILE if has_own_file else Mode.CHAINED
    return None if has_own_file else Mode.STANDALONE


def _placement(env: Mapping[str, str], mode: Mode, problems: list[str]) -> Placement:
    conf_name = env.get("CNI_CONF_NAME", "")
    own_name = next((env[name] for name in _OWN_NAMES if env.get(name)), Placement(mode).own_name)
    problems.extend(
        f"{name!r} is not the name of a CNI configuration"
        for name in (conf_name, own_name)
        if name and ("/" in name or not name.endswith(CONF_ENDINGS))
    )
    if not own_name.endswith(".conflist"):
        problems.append(f"{own_name!r} must be a .conflist")
    return Placement(mode, conf_name, own_name)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _mode_bits(text: str, problems: list[str]) -> int:
    try:
        bits = int(text, 8)
    except ValueError:
        bits = -1
    if not 0 <= bits <= 0o777:  # noqa: PLR2004, permission bits are octal digits
        problems.append(f"KUBECONFIG_MODE={text!r}: not permissions")
    return bits

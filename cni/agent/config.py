"""AgentConfig: what the operator chose (cni.md 2.1); the only reader of the environment.

Names and defaults are the reference's, but for these: AMBIENT_IPV6 is on unless switched off,
because off means that traffic goes unprotected; an unset AMBIENT_ENABLEMENT_SELECTOR means the
selectors of the reference's chart; rules are always compared at the start, whatever
AMBIENT_RECONCILE_POD_RULES_ON_STARTUP says. The installer's settings are `cni.install.settings`.

Our own settings, all with the prefix ZTUNNEL_CNI_: PROBES (snat) how kubelet's probes get past the
proxy, see `overrides.ProbeStrategy`; NODE_ADDRESSES for `node-address`, beside those Kubernetes
knows; PROBE_OWNER (kubelet) whose processes on the host may probe: `kubelet`, `any` or a uid;
KEEP_ESTABLISHED (false) do not reset the connections of a running pod that is enrolled;
RECONCILE_INTERVAL (60s); READY_NEEDS_PROXY (false); HOST_ROOT (/host) where the host's files are
mounted; TOKEN_FILE; HEALTH_PORT (8000); INSTALL (true) the plugin; RELEASE_ON_UNINSTALL (false)
take this node's pods out of the mesh when the agent's DaemonSet goes; CRI_SOCKET the container
runtime's socket as the agent sees it, or `none`; unset, the places where runtimes have it are
looked at below HOST_ROOT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Self, TypeVar

from cni.agent.eligibility import Eligibility
from cni.agent.kube_http import ACCOUNT_FOLDER, ApiServer
from cni.agent.overrides import ProbeStrategy, Redirecting, parse_bool
from cni.agent.runtime_client import KNOWN_SOCKETS
from cni.agent.selectors import DEFAULT_ENABLEMENTS, Enablement, parse_enablements
from cni.redirect.plan import PROBE_SOURCES
from ztunnel.errors import ConfigError
from ztunnel.model.network import IpAddress, parse_ip, parse_port
from ztunnel.model.settings import seconds

T = TypeVar("T")

KUBELET = "kubelet"
UID_MAX = 2**32 - 2
INTERVAL_SECONDS_MIN, INTERVAL_SECONDS_MAX = 1, 3600
IPV4, IPV6 = 4, 6
SHOWN_CHARS = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """Everything the node agent can be told."""

    node_name: str
    api: ApiServer
    eligibility: Eligibility = field(default_factory=Eligibility)
    redirecting: Redirecting = field(default_factory=Redirecting)
    run_dir: Path = Path("/var/run/istio-cni")
    zds_path: Path = Path("/var/run/ztunnel/ztunnel.sock")
    host_root: Path = Path("/host")
    cri_sockets: tuple[Path, ...] = ()
    switch_to_host_netns: bool = False
    probe_owner: int | str | None = KUBELET  # a uid; None: anybody; or to be found out
    probes_branch_enis: bool = True
    reconcile_seconds: float = 60.0
    ready_needs_proxy: bool = False
    installs: bool = True  # the plugin
    releases_pods: bool = False  # when no agent will follow
    agent_namespace: str = ""
    health_port: int = 8000
    monitoring_port: int = 15014
    log_filter: str = "info"
    log_json: bool = False

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Self:
        """Read every setting.

        Raises:
            ConfigError: some are wrong; each has its line in the message.
        """
        reader = _Reader(env)
        get = reader.get
        host_root = get("ZTUNNEL_CNI_HOST_ROOT", _absolute, "/host")
        config = cls(
            node_name=get("NODE_NAME", str, ""),
            api=_api_server(reader),
            eligibility=Eligibility(
                enablements=_enablements(reader),
                excluded_namespaces=frozenset(get("EXCLUDE_NAMESPACES", _words, "")),
                system_namespace=get("SYSTEM_NAMESPACE", str, "istio-system"),
            ),
            redirecting=_redirecting(reader),
            run_dir=get("CNI_AGENT_RUN_DIR", _absolute, "/var/run/istio-cni"),
            zds_path=get("ZTUNNEL_UDS_ADDRESS", _absolute, "/var/run/ztunnel/ztunnel.sock"),
            host_root=host_root,
            cri_sockets=get("ZTUNNEL_CNI_CRI_SOCKET", _cri_sockets(host_root), ""),
            switch_to_host_netns=get("ALLOW_SWITCH_TO_HOST_NS", parse_bool, "false"),
            probe_owner=get("ZTUNNEL_CNI_PROBE_OWNER", _owner, KUBELET),
            probes_branch_enis=get("AMBIENT_ENABLE_AWS_BRANCH_ENI_PROBE", parse_bool, "true"),
            reconcile_seconds=get("ZTUNNEL_CNI_RECONCILE_INTERVAL", _interval, "60s"),
            ready_needs_proxy=get("ZTUNNEL_CNI_READY_NEEDS_PROXY", parse_bool, "false"),
            installs=get("ZTUNNEL_CNI_INSTALL", parse_bool, "true"),
            releases_pods=get("ZTUNNEL_CNI_RELEASE_ON_UNINSTALL", parse_bool, "false"),
            agent_namespace=get("POD_NAMESPACE", str, ""),
            health_port=get("ZTUNNEL_CNI_HEALTH_PORT", parse_port, "8000"),
            monitoring_port=get("MONITORING_PORT", parse_port, "15014"),
            log_filter=get("RUST_LOG", str, "") or "info",
            log_json=get("LOG_FORMAT", str, "plain") == "json",
        )
        if not config.node_name:
            reader.problems.append("NODE_NAME is not set: whose pods are ours?")
        if reader.problems:
            raise ConfigError("\n".join(reader.problems))
        return config


class _Reader:
    """Reads variables and remembers every problem."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.env = env
        self.problems: list[str] = []

    def get(self, name: str, parse: Callable[[str], T], default: str) -> T:
        """Read one; the default if it is wrong."""
        text = self.env.get(name, default)
        try:
            return parse(text)
        except ValueError as exc:
            shown = text[:SHOWN_CHARS].encode("unicode_escape").decode()
            self.problems.append(f"invalid env var {name}={shown} ({exc})")
            return parse(default)


def _api_server(reader: _Reader) -> ApiServer:
    get = reader.get
    protocol = get("KUBERNETES_SERVICE_PROTOCOL", _protocol, "https")
    roots = get("KUBE_CA_FILE", str, "") or str(ACCOUNT_FOLDER / "ca.crt")
    token = get("ZTUNNEL_CNI_TOKEN_FILE", str, str(ACCOUNT_FOLDER / "token"))
    return ApiServer(
        host=get("KUBERNETES_SERVICE_HOST", str, "kubernetes.default.svc").strip("[]"),
        port=get("KUBERNETES_SERVICE_PORT", parse_port, "443"),
        tls=protocol == "https",
        verify=not get("SKIP_TLS_VERIFY", parse_bool, "false"),
        roots=Path(roots),
        token=Path(token) if token else None,
    )


def _enablements(reader: _Reader) -> tuple[Enablement, ...]:
    if not reader.get("AMBIENT_ENABLED", parse_bool, "false"):
        return ()
    if "AMBIENT_ENABLEMENT_SELECTOR" not in reader.env:
        return DEFAULT_ENABLEMENTS
    return reader.get("AMBIENT_ENABLEMENT_SELECTOR", parse_enablements, "")


def _redirecting(reader: _Reader) -> Redirecting:
    get = reader.get
    v4, v6 = map(str, PROBE_SOURCES)
    sources = (
        get("HOST_PROBE_SNAT_IP", _address(IPV4), v4),
        get("HOST_PROBE_SNAT_IPV6", _address(IPV6), v6),
    )
    return Redirecting(
        dns=get("AMBIENT_DNS_CAPTURE", parse_bool, "false"),
        ipv6=get("AMBIENT_IPV6", parse_bool, "true"),
        syn_only=get("ZTUNNEL_CNI_KEEP_ESTABLISHED", parse_bool, "false"),
        probes=get("ZTUNNEL_CNI_PROBES", _probes, ProbeStrategy.SNAT.value),
        probe_sources=sources,
        node_addresses=get("ZTUNNEL_CNI_NODE_ADDRESSES", _addresses, ""),
    )


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _absolute(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute():
        raise ValueError("not an absolute path")
    return path


def _protocol(text: str) -> str:
    if text not in ("http", "https"):
        raise ValueError("not http or https")
    return text


def _address(version: int) -> Callable[[str], IpAddress]:
    def parse(text: str) -> IpAddress:
        ip = ip_address(text)
        if ip.version != version:
            raise ValueError(f"not an IPv{version} address")
        return ip

    return parse


def _addresses(text: str) -> tuple[IpAddress, ...]:
    return tuple(parse_ip(word) for word in _words(text))


def _probes(text: str) -> ProbeStrategy:
    try:
        return ProbeStrategy(text)
    except ValueError:
        raise ValueError(f"not one of {', '.join(ProbeStrategy)}") from None


def _cri_sockets(host_root: Path) -> Callable[[str], tuple[Path, ...]]:
    def parse(text: str) -> tuple[Path, ...]:
        if text == "none":
            return ()
        return (_absolute(text),) if text else tuple(host_root / one for one in KNOWN_SOCKETS)

    return parse


def _owner(text: str) -> int | str | None:
    if text == KUBELET:
        return text
    if text == "any":
        return None
    if not text.isascii() or not text.isdigit() or int(text) > UID_MAX:
        raise ValueError(f"not {KUBELET}, any or a uid")
    return int(text)


def _interval(text: str) -> float:
    value = seconds(text)
    if not INTERVAL_SECONDS_MIN <= value <= INTERVAL_SECONDS_MAX:
        raise ValueError(f"not {INTERVAL_SECONDS_MIN} to {INTERVAL_SECONDS_MAX} seconds")
    return value

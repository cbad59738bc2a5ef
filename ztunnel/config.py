"""Config: the only reader of the environment (dataplane.md 11, state-and-xds.md 1).

How it works: each setting is one field, declared with the reference's variable name, its default
and its parser, and with the name it has in `/config_dump`. `from_env` walks the fields, then works
out the settings that depend on several variables, then checks how settings relate. Every problem
found on the way is collected, so that an operator mends them all at once.

Deliberate differences from the reference: default paths are absolute, so the working directory
does not matter; an unknown COMPLIANCE_POLICY stops the start instead of being ignored; a proxy
config without `proxyMetadata` is accepted; FAKE_CA may name a PEM file with a root and its key;
ZTUNNEL_WORKER_THREADS means processes, which share no state, and nothing set means one: the
variables that the reference guesses a number from (ZTUNNEL_CPU_LIMIT and its like) are not read.

Our own settings, all with the prefix ZTUNNEL_:
MAX_HANDSHAKES (256) TLS handshakes in progress; MAX_CONNECTIONS_PER_POD (50000, 0 = no limit);
MAX_CONNECTIONS_PER_PEER (1000, 0 = no limit) inbound HBONE connections from one address to a pod;
MAX_STREAMS_PER_CONNECTION (200) as announced to peers, and MAX_HEADER_SIZE (65536 bytes) likewise;
TLS_HANDSHAKE_TIMEOUT (10s) for the whole handshake; CONNECT_RESPONSE_TIMEOUT (30s) from CONNECT to
its answer; POLICY_WAIT (5s, 0 = do not wait and go on without, as the reference) for a policy that
a workload names and we have not received yet; IDLE_TIMEOUT and HALF_OPEN_TIMEOUT (0 = no limit, as
the reference) after which a connection that moves nothing, or of which one half has ended, is cut;
OWN_RECORDS (true) seal TLS records ourselves after the handshake; TLS_RESUMPTION (false) resume TLS
sessions: pays where tunnels are short-lived, costs a ticket for each that nobody resumes;
LOAD_BALANCING (random, as the reference, or least-connections) among equal endpoints of a service.
"""

# ruff: noqa: RUF009
# `setting` and `derived` only wrap `field`, which the rule cannot see.

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeVar

from ztunnel.errors import ConfigError
from ztunnel.model.identity import TrustDomain
from ztunnel.model.network import Endpoint, Network
from ztunnel.model.proxy_config import PREFIX, ProxyConfig
from ztunnel.model.settings import (
    REDACTED,
    SHOWN_CHARS,
    Balancing,
    ProxyMode,
    ServerUrl,
    Source,
    SourceKind,
    WorkloadInfo,
    balancing,
    boolean,
    both_loopbacks,
    compliance,
    derived,
    dns_addresses,
    dns_capture,
    drain_seconds,
    fake_ca,
    header,
    integer,
    is_true,
    json_metadata,
    needed_server_url,
    no_limit,
    optional,
    proxy_mode,
    root_source,
    seconds,
    server_url,
    setting,
    shown,
    trust_domains,
    worker_count,
    workers,
    workload_info,
)

T = TypeVar("T")

MESH_FILE = "/etc/istio/config/mesh"
ROOT_FILE = "/var/run/secrets/istio/root-cert.pem"
TOKEN_FILE = "/var/run/secrets/tokens/istio-token"  # noqa: S105 a path, not a token
DEFAULT_ADMIN_PORT = 15000
DEFAULT_STATS_PORT = 15020
DEFAULT_DNS_PORT = 15053
READINESS_PORT = 15021
ISTIOD_PORT = 15012
DEFAULT_PACKET_MARK = 1337
WINDOW_MAX = 2**31 - 1  # RFC 9113 s6.9.1
FRAME_MIN, FRAME_MAX = 16384, 16777215  # RFC 9113 s4.2
MARK_MAX = 2**32 - 1
_HEADER_PREFIXES = ("XDS_HEADER_", "CA_HEADER_")
_SECRETS = ("AUTH_TOKEN", *_HEADER_PREFIXES)
DEFAULT_SERVER = ServerUrl("localhost", ISTIOD_PORT)
IN_CLUSTER_SERVER = ServerUrl("istiod.istio-system.svc", ISTIOD_PORT)


def read_text(path: str) -> str:
    """Read a whole file; the one file access of this module."""
    return Path(path).read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What the operator chose. `Config()` holds the defaults of a shared proxy."""

    proxy_enabled: bool = setting("ENABLE_PROXY", "true", boolean, "proxy")
    mode: ProxyMode = setting("PROXY_MODE", "shared", proxy_mode, "proxyMode")
    workload_info: WorkloadInfo | None = setting(
        "PROXY_WORKLOAD_INFO", "", optional(workload_info), "proxyWorkloadInformation"
    )
    node_name: str | None = setting("NODE_NAME", "", optional(str), "localNode")
    network: Network = setting("NETWORK", "", Network, "network")
    cluster_id: str = setting("CLUSTER_ID", "Kubernetes", str, "clusterId")
    cluster_domain: str = setting("CLUSTER_DOMAIN", "cluster.local", str, "clusterDomain")
    pod_name: str | None = setting("POD_NAME", "", optional(str))
    pod_namespace: str | None = setting("POD_NAMESPACE", "", optional(str))
    service_account: str | None = setting("SERVICE_ACCOUNT", "", optional(str))
    instance_ip: str | None = setting("INSTANCE_IP", "", optional(str))
    trust_domain: TrustDomain = setting("TRUST_DOMAIN", "cluster.local", TrustDomain)
    trust_domain_aliases: tuple[TrustDomain, ...] = setting(  # beside a certificate's own
        "TRUST_DOMAINS", "", trust_domains, "trustDomains"
    )
    alternative_xds_hostname: str | None = setting(
        "ALT_XDS_HOSTNAME", "", optional(str), "altXdsHostname"
    )
    alternative_ca_hostname: str | None = setting(
        "ALT_CA_HOSTNAME", "", optional(str), "altCaHostname"
    )
    xds_on_demand: bool = setting("XDS_ON_DEMAND", "false", boolean, "xdsOnDemand")
    local_xds_path: Path | None = setting("LOCAL_XDS_PATH", "", optional(Path))
    local_xds: str | None = setting("LOCAL_XDS", "", optional(str))
    preferred_service_namespace: str | None = setting(
        "PREFERED_SERVICE_NAMESPACE", "", optional(str), "preferedServiceNamespace"
    )
    secret_ttl_seconds: float = setting("SECRET_TTL", "24h", seconds, "secretTtl")
    pool_max_streams: int = setting(
        "POOL_MAX_STREAMS_PER_CONNECTION", "100", integer(1), "poolMaxStreamsPerConn"
    )
    pool_unused_release_seconds: float = setting(
        "POOL_UNUSED_RELEASE_TIMEOUT", "5m", seconds, "poolUnusedReleaseTimeout"
    )
    stream_window_bytes: int = setting(
        "HTTP2_STREAM_WINDOW_SIZE", "4194304", integer(1, WINDOW_MAX), "windowSize"
    )
    connection_window_bytes: int = setting(
        "HTTP2_CONNECTION_WINDOW_SIZE", "16777216", integer(65535, WINDOW_MAX),
        "connectionWindowSize",
    )  # fmt: skip
    frame_bytes: int = setting(
        "HTTP2_FRAME_SIZE", "1048576", integer(FRAME_MIN, FRAME_MAX), "frameSize"
    )
    original_source: bool | None = setting(  # None: try, and go on without it
        "ENABLE_ORIG_SRC", "", optional(boolean), "requireOriginalSource"
    )
    keepalive_enabled: bool = setting(
        "KEEPALIVE_ENABLED", "true", boolean, "socketConfig.keepaliveEnabled"
    )
    keepalive_time_seconds: float = setting(
        "KEEPALIVE_TIME", "180s", seconds, "socketConfig.keepaliveTime"
    )
    keepalive_interval_seconds: float = setting(
        "KEEPALIVE_INTERVAL", "180s", seconds, "socketConfig.keepaliveInterval"
    )
    keepalive_retries: int = setting(  # tcp(7): at most 127
        "KEEPALIVE_RETRIES", "9", integer(1, 127), "socketConfig.keepaliveRetries"
    )
    user_timeout_enabled: bool = setting(
        "USER_TIMEOUT_ENABLED", "false", boolean, "socketConfig.userTimeoutEnabled"
    )
    inpod_socket: Path = setting("INPOD_UDS", "/var/run/ztunnel/ztunnel.sock", Path, "inpodUds")
    inpod_port_reuse: bool = setting("INPOD_PORT_REUSE", "true", boolean, "inpodPortReuse")
    ipv6_enabled: bool = setting("IPV6_ENABLED", "true", boolean, "ipv6Enabled")
    socks5_enabled: bool = setting("UNSTABLE_ENABLE_SOCKS5", "false", boolean)
    localhost_app_tunnel: bool = setting(
        "LOCALHOST_APP_TUNNEL", "true", boolean, "localhostAppTunnel"
    )
    baggage_enabled: bool = setting(
        "ENABLE_RESPONSE_BAGGAGE", "true", boolean, "enableEnhancedBaggage"
    )
    crl_path: Path | None = setting("CRL_PATH", "", optional(Path), "crlPath")
    tls12_enabled: bool = setting("TLS12_ENABLED", "", is_true)
    post_quantum_only: bool = setting("COMPLIANCE_POLICY", "", compliance)
    policy_info_logging: bool = setting("AUTHZ_POLICY_INFO_LOGGING", "", is_true)
    log_filter: str = setting("RUST_LOG", "info", lambda text: text or "info")
    log_json: bool = setting("LOG_FORMAT", "plain", lambda text: text == "json")
    max_handshakes: int = setting("ZTUNNEL_MAX_HANDSHAKES", "256", integer(1), "maxHandshakes")
    max_connections_per_pod: int = setting(
        "ZTUNNEL_MAX_CONNECTIONS_PER_POD", "50000", integer(0), "maxConnectionsPerPod"
    )
    max_tunnels_per_peer: int = setting(
        "ZTUNNEL_MAX_CONNECTIONS_PER_PEER", "1000", integer(0), "maxConnectionsPerPeer"
    )
    max_streams_per_tunnel: int = setting(
        "ZTUNNEL_MAX_STREAMS_PER_CONNECTION", "200", integer(1), "maxStreamsPerConnection"
    )
    max_header_bytes: int = setting(
        "ZTUNNEL_MAX_HEADER_SIZE", "65536", integer(1024, 1 << 20), "maxHeaderSize"
    )
    tls_handshake_seconds: float = setting(
        "ZTUNNEL_TLS_HANDSHAKE_TIMEOUT", "10s", seconds, "tlsHandshakeTimeout"
    )
    connect_response_seconds: float = setting(
        "ZTUNNEL_CONNECT_RESPONSE_TIMEOUT", "30s", seconds, "connectResponseTimeout"
    )
    policy_wait_seconds: float = setting("ZTUNNEL_POLICY_WAIT", "5s", no_limit, "policyWait")
    idle_seconds: float = setting("ZTUNNEL_IDLE_TIMEOUT", "0", no_limit, "idleTimeout")
    half_open_seconds: float = setting(
        "ZTUNNEL_HALF_OPEN_TIMEOUT", "0", no_limit, "halfOpenTimeout"
    )
    own_records: bool = setting("ZTUNNEL_OWN_RECORDS", "true", boolean, "ownRecords")
    tls_resumption: bool = setting("ZTUNNEL_TLS_RESUMPTION", "false", boolean, "tlsResumption")
    balancing: Balancing = setting("ZTUNNEL_LOAD_BALANCING", "random", balancing, "loadBalancing")

    # Settings that several variables decide.
    xds_address: ServerUrl | None = derived(DEFAULT_SERVER, "xdsAddress")  # None: no control plane
    ca_address: ServerUrl | None = derived(DEFAULT_SERVER, "caAddress")  # None: FAKE_CA
    xds_root: Source = derived(Source(SourceKind.FILE, ROOT_FILE), "xdsRootCert")
    ca_root: Source = derived(Source(SourceKind.FILE, ROOT_FILE), "caRootCert")
    token: Source | None = derived(None)  # None: no authentication
    xds_headers: tuple[tuple[str, str], ...] = derived((), "xdsHeaders", secret=True)
    ca_headers: tuple[tuple[str, str], ...] = derived((), "caHeaders", secret=True)
    fake_ca: bool = derived(default=False, dump="fakeCa")
    fake_ca_path: Path | None = derived(None)  # PEM file: root certificate and its key
    drain_seconds: float = derived(drain_seconds(None), "selfTerminationDeadline")
    packet_mark: int | None = derived(DEFAULT_PACKET_MARK, "packetMark")
    worker_threads: int = derived(1, "numWorkerThreads")  # data-path processes
    admin_port: int = derived(DEFAULT_ADMIN_PORT)
    stats_port: int = derived(DEFAULT_STATS_PORT)
    dns_enabled: bool = derived(default=True, dump="dnsProxy")
    dns_addresses: tuple[Endpoint, ...] = derived(both_loopbacks(DEFAULT_DNS_PORT), "dnsProxyAddr")
    proxy_metadata: Mapping[str, str] = derived({}, "proxyMetadata")
    node_metadata: Mapping[str, object] = derived({})  # from ISTIO_METAJSON_*
    istio_version: str = derived("unknown")
    warnings: tuple[str, ...] = ()  # ignored input, to be logged once logging stands

    @classmethod
    def from_env(
        cls,
        env: Mapping[str, str],
        *,
        read_file: Callable[[str], str] = read_text,
        cpus: int | None = None,
    ) -> Self:
        """Read every setting from `env` and the mesh file.

        `read_file` raises OSError for a file that cannot be read. `cpus` is for tests.

        Raises:
            ConfigError: some settings are wrong; each has its line in the message.
        """
        reader = _Reader(env, read_file)
        values: dict[str, Any] = {
            item.name: reader.get(*(item.metadata[key] for key in ("env", "parse", "default")))
            for item in fields(cls)
            if "env" in item.metadata
        }
        values |= reader.control_plane() | reader.from_proxy_config()
        values |= reader.limits(values["mode"], cpus or os.cpu_count() or 1)
        values["cluster_id"] = values["proxy_metadata"].get("CLUSTER_ID", values["cluster_id"])
        config = cls(**values)
        reader.check(config)
        if reader.problems:
            raise ConfigError("\n".join(reader.problems))
        return config

    def to_dump(self) -> dict[str, object]:
        """Show the settings as `/config_dump` does (dns-and-observability.md 4.7), no secrets."""
        dump: dict[str, Any] = {"socketConfig": {}}
        for item in fields(self):
            group, _, key = item.metadata.get("dump", "").rpartition(".")
            if key:
                place = dump[group] if group else dump
                place[key] = shown(item.name, getattr(self, item.name))
        any_ip = "[::]" if self.ipv6_enabled else "0.0.0.0"  # noqa: S104 only shown
        ports = {"outboundAddr": 15001, "inboundPlaintextAddr": 15006, "inboundAddr": 15008}
        dump |= {name: f"{any_ip}:{port}" for name, port in ports.items()}
        dump["socks5Addr"] = "127.0.0.1:15080" if self.socks5_enabled else None
        # As the reference writes what may also be bound to loopback alone.
        for name, port in (("statsAddr", self.stats_port), ("readinessAddr", READINESS_PORT)):
            dump[name] = {"SocketAddr": f"{any_ip}:{port}"}
        dump["adminAddr"] = {"Localhost": [self.ipv6_enabled, self.admin_port]}
        dump["illegalPorts"] = [*ports.values(), *([15080] if self.socks5_enabled else [])]
        return dump


class _Reader:
    """Reads variables and remembers every problem."""

    def __init__(self, env: Mapping[str, str], read_file: Callable[[str], str]) -> None:
        self.env = env
        self.read_file = read_file
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.proxy_config = self._merged_proxy_config()

    def get(self, name: str, parse: Callable[[str], T], default: str) -> T:
        try:
            return parse(self.env.get(name, default))
        except ValueError as exc:
            self.complain(name, str(exc))
            return parse(default)

    def complain(self, name: str, reason: str) -> None:
        shown = self.env.get(name, "")[:SHOWN_CHARS].encode("unicode_escape").decode()
        if name.startswith(_SECRETS):
            shown = REDACTED
        self.problems.append(f"invalid env var {name}={shown} ({reason})")

    def control_plane(self) -> dict[str, object]:
        """Work out servers, roots, token and headers."""
        server = IN_CLUSTER_SERVER if "KUBERNETES_SERVICE_HOST" in self.env else DEFAULT_SERVER
        discovery = self.proxy_config.discovery_address or server
        faked = self.get("FAKE_CA", fake_ca, "false")
        return {
            "xds_address": self.get("XDS_ADDRESS", optional(server_url), str(discovery)),
            "ca_address": None if faked else self.get("CA_ADDRESS", needed_server_url, str(server)),
            "fake_ca": faked is not False,
            "fake_ca_path": faked if isinstance(faked, Path) else None,
            "xds_root": self.get("XDS_ROOT_CA", root_source, ROOT_FILE),
            "ca_root": self.get("CA_ROOT_CA", root_source, ROOT_FILE),
            "token": self._token(),
            "xds_headers": self._headers("XDS_HEADER_"),
            "ca_headers": self._headers("CA_HEADER_"),
        }

    def from_proxy_config(self) -> dict[str, object]:
        """Work out what the proxy config and its metadata say."""
        metadata = dict(self.proxy_config.metadata)
        for name, value in self.env.items():
            if name.startswith(PREFIX):
                metadata[name.removeprefix(PREFIX)] = value
        dns = metadata.get("DNS_PROXY_ADDR", f"localhost:{DEFAULT_DNS_PORT}")
        addresses: tuple[Endpoint, ...] = ()
        try:
            addresses = dns_addresses(dns)
        except ValueError as exc:
            self.problems.append(f"invalid env var ISTIO_META_DNS_PROXY_ADDR={dns} ({exc})")
        return {
            "proxy_metadata": metadata,
            "node_metadata": json_metadata(self.env, self.warnings),
            "istio_version": metadata.get("ISTIO_VERSION", "unknown"),
            "dns_enabled": dns_capture(metadata.get("DNS_CAPTURE", "true"), self.warnings),
            "dns_addresses": addresses,
            "admin_port": self.proxy_config.admin_port or DEFAULT_ADMIN_PORT,
            "stats_port": self.proxy_config.stats_port or DEFAULT_STATS_PORT,
            "warnings": tuple(self.warnings),
        }

    def limits(self, mode: ProxyMode, cpus: int) -> dict[str, object]:
        """Work out mark, drain deadline and number of workers."""
        mark = DEFAULT_PACKET_MARK if mode is ProxyMode.SHARED else None
        grace = self.get("TERMINATION_GRACE_PERIOD_SECONDS", optional(integer(0)), "")
        deadline = self.get("CONNECTION_TERMINATION_DEADLINE", optional(seconds), "")
        return {
            "packet_mark": self.get("PACKET_MARK", optional(integer(0, MARK_MAX)), str(mark or "")),
            "drain_seconds": deadline or drain_seconds(grace),
            "worker_threads": self._workers(cpus),
        }

    def check(self, config: Config) -> None:
        """Complain about settings that contradict each other."""
        if config.mode is ProxyMode.SHARED and not config.packet_mark:
            self.complain("PACKET_MARK", "shared mode marks its packets; remove it or use 1337")
        if config.mode is ProxyMode.DEDICATED and config.workload_info is None:
            self.complain("PROXY_WORKLOAD_INFO", "dedicated mode needs it; write ns/name/account")
        if config.local_xds is not None and config.local_xds_path is not None:
            self.complain("LOCAL_XDS_PATH", "LOCAL_XDS is set too; remove one of them")
        if config.connection_window_bytes < config.stream_window_bytes:
            reason = "below HTTP2_STREAM_WINDOW_SIZE; raise it, or one stream starves the rest"
            self.complain("HTTP2_CONNECTION_WINDOW_SIZE", reason)
        if not config.proxy_enabled and not config.dns_enabled:
            self.complain("ENABLE_PROXY", "the DNS proxy is off as well; turn one of them on")
        if config.xds_on_demand and config.dns_enabled:
            self.complain("XDS_ON_DEMAND", "not with DNS; set ISTIO_META_DNS_CAPTURE=false")
        if config.worker_threads > 1 and not config.inpod_port_reuse:
            reason = "several workers share their ports; remove it or use ZTUNNEL_WORKER_THREADS=1"
            self.complain("INPOD_PORT_REUSE", reason)
        ports = (config.admin_port, config.stats_port, READINESS_PORT)
        if len(set(ports)) < len(ports):
            self.complain("PROXY_CONFIG", f"ports {ports} are not distinct; change one")

    def _merged_proxy_config(self) -> ProxyConfig:
        try:
            mesh = ProxyConfig.parse_mesh(self.read_file(MESH_FILE))
        except FileNotFoundError:
            mesh = ProxyConfig()
        except (OSError, ValueError) as exc:
            self.problems.append(f"invalid file {MESH_FILE} ({exc})")
            mesh = ProxyConfig()
        return mesh.merged(self.get("PROXY_CONFIG", ProxyConfig.parse, ""))

    def _workers(self, cpus: int) -> int:
        wanted = self.get("ZTUNNEL_WORKER_THREADS", workers, "")
        if not wanted and self.proxy_config.concurrency is not None:
            wanted = str(self.proxy_config.concurrency)
        return worker_count(wanted, cpus)

    def _token(self) -> Source | None:
        text = self.env.get("AUTH_TOKEN", TOKEN_FILE)
        try:
            self.read_file(text)
        except (PermissionError, UnicodeDecodeError):
            pass  # it is there; the certificate request will say what is wrong with it
        except (OSError, ValueError):
            literal = Source(SourceKind.LITERAL, text)
            return literal if "AUTH_TOKEN" in self.env and text else None
        return Source(SourceKind.FILE, text)

    def _headers(self, prefix: str) -> tuple[tuple[str, str], ...]:
        headers = []
        for name in sorted(name for name in self.env if name.startswith(prefix)):
            try:
                headers.append(header(name.removeprefix(prefix), self.env[name]))
            except ValueError as exc:
                self.complain(name, str(exc))
        return tuple(headers)

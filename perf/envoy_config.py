"""What Envoy is told: an HBONE client and server that do what a node proxy does for two pods.

Same windows, certificates and redirection as ours; access log (JSON, to a file) and stats are on.
It dials what the application meant (the original destination), checks the server's SPIFFE name, and
carries everything that is not for the server's pod through as it came.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cni.redirect.plan import OUTBOUND_PORT, PROXY_MARK, TUNNEL_PORT
from perf.track import SERVER_IP

Json = dict[str, Any]
API = "type.googleapis.com/envoy."
HTTP_OPTIONS = "extensions.upstreams.http.v3.HttpProtocolOptions"
MIB = 1 << 20
WINDOWS = {"initial_stream_window_size": 4 * MIB, "initial_connection_window_size": 16 * MIB}
SESSIONS = 16  # kept by a client that resumes
NO_LIMIT = 1_000_000
SO_MARK = 36
SOL_SOCKET = 1
LOG_FIELDS = {
    "time": "%START_TIME%",
    "src.addr": "%DOWNSTREAM_REMOTE_ADDRESS%",
    "dst.addr": "%DOWNSTREAM_LOCAL_ADDRESS%",
    "dst.hbone_addr": "%UPSTREAM_HOST%",
    "peer": "%DOWNSTREAM_PEER_URI_SAN%",
    "bytes_sent": "%BYTES_SENT%",
    "bytes_recv": "%BYTES_RECEIVED%",
    "duration": "%DURATION%",
    "flags": "%RESPONSE_FLAGS%",
    "error": "%CONNECTION_TERMINATION_DETAILS%",
}


@dataclass(frozen=True, slots=True)
class Files:
    """Certificate chain, key and roots as Envoy reads them; `log` is what it writes."""

    chain: Path
    key: Path
    roots: Path
    log: Path


def client(
    files: Files, *, server_name: str, tunnel_per_connection: bool, resumption: bool
) -> Json:
    """Capture on 15001; tunnel what is for the server's pod, pass on the rest."""
    tunnelled = {
        "filter_chain_match": {
            "prefix_ranges": [{"address_prefix": str(SERVER_IP), "prefix_len": 32}]
        },
        "filters": [_tcp_proxy(files, "hbone", hostname="%DOWNSTREAM_LOCAL_ADDRESS%")],
    }
    listener = {
        "address": _address("0.0.0.0", OUTBOUND_PORT),
        "listener_filters": [
            _extension(
                "envoy.filters.listener.original_dst",
                "extensions.filters.listener.original_dst.v3.OriginalDst",
            )
        ],
        "filter_chains": [tunnelled],
        "default_filter_chain": {"filters": [_tcp_proxy(files, "passthrough")]},
    }
    clusters = [
        _hbone_cluster(
            files,
            server_name,
            tunnel_per_connection=tunnel_per_connection,
            resumption=resumption,
        ),
        _cluster("passthrough", type="ORIGINAL_DST", lb_policy="CLUSTER_PROVIDED"),
    ]
    return _bootstrap(files, listener, clusters)


def server(files: Files, *, client_prefix: str, resumption: bool) -> Json:
    """Terminate CONNECT on 15008 and dial the authority."""
    connect = {
        "match": {"connect_matcher": {}},
        "route": {
            "cluster": "authority",
            "timeout": "0s",
            "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}],
        },
    }
    manager = _extension(
        "envoy.filters.network.http_connection_manager",
        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="inbound",
        codec_type="HTTP2",
        http2_protocol_options={"allow_connect": True, **WINDOWS},
        upgrade_configs=[{"upgrade_type": "CONNECT"}],
        stream_idle_timeout="0s",
        generate_request_id=False,
        route_config={"virtual_hosts": [{"name": "any", "domains": ["*"], "routes": [connect]}]},
        http_filters=[
            _extension("envoy.filters.http.router", "extensions.filters.http.router.v3.Router")
        ],
        access_log=[_access_log(files)],
    )
    san = {"san_type": "URI", "matcher": {"prefix": client_prefix}}
    listener = {
        "address": _address("0.0.0.0", TUNNEL_PORT),
        "filter_chains": [
            {
                "transport_socket": _tls(
                    files,
                    "DownstreamTlsContext",
                    san,
                    require_client_certificate=True,
                    disable_stateless_session_resumption=not resumption,
                ),
                "filters": [manager],
            }
        ],
    }
    by_authority = {"use_http_header": True, "http_header_name": ":authority"}
    authority = _cluster(
        "authority",
        type="ORIGINAL_DST",
        lb_policy="CLUSTER_PROVIDED",
        original_dst_lb_config=by_authority,
    )
    return _bootstrap(files, listener, [authority])


def _bootstrap(files: Files, listener: Json, clusters: list[Json]) -> Json:
    return {
        "admin": {"address": {"pipe": {"path": str(files.log.with_suffix(".admin"))}}},
        "static_resources": {"listeners": [{"name": "in", **listener}], "clusters": clusters},
    }


def _tcp_proxy(files: Files, cluster: str, *, hostname: str = "") -> Json:
    return _extension(
        "envoy.filters.network.tcp_proxy",
        "extensions.filters.network.tcp_proxy.v3.TcpProxy",
        stat_prefix=cluster,
        cluster=cluster,
        idle_timeout="0s",
        access_log=[_access_log(files)],
        **({"tunneling_config": {"hostname": hostname}} if hostname else {}),
    )


def _hbone_cluster(
    files: Files, server_name: str, *, tunnel_per_connection: bool, resumption: bool
) -> Json:
    endpoint = {"endpoint": {"address": _address(str(SERVER_IP), TUNNEL_PORT)}}
    options: Json = {"explicit_http_config": {"http2_protocol_options": WINDOWS}}
    if tunnel_per_connection:
        options["common_http_protocol_options"] = {"max_requests_per_connection": 1}
    san = {"san_type": "URI", "matcher": {"exact": server_name}}
    return _cluster(
        "hbone",
        type="STATIC",
        load_assignment={"cluster_name": "hbone", "endpoints": [{"lb_endpoints": [endpoint]}]},
        transport_socket=_tls(
            files, "UpstreamTlsContext", san, max_session_keys=SESSIONS if resumption else 0
        ),
        typed_extension_protocol_options={
            f"envoy.{HTTP_OPTIONS}": {"@type": API + HTTP_OPTIONS, **options}
        },
    )


def _cluster(name: str, **fields: object) -> Json:
    limits = ("max_connections", "max_pending_requests", "max_requests")
    mark = {
        "level": SOL_SOCKET,
        "name": SO_MARK,
        "int_value": PROXY_MARK,
        "state": "STATE_PREBIND",
    }
    return {
        "name": name,
        "connect_timeout": "5s",
        "circuit_breakers": {"thresholds": [dict.fromkeys(limits, NO_LIMIT)]},
        # As ours is: what the proxy itself sends must not be captured again.
        "upstream_bind_config": {"socket_options": [mark]},
        **fields,
    }


def _tls(files: Files, context: str, san: Json, **more: object) -> Json:
    only = {
        "tls_minimum_protocol_version": "TLSv1_3",
        "tls_maximum_protocol_version": "TLSv1_3",
        "ecdh_curves": ["X25519", "P-256", "P-384"],  # as all others; by default it is post-quantum
    }
    pair = {
        "certificate_chain": {"filename": str(files.chain)},
        "private_key": {"filename": str(files.key)},
    }
    trust = {"trusted_ca": {"filename": str(files.roots)}, "match_typed_subject_alt_names": [san]}
    return _extension(
        "envoy.transport_sockets.tls",
        f"extensions.transport_sockets.tls.v3.{context}",
        common_tls_context={
            "tls_params": only,
            "alpn_protocols": ["h2"],
            "tls_certificates": [pair],
            "validation_context": trust,
        },
        **more,
    )


def _access_log(files: Files) -> Json:
    return _extension(
        "envoy.access_loggers.file",
        "extensions.access_loggers.file.v3.FileAccessLog",
        path=str(files.log),
        log_format={"json_format": LOG_FIELDS},
    )


def _address(host: str, port: int) -> Json:
    return {"socket_address": {"address": host, "port_value": port}}


def _extension(name: str, message: str, **fields: object) -> Json:
    return {"name": name, "typed_config": {"@type": API + message, **fields}}

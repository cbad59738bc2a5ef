"""What Envoy is told: bootstrap configurations, made of plain dicts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

API = "type.googleapis.com/envoy"
HTTP_OPTIONS = "extensions.upstreams.http.v3.HttpProtocolOptions"
MIB = 1024 * 1024
# The windows of ztunnel (dataplane.md), so that neither peer is the narrow one.
STREAM_WINDOW_BYTES = 4 * MIB
CONNECTION_WINDOW_BYTES = 16 * MIB
CONNECT_SECONDS = 2
WAYPOINT_HEADER = "x-waypoint"

ACCESS_LOG_FIELDS = {
    "peer": "%DOWNSTREAM_PEER_URI_SAN%",
    "upstream": "%UPSTREAM_HOST%",
    "flags": "%RESPONSE_FLAGS%",
    "received": "%BYTES_RECEIVED%",
    "sent": "%BYTES_SENT%",
    "details": "%CONNECTION_TERMINATION_DETAILS%",
    "tls_failure": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
}
REQUEST_LOG_FIELDS = {
    "method": "%REQ(:METHOD)%",
    "authority": "%REQ(:AUTHORITY)%",
    "baggage": "%REQ(BAGGAGE)%",
    "traceparent": "%REQ(TRACEPARENT)%",
    "forwarded": "%REQ(FORWARDED)%",
    "code": "%RESPONSE_CODE%",
}

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Credentials:
    """What one end of mTLS shows and trusts, as PEM.

    `chain` is the leaf and its intermediates, `roots` are the certificates it trusts.
    """

    chain: bytes
    key: bytes
    roots: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class HboneClient:
    """Plain TCP in; each connection becomes a CONNECT to `authority` over HBONE.

    `headers` are sent with every CONNECT. The peer must be `expected_identity` (a SPIFFE URI), or
    anyone with a certificate from our roots if that is None. Port 0 lets the kernel choose.
    """

    credentials: Credentials
    hbone_port: int
    authority: str
    hbone_address: str = "127.0.0.1"
    expected_identity: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    listen_address: str = "127.0.0.1"
    listen_port: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HboneServer:
    """HBONE in; each CONNECT is dialled at its authority, which must be an address and port.

    Clients need a certificate from our roots whose SPIFFE URI begins with `accepted_identities`.
    Port 0 lets the kernel choose.
    """

    credentials: Credentials
    accepted_identities: str = "spiffe://"
    listen_address: str = "127.0.0.1"
    listen_port: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Waypoint:
    """HBONE in, the content looked at, HBONE out: each CONNECT becomes one to `authority`.

    With `speaks_http` the content is HTTP, and answers get the header WAYPOINT_HEADER; without, it
    is any bytes. Clients are accepted as by `HboneServer`.
    """

    credentials: Credentials
    hbone_address: str
    authority: str
    expected_identity: str
    speaks_http: bool
    hbone_port: int = 15008
    accepted_identities: str = "spiffe://"
    listen_address: str = "0.0.0.0"
    listen_port: int = 15008


EnvoyConfig = HboneClient | HboneServer | Waypoint


def bootstrap(config: EnvoyConfig, folder: Path) -> Json:
    """Render all of Envoy's configuration; write the certificates it names into `folder`."""
    files = _write_credentials(config.credentials, folder)
    inner: list[Json] = []
    match config:
        case HboneClient():
            chain, clusters = _client_chain(config, folder), [_hbone_cluster(config, files)]
        case HboneServer():
            chain, clusters = _server_chain(config, folder, files), [_authority_cluster()]
        case _:
            chain = _server_chain(config, folder, files)
            inner = _inside_waypoint(config)
            clusters = [
                _internal_cluster("next", "content"),
                _internal_cluster("far", "out"),
                {**_hbone_cluster(config, files), "name": "hbone"},
            ]
    listener = {
        "name": "in",
        "address": _address(config.listen_address, config.listen_port),
        "filter_chains": [chain],
    }
    return {
        "admin": {"address": {"pipe": {"path": str(folder / "admin.sock")}}},
        "bootstrap_extensions": [
            _extension(
                "envoy.bootstrap.internal_listener",
                "extensions.bootstrap.internal_listener.v3.InternalListener",
            )
        ],
        "static_resources": {"listeners": [listener, *inner], "clusters": clusters},
    }


def _inside_waypoint(config: Waypoint) -> list[Json]:
    """Make the listener that looks at what was in the tunnel, and the one that opens the next."""
    look = _look_at_http() if config.speaks_http else _tcp_proxy("content", "far")
    tunnel = {"hostname": config.authority}
    return [
        {"name": "content", "internal_listener": {}, "filter_chains": [{"filters": [look]}]},
        {
            "name": "out",
            "internal_listener": {},
            "filter_chains": [
                {"filters": [_tcp_proxy("out", "hbone", tunneling_config=tunnel)]},
            ],
        },
    ]


def _look_at_http() -> Json:
    route = {"match": {"prefix": "/"}, "route": {"cluster": "far", "timeout": "0s"}}
    return _extension(
        "envoy.filters.network.http_connection_manager",
        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="content",
        route_config={
            "response_headers_to_add": [{"header": {"key": WAYPOINT_HEADER, "value": "seen"}}],
            "virtual_hosts": [{"name": "any", "domains": ["*"], "routes": [route]}],
        },
        http_filters=[_router()],
    )


def _internal_cluster(name: str, listener: str) -> Json:
    """Make a cluster that leads to another listener of the same Envoy."""
    address = {"envoy_internal_address": {"server_listener_name": listener}}
    raw = _extension(
        "envoy.transport_sockets.raw_buffer",
        "extensions.transport_sockets.raw_buffer.v3.RawBuffer",
    )
    return {
        "name": name,
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
        "transport_socket": _extension(
            "envoy.transport_sockets.internal_upstream",
            "extensions.transport_sockets.internal_upstream.v3.InternalUpstreamTransport",
            transport_socket=raw,
        ),
    }


def _client_chain(config: HboneClient, folder: Path) -> Json:
    headers = [{"header": {"key": key, "value": value}} for key, value in config.headers]
    proxy = _tcp_proxy(
        "out",
        "next",
        tunneling_config={"hostname": config.authority, "headers_to_add": headers},
        access_log=[_access_log(folder, ACCESS_LOG_FIELDS)],
    )
    return {"filters": [proxy]}


def _tcp_proxy(name: str, cluster: str, **fields: object) -> Json:
    return _extension(
        "envoy.filters.network.tcp_proxy",
        "extensions.filters.network.tcp_proxy.v3.TcpProxy",
        stat_prefix=name,
        cluster=cluster,
        idle_timeout="0s",
        **fields,
    )


def _hbone_cluster(config: HboneClient | Waypoint, files: Json) -> Json:
    trust: Json = {"trusted_ca": files["roots"]}
    if config.expected_identity is not None:
        trust["match_typed_subject_alt_names"] = [_uri(exact=config.expected_identity)]
    endpoint = {"address": _address(config.hbone_address, config.hbone_port)}
    return {
        "name": "next",
        "type": "STATIC",
        "connect_timeout": f"{CONNECT_SECONDS}s",
        "load_assignment": {
            "cluster_name": "next",
            "endpoints": [{"lb_endpoints": [{"endpoint": endpoint}]}],
        },
        "typed_extension_protocol_options": {
            f"envoy.{HTTP_OPTIONS}": {
                "@type": f"{API}.{HTTP_OPTIONS}",
                "explicit_http_config": {"http2_protocol_options": _http2()},
            }
        },
        "transport_socket": _tls("UpstreamTlsContext", files, trust),
    }


def _server_chain(config: HboneServer | Waypoint, folder: Path, files: Json) -> Json:
    trust = {
        "trusted_ca": files["roots"],
        "match_typed_subject_alt_names": [_uri(prefix=config.accepted_identities)],
    }
    connect = {
        "match": {"connect_matcher": {}},
        "route": {
            "cluster": "next",
            "timeout": "0s",
            "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}],
        },
    }
    manager = _extension(
        "envoy.filters.network.http_connection_manager",
        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="in",
        codec_type="HTTP2",
        http2_protocol_options=_http2(),
        upgrade_configs=[{"upgrade_type": "CONNECT"}],
        stream_idle_timeout="0s",
        route_config={"virtual_hosts": [{"name": "any", "domains": ["*"], "routes": [connect]}]},
        http_filters=[_router()],
        access_log=[_access_log(folder, ACCESS_LOG_FIELDS | REQUEST_LOG_FIELDS)],
    )
    tls = _tls("DownstreamTlsContext", files, trust, require_client_certificate=True)
    return {"transport_socket": tls, "filters": [manager]}


def _router() -> Json:
    return _extension("envoy.filters.http.router", "extensions.filters.http.router.v3.Router")


def _authority_cluster() -> Json:
    return {
        "name": "next",
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": f"{CONNECT_SECONDS}s",
        "original_dst_lb_config": {"use_http_header": True, "http_header_name": ":authority"},
    }


def _http2() -> Json:
    return {
        "allow_connect": True,
        "initial_stream_window_size": STREAM_WINDOW_BYTES,
        "initial_connection_window_size": CONNECTION_WINDOW_BYTES,
    }


def _tls(context: str, files: Json, trust: Json, **more: object) -> Json:
    return _extension(
        "envoy.transport_sockets.tls",
        f"extensions.transport_sockets.tls.v3.{context}",
        common_tls_context={
            # Both ends of the range: a client's highest version would otherwise stay at 1.2.
            "tls_params": {
                "tls_minimum_protocol_version": "TLSv1_3",
                "tls_maximum_protocol_version": "TLSv1_3",
            },
            "alpn_protocols": ["h2"],
            "tls_certificates": [
                {"certificate_chain": files["chain"], "private_key": files["key"]}
            ],
            "validation_context": trust,
        },
        **more,
    )


def _access_log(folder: Path, fields: dict[str, str]) -> Json:
    return _extension(
        "envoy.access_loggers.file",
        "extensions.access_loggers.file.v3.FileAccessLog",
        path=str(folder / "access.log"),
        log_format={"json_format": fields},
    )


def _uri(**matcher: str) -> Json:
    return {"san_type": "URI", "matcher": matcher}


def _address(host: str, port: int) -> Json:
    return {"socket_address": {"address": host, "port_value": port}}


def _extension(name: str, message: str, **fields: object) -> Json:
    return {"name": name, "typed_config": {"@type": f"{API}.{message}", **fields}}


def _write_credentials(credentials: Credentials, folder: Path) -> Json:
    """Give, for chain, key and roots, how Envoy is told of the file."""
    files: Json = {}
    for name in ("chain", "key", "roots"):
        path = folder / f"{name}.pem"
        path.touch(mode=0o600)
        path.write_bytes(getattr(credentials, name))
        files[name] = {"filename": str(path)}
    return files

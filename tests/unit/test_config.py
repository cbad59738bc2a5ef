from __future__ import annotations

import contextlib
import json
import re
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from ztunnel.config import MESH_FILE, ROOT_FILE, TOKEN_FILE, Config
from ztunnel.errors import ConfigError
from ztunnel.model.network import Endpoint
from ztunnel.model.settings import Balancing, ProxyMode, ServerUrl, Source, SourceKind, WorkloadInfo

LINE = re.compile(r"invalid (env var [^ =]+=.*|file \S+) \(.+\)")


def config(env: dict[str, str] | None = None, files: dict[str, str] | None = None) -> Config:
    known = files or {}

    def read(path: str) -> str:
        if path not in known:
            raise FileNotFoundError(path)
        return known[path]

    return Config.from_env(env or {}, read_file=read, cpus=8)


def problems(env: dict[str, str], files: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config(env, files)
    lines = str(caught.value).split("\n")
    assert all(LINE.fullmatch(line) for line in lines)
    return lines


@pytest.mark.parametrize(
    ("field", "default", "name", "good", "value", "bad"),
    [
        ("proxy_enabled", True, "ENABLE_PROXY", "false", False, "False"),
        ("mode", ProxyMode.SHARED, "PROXY_MODE", "shared", ProxyMode.SHARED, "Shared"),
        ("node_name", None, "NODE_NAME", "node-a", "node-a", None),
        ("network", "", "NETWORK", "net1", "net1", None),
        ("cluster_id", "Kubernetes", "CLUSTER_ID", "lab", "lab", None),
        ("cluster_domain", "cluster.local", "CLUSTER_DOMAIN", "c.org", "c.org", None),
        ("pod_name", None, "POD_NAME", "zt-1", "zt-1", None),
        ("pod_namespace", None, "POD_NAMESPACE", "sys", "sys", None),
        ("service_account", None, "SERVICE_ACCOUNT", "zt", "zt", None),
        ("instance_ip", None, "INSTANCE_IP", "192.0.2.1", "192.0.2.1", None),
        ("trust_domain", "cluster.local", "TRUST_DOMAIN", "td", "td", None),
        ("alternative_xds_hostname", None, "ALT_XDS_HOSTNAME", "x.org", "x.org", None),
        ("alternative_ca_hostname", None, "ALT_CA_HOSTNAME", "x.org", "x.org", None),
        ("local_xds_path", None, "LOCAL_XDS_PATH", "/m.yaml", Path("/m.yaml"), None),
        ("local_xds", None, "LOCAL_XDS", "{}", "{}", None),
        ("preferred_service_namespace", None, "PREFERED_SERVICE_NAMESPACE", "a", "a", None),
        ("secret_ttl_seconds", 86400.0, "SECRET_TTL", "1h30m", 5400.0, "soon"),
        ("pool_max_streams", 100, "POOL_MAX_STREAMS_PER_CONNECTION", "7", 7, "0"),
        ("pool_unused_release_seconds", 300.0, "POOL_UNUSED_RELEASE_TIMEOUT", "9", 9.0, "-1s"),
        ("stream_window_bytes", 4194304, "HTTP2_STREAM_WINDOW_SIZE", "65535", 65535, "2147483648"),
        (
            "connection_window_bytes", 16777216,
            "HTTP2_CONNECTION_WINDOW_SIZE", "2147483647", 2147483647, "2147483648",
        ),
        ("frame_bytes", 1048576, "HTTP2_FRAME_SIZE", "16384", 16384, "16383"),
        ("original_source", None, "ENABLE_ORIG_SRC", "false", False, "maybe"),
        ("keepalive_enabled", True, "KEEPALIVE_ENABLED", "false", False, "0"),
        ("keepalive_time_seconds", 180.0, "KEEPALIVE_TIME", "100ms", 0.1, "0s"),
        ("keepalive_interval_seconds", 180.0, "KEEPALIVE_INTERVAL", "2m", 120.0, "2 m"),
        ("keepalive_retries", 9, "KEEPALIVE_RETRIES", "3", 3, "128"),
        ("user_timeout_enabled", False, "USER_TIMEOUT_ENABLED", "true", True, ""),
        (
            "inpod_socket", Path("/var/run/ztunnel/ztunnel.sock"),
            "INPOD_UDS", "/tmp/z.sock", Path("/tmp/z.sock"), None,
        ),
        ("inpod_port_reuse", True, "INPOD_PORT_REUSE", "false", False, "no"),
        ("ipv6_enabled", True, "IPV6_ENABLED", "false", False, "off"),
        ("socks5_enabled", False, "UNSTABLE_ENABLE_SOCKS5", "true", True, "1"),
        ("localhost_app_tunnel", True, "LOCALHOST_APP_TUNNEL", "false", False, "TRUE"),
        ("baggage_enabled", True, "ENABLE_RESPONSE_BAGGAGE", "false", False, "x"),
        ("crl_path", None, "CRL_PATH", "/crl.pem", Path("/crl.pem"), None),
        ("tls12_enabled", False, "TLS12_ENABLED", "true", True, None),
        ("post_quantum_only", False, "COMPLIANCE_POLICY", "pqc", True, "fips-140-2"),
        ("policy_info_logging", False, "AUTHZ_POLICY_INFO_LOGGING", "true", True, None),
        ("log_filter", "info", "RUST_LOG", "access=off", "access=off", None),
        ("log_json", False, "LOG_FORMAT", "json", True, None),
        ("packet_mark", 1337, "PACKET_MARK", "4294967295", 4294967295, "4294967296"),
        ("drain_seconds", 5.0, "CONNECTION_TERMINATION_DEADLINE", "7s", 7.0, "x"),
        ("drain_seconds", 5.0, "TERMINATION_GRACE_PERIOD_SECONDS", "30", 25.0, "30s"),
        ("worker_threads", 1, "ZTUNNEL_WORKER_THREADS", "5", 5, "120%"),
        ("max_handshakes", 256, "ZTUNNEL_MAX_HANDSHAKES", "1", 1, "0"),
        ("max_connections_per_pod", 50000, "ZTUNNEL_MAX_CONNECTIONS_PER_POD", "0", 0, "-1"),
        ("tls_handshake_seconds", 10.0, "ZTUNNEL_TLS_HANDSHAKE_TIMEOUT", "3s", 3.0, "3x"),
        ("connect_response_seconds", 30.0, "ZTUNNEL_CONNECT_RESPONSE_TIMEOUT", "3s", 3.0, ""),
        ("policy_wait_seconds", 5.0, "ZTUNNEL_POLICY_WAIT", "1s", 1.0, "inf"),
        ("own_records", True, "ZTUNNEL_OWN_RECORDS", "false", False, "nope"),
        ("tls_resumption", False, "ZTUNNEL_TLS_RESUMPTION", "true", True, "on"),
        ("balancing", "random", "ZTUNNEL_LOAD_BALANCING", "least-connections",
         Balancing.LEAST_CONNECTIONS, "least"),
        ("trust_domain_aliases", (), "TRUST_DOMAINS", "a.b,C", ("a.b", "C"), "a/b"),
        ("fake_ca", False, "FAKE_CA", "true", True, "True"),
    ],
)  # fmt: skip
def test_a_variable_has_its_default_takes_good_and_names_bad(
    field: str, default: Any, name: str, good: str, value: Any, bad: str | None
) -> None:
    assert getattr(config(), field) == default
    assert getattr(config({name: good}), field) == value
    if bad is not None:
        (line,) = (line for line in problems({name: bad}) if f"{name}={bad} (" in line)
        assert "; " in line  # how to mend it


def test_defaults_without_any_environment_equal_the_plain_object() -> None:
    assert config() == Config()


def test_settings_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Config().node_name = "x"  # type: ignore[misc]


def test_all_problems_come_together() -> None:
    env = {"PROXY_MODE": "x", "KEEPALIVE_TIME": "x", "ENABLE_PROXY": "x", "FAKE_CA": "x"}
    assert {line.split("=")[0].split()[-1] for line in problems(env)} == set(env)


@pytest.mark.parametrize(
    ("env", "xds", "ca"),
    [
        ({}, "https://localhost:15012", "https://localhost:15012"),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
            "https://istiod.istio-system.svc:15012", "https://istiod.istio-system.svc:15012",
        ),
        ({"PROXY_CONFIG": "discoveryAddress: d:1"}, "https://d:1", "https://localhost:15012"),
        ({"XDS_ADDRESS": "x:2", "CA_ADDRESS": "https://c:3"}, "https://x:2", "https://c:3"),
        ({"XDS_ADDRESS": "", "FAKE_CA": "true"}, "None", "None"),
        ({"XDS_ADDRESS": "[2001:db8::1]:4"}, "https://[2001:db8::1]:4", "https://localhost:15012"),
    ],
)  # fmt: skip
def test_where_the_control_plane_is(env: dict[str, str], xds: str, ca: str) -> None:
    made = config(env)
    assert (str(made.xds_address), str(made.ca_address)) == (xds, ca)


def test_a_fake_ca_may_name_its_file() -> None:
    made = config({"FAKE_CA": "/tmp/ca.pem"})
    assert (made.fake_ca, made.fake_ca_path) == (True, Path("/tmp/ca.pem"))


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({"PROXY_MODE": "dedicated"}, "PROXY_WORKLOAD_INFO"),
        ({"PACKET_MARK": "0"}, "PACKET_MARK"),
        ({"LOCAL_XDS": "{}", "LOCAL_XDS_PATH": "/x"}, "LOCAL_XDS_PATH"),
        ({"HTTP2_CONNECTION_WINDOW_SIZE": "1000000"}, "HTTP2_CONNECTION_WINDOW_SIZE"),
        ({"ENABLE_PROXY": "false", "ISTIO_META_DNS_CAPTURE": "false"}, "ENABLE_PROXY"),
        ({"XDS_ON_DEMAND": "true"}, "XDS_ON_DEMAND"),
        ({"CA_ADDRESS": ""}, "CA_ADDRESS"),
        ({"XDS_ADDRESS": "http://x:1"}, "XDS_ADDRESS"),
        ({"XDS_ROOT_CA": ""}, "XDS_ROOT_CA"),
        ({"PROXY_CONFIG": "proxyAdminPort: 15020"}, "PROXY_CONFIG"),
        ({"PROXY_CONFIG": "discoveryAddress: http://x"}, "PROXY_CONFIG"),
        ({"PROXY_CONFIG": "]"}, "PROXY_CONFIG"),
        ({"ISTIO_META_DNS_PROXY_ADDR": "there"}, "ISTIO_META_DNS_PROXY_ADDR"),
        ({"XDS_HEADER_$": "c"}, "XDS_HEADER_$"),
    ],
)
def test_settings_that_contradict_or_make_no_sense_are_refused(
    env: dict[str, str], name: str
) -> None:
    (line,) = problems(env)
    assert f"env var {name}" in line


def test_a_dedicated_proxy_knows_its_workload_and_needs_no_mark() -> None:
    made = config({"PROXY_MODE": "dedicated", "PROXY_WORKLOAD_INFO": "shop/web-0/web"})
    assert made.workload_info == WorkloadInfo("shop", "web-0", "web")  # type: ignore[arg-type]
    assert made.packet_mark is None


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, True),
        ({"ISTIO_META_DNS_CAPTURE": "TRUE"}, True),
        ({"ISTIO_META_DNS_CAPTURE": "0"}, False),
        ({"PROXY_CONFIG": "proxyMetadata: {ISTIO_META_DNS_CAPTURE: 'false'}"}, False),
        ({"PROXY_CONFIG": "proxyMetadata: {DNS_CAPTURE: false}"}, False),
    ],
)
def test_dns_is_on_unless_told_otherwise(env: dict[str, str], *, expected: bool) -> None:
    assert config(env).dns_enabled is expected


@pytest.mark.parametrize(
    ("text", "warned"),
    [
        ("True", []),
        ("FALSE", []),
        ("xx", ["ISTIO_META_DNS_CAPTURE: 'xx' is neither true nor false, so DNS is off"]),
        ("", ["ISTIO_META_DNS_CAPTURE: '' is neither true nor false, so DNS is off"]),
    ],
)
def test_a_doubtful_word_about_dns_is_warned_about(text: str, warned: list[str]) -> None:
    assert list(config({"ISTIO_META_DNS_CAPTURE": text}).warnings) == warned


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("localhost:53", ["127.0.0.1:53", "[::1]:53"]),
        ("192.0.2.1:99", ["192.0.2.1:99"]),
        ("[::1]:99", ["[::1]:99"]),
    ],
)
def test_where_dns_listens(text: str, addresses: list[str]) -> None:
    made = config({"ISTIO_META_DNS_PROXY_ADDR": text})
    assert made.dns_addresses == tuple(map(Endpoint.parse, addresses))


def test_later_sources_win_and_metadata_is_merged() -> None:
    mesh = """
defaultConfig:
  discoveryAddress: mesh:1
  statsPort: 9
  concurrency: 3
  proxyMetadata: {A: mesh, B: mesh, ISTIO_META_C: mesh}
"""
    own = json.dumps({"discoveryAddress": "own:2", "proxyMetadata": {"B": "own", "C": "own"}})
    made = config({"PROXY_CONFIG": own, "ISTIO_META_C": "env"}, {MESH_FILE: mesh})
    assert made.xds_address == ServerUrl("own", 2)
    assert (made.stats_port, made.worker_threads) == (9, 3)
    assert made.proxy_metadata == {"A": "mesh", "B": "own", "C": "env"}


def test_processes_are_not_guessed_from_the_cores() -> None:
    guesses = {"ZTUNNEL_CPU_LIMIT": "64", "ZTUNNEL_RESOURCE_CPU_REQUEST": "4"}  # as the chart sets
    assert config(guesses).worker_threads == 1


def test_several_workers_need_shared_ports() -> None:
    alone = {"INPOD_PORT_REUSE": "false"}
    assert not config(alone).inpod_port_reuse
    (line,) = problems({**alone, "ZTUNNEL_WORKER_THREADS": "2"})
    assert "ZTUNNEL_WORKER_THREADS=1" in line


def test_a_broken_mesh_file_is_named() -> None:
    (line,) = problems({}, {MESH_FILE: "defaultConfig: 3"})
    assert line.startswith(f"invalid file {MESH_FILE} (")


def test_metadata_names_cluster_and_version_first() -> None:
    made = config(
        {"CLUSTER_ID": "a", "ISTIO_META_CLUSTER_ID": "b", "ISTIO_META_ISTIO_VERSION": "1"}
    )
    assert (made.cluster_id, made.istio_version) == ("b", "1")


def test_json_metadata_is_parsed_and_nonsense_is_skipped_with_a_warning() -> None:
    made = config({"ISTIO_METAJSON_L": '{"a": [1]}', "ISTIO_METAJSON_BAD": "{"})
    assert made.node_metadata == {"L": {"a": [1]}}
    assert [warning.split()[0] for warning in made.warnings] == ["ISTIO_METAJSON_BAD"]


@pytest.mark.parametrize(
    ("env", "files", "token"),
    [
        ({}, {}, None),
        ({}, {TOKEN_FILE: "t"}, Source(SourceKind.FILE, TOKEN_FILE)),
        ({"AUTH_TOKEN": "/t"}, {"/t": "x"}, Source(SourceKind.FILE, "/t")),
        ({"AUTH_TOKEN": "aa.bb.cc"}, {}, Source(SourceKind.LITERAL, "aa.bb.cc")),
        ({"AUTH_TOKEN": ""}, {TOKEN_FILE: "t"}, None),
    ],
)
def test_where_the_token_comes_from(
    env: dict[str, str], files: dict[str, str], token: Source | None
) -> None:
    assert config(env, files).token == token


def test_a_token_file_that_may_not_be_read_is_still_a_file() -> None:
    def read(path: str) -> str:
        if path == TOKEN_FILE:
            raise PermissionError(path)
        raise FileNotFoundError(path)

    assert Config.from_env({}, read_file=read).token == Source(SourceKind.FILE, TOKEN_FILE)


def test_roots_are_files_unless_said_otherwise() -> None:
    made = config({"XDS_ROOT_CA": "SYSTEM", "CA_ROOT_CA": "-----BEGIN CERTIFICATE-----\n"})
    assert config().xds_root == Source(SourceKind.FILE, ROOT_FILE)
    assert (made.xds_root.kind, made.ca_root.kind) == (SourceKind.SYSTEM, SourceKind.LITERAL)


def test_headers_are_lower_case_and_their_values_stay_secret() -> None:
    made = config({"XDS_HEADER_X-Key": "s3cret", "CA_HEADER_A": "s3cret", "AUTH_TOKEN": "s3cret"})
    assert made.xds_headers == (("x-key", "s3cret"),)
    assert made.ca_headers == (("a", "s3cret"),)
    assert "s3cret" not in json.dumps(made.to_dump())
    assert "s3cret" not in repr(made)


def test_a_bad_header_is_named_but_not_shown() -> None:
    (line,) = problems({"CA_HEADER_A": "s3cret\n"})
    assert line.startswith("invalid env var CA_HEADER_A=<redacted> (")


def test_the_dump_has_the_shape_operators_know() -> None:
    dump = config({"SECRET_TTL": "1500ms"}).to_dump()
    assert dump["proxyMode"] == "Shared"
    assert dump["secretTtl"] == {"secs": 1, "nanos": 500_000_000}
    assert dump["windowSize"] == 4194304
    assert dump["readinessAddr"] == {"SocketAddr": "[::]:15021"}
    assert dump["adminAddr"] == {"Localhost": [True, 15000]}
    assert dump["inboundAddr"] == "[::]:15008"
    assert sorted(dump["illegalPorts"]) == [15001, 15006, 15008]
    assert dump["xdsAddress"] == "https://localhost:15012"
    assert dump["socketConfig"] == {
        "keepaliveEnabled": True,
        "keepaliveInterval": {"secs": 180, "nanos": 0},
        "keepaliveRetries": 9,
        "keepaliveTime": {"secs": 180, "nanos": 0},
        "userTimeoutEnabled": False,
    }
    without = config({"IPV6_ENABLED": "false", "UNSTABLE_ENABLE_SOCKS5": "true"}).to_dump()
    assert without["statsAddr"] == {"SocketAddr": "0.0.0.0:15020"}
    assert 15080 in without["illegalPorts"]


NAMES = [
    "KEEPALIVE_TIME", "PACKET_MARK", "PROXY_CONFIG", "XDS_ADDRESS", "CA_ROOT_CA", "AUTH_TOKEN",
    "ISTIO_META_DNS_PROXY_ADDR", "ISTIO_METAJSON_X", "XDS_HEADER_x", "FAKE_CA", "PROXY_MODE",
    "ZTUNNEL_WORKER_THREADS", "TERMINATION_GRACE_PERIOD_SECONDS", "PROXY_WORKLOAD_INFO",
]  # fmt: skip


@given(st.dictionaries(st.sampled_from(NAMES), st.text(max_size=30)))
def test_whatever_the_environment_holds_only_config_errors_come_out(env: dict[str, str]) -> None:
    with contextlib.suppress(ConfigError):
        config(env)

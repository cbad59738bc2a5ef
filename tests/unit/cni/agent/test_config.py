from __future__ import annotations

from pathlib import Path

import pytest

from cni.agent.config import AgentConfig
from cni.agent.eligibility import Eligibility
from cni.agent.overrides import ProbeStrategy, Redirecting
from ztunnel.errors import ConfigError
from ztunnel.model.network import parse_ip

NODE = {"NODE_NAME": "node-a", "AMBIENT_ENABLED": "true"}


def test_the_defaults_are_the_references_but_for_what_protects() -> None:
    config = AgentConfig.from_env(NODE)
    assert config.eligibility == Eligibility()
    assert config.redirecting == Redirecting(dns=False, ipv6=True)
    assert config.run_dir == Path("/var/run/istio-cni")
    assert config.zds_path == Path("/var/run/ztunnel/ztunnel.sock")
    assert (config.health_port, config.monitoring_port) == (8000, 15014)
    assert config.api.authority == "kubernetes.default.svc:443"
    assert config.api.tls
    assert config.api.verify
    assert config.probe_owner == "kubelet"


def test_settings_are_read() -> None:
    config = AgentConfig.from_env(
        {
            **NODE,
            "KUBERNETES_SERVICE_HOST": "fd00::1",
            "KUBERNETES_SERVICE_PORT": "6443",
            "KUBE_CA_FILE": "/ca",
            "SKIP_TLS_VERIFY": "true",
            "EXCLUDE_NAMESPACES": "kube-system, other ,",
            "SYSTEM_NAMESPACE": "mesh",
            "AMBIENT_DNS_CAPTURE": "true",
            "AMBIENT_IPV6": "false",
            "AMBIENT_ENABLEMENT_SELECTOR": "[]",
            "HOST_PROBE_SNAT_IP": "169.254.1.1",
            "AMBIENT_ENABLE_AWS_BRANCH_ENI_PROBE": "false",
            "ZTUNNEL_CNI_PROBES": "node-address",
            "ZTUNNEL_CNI_NODE_ADDRESSES": "10.0.0.1, fd00::2",
            "ZTUNNEL_CNI_PROBE_OWNER": "any",
            "ZTUNNEL_CNI_KEEP_ESTABLISHED": "true",
            "ZTUNNEL_CNI_RECONCILE_INTERVAL": "5s",
            "LOG_FORMAT": "json",
        }
    )
    assert config.api.authority == "[fd00::1]:6443"
    assert (config.api.roots, config.api.verify) == (Path("/ca"), False)
    assert config.eligibility.excluded_namespaces == {"kube-system", "other"}
    assert config.eligibility.system_namespace == "mesh"
    assert config.eligibility.enablements == ()
    redirecting = config.redirecting
    assert (redirecting.dns, redirecting.ipv6, redirecting.syn_only) == (True, False, True)
    assert redirecting.probe_sources[0] == parse_ip("169.254.1.1")
    assert redirecting.probes is ProbeStrategy.NODE_ADDRESS
    assert redirecting.node_addresses == (parse_ip("10.0.0.1"), parse_ip("fd00::2"))
    assert (config.probe_owner, config.reconcile_seconds, config.log_json) == (None, 5, True)
    assert not config.probes_branch_enis


def test_switched_off_nobody_is_in_the_mesh() -> None:
    for env in ({"NODE_NAME": "n"}, {"NODE_NAME": "n", "AMBIENT_ENABLED": "false"}):
        assert AgentConfig.from_env(env).eligibility.enablements == ()


@pytest.mark.parametrize(("text", "uid"), [("0", 0), ("1000", 1000), ("kubelet", "kubelet")])
def test_who_may_probe(text: str, uid: object) -> None:
    config = AgentConfig.from_env({**NODE, "ZTUNNEL_CNI_PROBE_OWNER": text})
    assert config.probe_owner == uid


def test_where_the_container_runtime_is_looked_for() -> None:
    def sockets(text: str | None = None) -> list[str]:
        env = {**NODE, "ZTUNNEL_CNI_HOST_ROOT": "/h"}
        more = {} if text is None else {"ZTUNNEL_CNI_CRI_SOCKET": text}
        return [str(path) for path in AgentConfig.from_env(env | more).cri_sockets]

    assert "/h/run/containerd/containerd.sock" in sockets()
    assert "/h/run/crio/crio.sock" in sockets("")
    assert sockets("/run/x.sock") == ["/run/x.sock"]
    assert sockets("none") == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AMBIENT_IPV6", "on"),
        ("AMBIENT_ENABLEMENT_SELECTOR", "{"),
        ("CNI_AGENT_RUN_DIR", "relative"),
        ("HOST_PROBE_SNAT_IP", "fd00::1"),
        ("HOST_PROBE_SNAT_IPV6", "10.0.0.1"),
        ("KUBERNETES_SERVICE_PORT", "x"),
        ("KUBERNETES_SERVICE_PROTOCOL", "ftp"),
        ("MONITORING_PORT", "70000"),
        ("ZTUNNEL_CNI_CRI_SOCKET", "unix:/run/x.sock"),
        ("ZTUNNEL_CNI_NODE_ADDRESSES", "here"),
        ("ZTUNNEL_CNI_PROBES", "magic"),
        ("ZTUNNEL_CNI_PROBE_OWNER", "4294967295"),
        ("ZTUNNEL_CNI_RECONCILE_INTERVAL", "1ms"),
    ],
)
def test_a_wrong_setting_is_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"invalid env var {name}="):
        AgentConfig.from_env({**NODE, name: value})


def test_what_may_be_chosen_is_told() -> None:
    wanted = r"invalid env var ZTUNNEL_CNI_PROBES=magic \(not one of snat, node-address, none\)"
    with pytest.raises(ConfigError, match=wanted):
        AgentConfig.from_env({**NODE, "ZTUNNEL_CNI_PROBES": "magic"})


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        AgentConfig.from_env({"AMBIENT_IPV6": "x", "MONITORING_PORT": "y"})
    lines = str(raised.value).splitlines()
    assert len(lines) == 3
    assert lines[-1].startswith("NODE_NAME is not set")

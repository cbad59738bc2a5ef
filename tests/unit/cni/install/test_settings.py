from __future__ import annotations

from pathlib import Path

import pytest

from cni.install.errors import InstallConfigError
from cni.install.placement import Mode
from cni.install.settings import InstallSettings


def from_env(**env: str) -> InstallSettings:
    return InstallSettings.from_env(env)


def test_the_defaults_are_the_reference_s() -> None:
    settings = from_env()
    assert settings.conf_folder == Path("/host/etc/cni/net.d")
    assert settings.bin_folder == Path("/host/opt/cni/bin")
    assert settings.run_dir == "/var/run/istio-cni"
    assert settings.placement.mode is Mode.CHAINED
    assert settings.placement.own_name == "02-istio-cni.conflist"
    assert settings.kubeconfig_mode == 0o600
    assert not settings.ambient_enabled
    assert not settings.writes_kubeconfig
    assert not settings.safe_upgrade_disabled


def test_what_the_chart_sets_is_read() -> None:
    settings = from_env(
        AMBIENT_ENABLED="true",
        EXCLUDE_NAMESPACES="kube-system, istio-system ,",
        POD_NAMESPACE="istio-system",
        CNI_CONF_NAME="10-calico.conflist",
        CNI_AGENT_RUN_DIR="/run/x",
        CNI_BIN_DIR="/home/kubernetes/bin",
        KUBECONFIG_MODE="0640",
        CNI_CONF_GROUP_READ="1",
    )
    assert settings.exclude_namespaces == ("kube-system", "istio-system")
    assert settings.placement.conf_name == "10-calico.conflist"
    assert settings.host_bin_folder == "/home/kubernetes/bin"
    assert settings.kubeconfig_mode == 0o640
    assert settings.group_may_read
    assert settings.entry() == {
        "name": "istio-cni",
        "type": "istio-cni",
        "ipam": {},
        "dns": {},
        "plugin_log_level": "info",
        "cni_agent_run_dir": "/run/x",
        "ambient_enabled": True,
        "agent_decides": True,
        "exclude_namespaces": ["kube-system", "istio-system"],
        "pod_namespace": "istio-system",
    }


@pytest.mark.parametrize(
    ("chained", "own", "mode"),
    [
        ("true", "false", Mode.CHAINED),
        ("true", "true", Mode.OWN_FILE),
        ("false", "", Mode.STANDALONE),
    ],
)
def test_two_settings_make_the_mode(chained: str, own: str, mode: Mode) -> None:
    settings = from_env(CHAINED_CNI_PLUGIN=chained, ISTIO_OWNED_CNI_CONFIG=own)
    assert settings.placement.mode is mode


@pytest.mark.parametrize(
    "name", ["ISTIO_OWNED_CNI_CONFIG_FILENAME", "ISTIO_OWNED_CNI_CONF_FILENAME"]
)
def test_both_names_of_the_own_file_s_name_count(name: str) -> None:
    assert from_env(**{name: "01-mesh.conflist"}).placement.own_name == "01-mesh.conflist"


def test_all_problems_are_listed() -> None:
    with pytest.raises(InstallConfigError) as caught:
        from_env(
            CHAINED_CNI_PLUGIN="false",
            ISTIO_OWNED_CNI_CONFIG="true",
            AMBIENT_ENABLED="perhaps",
            KUBECONFIG_MODE="rw",
            CNI_CONF_NAME="../etc/passwd",
            ISTIO_OWNED_CNI_CONFIG_FILENAME="01.conf",
        )
    for part in ("OWNED_CNI_CONFIG needs", "AMBIENT", "KUBECONFIG_MODE", "passwd", "01.conf"):
        assert part in str(caught.value)


@pytest.mark.parametrize("bits", ["1777", "-1", "9", ""])
def test_permissions_are_octal(bits: str) -> None:
    if bits:
        with pytest.raises(InstallConfigError):
            from_env(KUBECONFIG_MODE=bits)
    else:
        assert from_env(KUBECONFIG_MODE=bits).kubeconfig_mode == 0o600

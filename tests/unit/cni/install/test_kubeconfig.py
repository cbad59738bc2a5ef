from __future__ import annotations

import base64
from pathlib import Path

import yaml

from cni.install.kubeconfig import Credentials, kubeconfig, read_credentials


def the_file(**changes: object) -> dict[str, object]:
    fields: dict[str, object] = {
        "host": "10.96.0.1",
        "port": "443",
        "protocol": "https",
        "authority": b"PEM",
        "token": "secret",
    }
    return yaml.safe_load(kubeconfig(Credentials(**{**fields, **changes})))  # type: ignore[arg-type]


def test_the_reference_s_plugin_finds_server_and_token() -> None:
    assert the_file() == {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": "local",
                "cluster": {
                    "server": "https://10.96.0.1:443",
                    "certificate-authority-data": base64.b64encode(b"PEM").decode(),
                },
            }
        ],
        "users": [{"name": "istio-cni", "user": {"token": "secret"}}],
        "contexts": [
            {"name": "istio-cni-context", "context": {"cluster": "local", "user": "istio-cni"}}
        ],
        "current-context": "istio-cni-context",
    }


def test_an_ipv6_server_stands_in_brackets() -> None:
    assert (
        Credentials(
            host="fd00::1", port="6443", protocol="https", authority=None, token=""
        ).server()
        == "https://[fd00::1]:6443"
    )


def test_without_an_authority_the_server_is_not_verified() -> None:
    cluster = the_file(authority=None)["clusters"][0]["cluster"]  # type: ignore[index]
    assert cluster == {"server": "https://10.96.0.1:443", "insecure-skip-tls-verify": True}


def test_a_token_cannot_break_out_of_its_place() -> None:
    token = 'x"\n  admin: true\n'
    assert the_file(token=token)["users"] == [{"name": "istio-cni", "user": {"token": token}}]


def test_the_agent_s_own_account_is_read(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    (tmp_path / "ca.crt").write_bytes(b"PEM")
    env = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
    credentials = read_credentials(env, tmp_path)
    assert credentials.server() == "https://10.96.0.1:443"
    assert (credentials.token, credentials.authority) == ("secret", b"PEM")
    (tmp_path / "ca.crt").unlink()
    assert read_credentials({**env, "SKIP_TLS_VERIFY": "true"}, tmp_path).authority is None
    (tmp_path / "other.crt").write_bytes(b"OTHER")
    other = read_credentials({**env, "KUBE_CA_FILE": str(tmp_path / "other.crt")}, tmp_path)
    assert other.authority == b"OTHER"

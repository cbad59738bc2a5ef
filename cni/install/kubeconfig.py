"""Credentials on the host for the reference's plugin, which asks Kubernetes itself (cni.md 2.2).

Our plugin asks the agent and needs none. They are written only where the operator says so, because
whoever reads the file has all rights of the agent (daemonset.md 9.7).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FILE_NAME = "istio-cni-kubeconfig"
ACCOUNT_FOLDER = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_CLUSTER, _USER, _CONTEXT = "local", "istio-cni", "istio-cni-context"


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """How to reach Kubernetes, and as whom."""

    host: str
    port: str
    protocol: str
    authority: bytes | None  # PEM; None: the server is not verified
    token: str

    def server(self) -> str:
        """Give the address of the API server."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.protocol}://{host}:{self.port}"


def read_credentials(env: Mapping[str, str], folder: Path = ACCOUNT_FOLDER) -> Credentials:
    """Read how the agent itself reaches Kubernetes; its token changes every hour or so.

    Raises:
        OSError: a file of the service account cannot be read.
    """
    skips_verifying = env.get("SKIP_TLS_VERIFY", "").lower() in ("1", "t", "true")
    authority = Path(env.get("KUBE_CA_FILE") or folder / "ca.crt")
    return Credentials(
        host=env.get("KUBERNETES_SERVICE_HOST", ""),
        port=env.get("KUBERNETES_SERVICE_PORT", ""),
        protocol=env.get("KUBERNETES_SERVICE_PROTOCOL") or "https",
        authority=None if skips_verifying else authority.read_bytes(),
        token=(folder / "token").read_text(encoding="utf-8").strip(),
    )


def kubeconfig(credentials: Credentials) -> bytes:
    """Give the file. It is JSON, which is YAML, too, and needs no library to be right."""
    cluster: dict[str, object] = {"server": credentials.server()}
    if credentials.authority is None:
        cluster["insecure-skip-tls-verify"] = True
    else:
        cluster["certificate-authority-data"] = base64.b64encode(credentials.authority).decode()
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": _CLUSTER, "cluster": cluster}],
        "users": [{"name": _USER, "user": {"token": credentials.token}}],
        "contexts": [{"name": _CONTEXT, "context": {"cluster": _CLUSTER, "user": _USER}}],
        "current-context": _CONTEXT,
    }
    return json.dumps(content, indent=2).encode() + b"\n"

"""Who we say we are (state-and-xds.md 3)."""

from __future__ import annotations

from ztunnel.config import Config
from ztunnel.wire.delta import NodeInfo

UNKNOWN_IP = "1.1.1.1"  # the reference's stand-in; istiod wants a valid one
# A JSON number becomes a double; a longer one would not fit and stops the start of every stream.
DIGITS_MAX = 300


def node_info(config: Config) -> NodeInfo:
    """Return our id and metadata; `cluster.local` is literal, as the reference sends it."""
    name, namespace = config.pod_name or "", config.pod_namespace or ""
    ip = (config.instance_ip or UNKNOWN_IP).partition(",")[0]
    metadata: dict[str, object] = {
        "NAME": name,
        "NAMESPACE": namespace,
        "INSTANCE_IPS": config.instance_ip or "",
        "NODE_NAME": config.node_name or "",
    }
    metadata |= config.proxy_metadata
    metadata.setdefault("CLUSTER_ID", config.cluster_id)
    metadata |= {key: value for key, value in config.node_metadata.items() if _fits(value)}
    known = {key: value for key, value in metadata.items() if value != ""}
    return NodeInfo(f"ztunnel~{ip}~{name}.{namespace}~{namespace}.svc.cluster.local", known)


def _fits(value: object) -> bool:
    """Tell whether protobuf can carry a JSON value."""
    match value:
        case int():
            return bool(abs(value) < 10**DIGITS_MAX)
        case list():
            return all(_fits(item) for item in value)
        case dict():
            return all(_fits(item) for item in value.values())
        case _:
            return True

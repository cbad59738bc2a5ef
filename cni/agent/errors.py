"""What can go wrong when a pod is taken into the mesh, by who is to blame."""

from __future__ import annotations

from ztunnel.errors import ConfigError, ZtunnelError


class AgentError(ZtunnelError):
    """Foreseen; the pod is not in the mesh yet, and is tried again."""

    reason = "agent"


class NoProxyError(AgentError):
    """No node proxy is connected: pods must not start unprotected, so they wait."""

    reason = "no_proxy"


class ProxyLostError(AgentError):
    """The node proxy went away, broke the protocol or did not answer in time."""

    reason = "proxy_lost"


class ProxyRefusedError(AgentError):
    """The node proxy cannot serve the pod, and says why."""

    reason = "proxy_refused"


class SocketPathError(ConfigError):
    """Startup only; nobody can listen at this path."""

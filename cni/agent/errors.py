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


class KubeError(AgentError):
    """The Kubernetes API did not answer, refused, or sent nonsense."""

    reason = "api"

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status  # of HTTP; None if there was no answer


class ExpiredError(KubeError):
    """What we know is too old to be continued: list everything anew."""

    reason = "api_expired"


class PodUnknownError(AgentError):
    """The Kubernetes API has not told us about the pod or its namespace, yet."""

    reason = "pod_unknown"


class NetnsError(AgentError):
    """A pod's network namespace cannot be found, or is not the pod's."""

    reason = "netns"


class UnservedError(AgentError):
    """The node proxy says it serves the pod, but nobody listens there."""

    reason = "unserved"


class EventError(AgentError):
    """What came by the plugin's socket is no event."""

    reason = "event"


class SocketPathError(ConfigError):
    """Startup only; nobody can listen at this path."""


class UsurpedError(ConfigError):
    """Another node agent has taken our socket: two of them must not serve one node."""

    reason = "usurped"

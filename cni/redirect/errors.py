"""What can go wrong when a pod's traffic is redirected."""

from __future__ import annotations

from ztunnel.errors import PrivilegeError, ZtunnelError


class RedirectError(ZtunnelError):
    """The kernel refused a rule or a route; the pod is as it was before, or partly redirected."""

    reason = "redirect"


class RedirectPrivilegeError(RedirectError, PrivilegeError):
    """The kernel cannot do it, or will not let us: no pod of this node can be redirected."""

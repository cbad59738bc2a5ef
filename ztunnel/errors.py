"""Every exception we raise on purpose, by who is to blame, with its response flag.

`response_flag` is the value of the metric label of the same name (dataplane.md 12.1); `reason` is
our finer detail for the access log, where the reference lumps several causes under `CONNECT`.
"""

from __future__ import annotations

from typing import ClassVar


class ZtunnelError(Exception):
    """Foreseen; ends one connection or one update, never the process."""

    response_flag: ClassVar[str] = "CONNECT"
    reason: ClassVar[str] = "error"


class PeerError(ZtunnelError):
    """The other end broke a protocol."""

    reason = "peer_error"


class TlsError(PeerError):
    """A handshake failed, or the peer is not who we expect."""

    response_flag = "TLS_FAILURE"
    reason = "tls_failure"

    def __init__(self, message: str, *, code: int | None = None, alert: bytes = b"") -> None:
        super().__init__(message)
        self.code = code  # the RFC 8446 s6 alert the peer deserves; None if it deserves none
        self.alert = alert  # that alert as bytes ready for the wire; send them, then close


class PeerIdentityError(TlsError):
    """The handshake was sound, but the peer's identity is not one we accept."""

    reason = "identity_mismatch"


class RevokedError(TlsError):
    """The authority has taken back the peer's certificate, before or after the handshake."""

    response_flag = "CERT_REVOKED"
    reason = "revoked"


class TunnelError(PeerError):
    """HTTP/2 is broken."""

    response_flag = "H2_HANDSHAKE_FAILURE"
    reason = "h2_error"

    def __init__(self, message: str, *, code: int = 1) -> None:
        super().__init__(message)
        self.code = code  # the RFC 9113 s7 error code to put in GOAWAY or RST_STREAM


class ConnectRefusedError(PeerError):
    """The peer answered our CONNECT with something other than 200."""

    reason = "remote_refused"

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class RemoteDeniedError(ConnectRefusedError):
    """The peer's policy said no to our CONNECT."""

    reason = "remote_denied"


class RemoteUnreachableError(ConnectRefusedError):
    """The peer could not reach the application, or does not know it yet."""

    reason = "remote_unreachable"


class RejectedError(PeerError):
    """A peer's CONNECT is not for us, or not well said; `status` is our answer."""

    reason = "rejected"

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class ResourceError(PeerError):
    """The control plane sent nonsense: reject it, keep the old one."""

    reason = "resource_error"


class DeniedError(ZtunnelError):
    """Policy said no: an outcome, not a fault."""

    response_flag = "DENY"
    reason = "denied"


class UnreachableError(ZtunnelError):
    """The destination did not answer."""

    reason = "unreachable"


class PeerTimeoutError(UnreachableError):
    """Nobody answered on the tunnel port in time; a NetworkPolicy often is the cause."""

    response_flag = "NETWORK_POLICY"
    reason = "connect_timeout"


class CallError(UnreachableError):
    """A gRPC call to the control plane failed; `status` is gRPC's name for how."""

    reason = "control_plane"

    def __init__(self, message: str, *, status: str) -> None:
        super().__init__(message)
        self.status = status


class IdentityError(ZtunnelError):
    """There is no usable certificate for a workload."""

    response_flag = "IDENTITY_ERROR"
    reason = "identity_error"


class RouteError(ZtunnelError):
    """We know too little, or contradictory things, to send this connection anywhere."""

    reason = "no_route"


class LimitError(ZtunnelError):
    """One of our own limits was reached."""

    reason = "limit"


class DrainError(ZtunnelError):
    """Cut because we are going away."""

    response_flag = "-"
    reason = "drain"


class ConfigError(ZtunnelError):
    """Startup only; lists every bad setting."""

    reason = "config"


class PrivilegeError(ConfigError):
    """Startup only; a capability or kernel feature that we need is missing."""


def first(error: BaseException) -> BaseException:
    """Return the first error of a group, however deep it lies."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

from __future__ import annotations

import pytest

from ztunnel import errors
from ztunnel.errors import (
    ConfigError,
    ConnectRefusedError,
    DeniedError,
    DrainError,
    IdentityError,
    PeerTimeoutError,
    PrivilegeError,
    RevokedError,
    RouteError,
    TlsError,
    TunnelError,
    UnreachableError,
    ZtunnelError,
    first,
)

FLAGS = {
    "-", "DENY", "CONNECT", "TLS_FAILURE", "H2_HANDSHAKE_FAILURE", "NETWORK_POLICY",
    "IDENTITY_ERROR", "CERT_REVOKED",
}  # fmt: skip
ALL = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, ZtunnelError)
]


@pytest.mark.parametrize("kind", ALL)
def test_every_error_has_a_flag_the_reference_knows(kind: type[ZtunnelError]) -> None:
    assert kind.response_flag in FLAGS


@pytest.mark.parametrize("kind", ALL)
def test_every_reason_is_one_word_for_a_log_field(kind: type[ZtunnelError]) -> None:
    assert kind.reason.replace("_", "").isalnum()


@pytest.mark.parametrize(
    ("kind", "flag"),
    [
        (DeniedError, "DENY"),
        (TlsError, "TLS_FAILURE"),
        (RevokedError, "CERT_REVOKED"),
        (TunnelError, "H2_HANDSHAKE_FAILURE"),
        (PeerTimeoutError, "NETWORK_POLICY"),
        (IdentityError, "IDENTITY_ERROR"),
        (DrainError, "-"),
        (UnreachableError, "CONNECT"),
        (RouteError, "CONNECT"),
    ],
)
def test_the_flag_of(kind: type[ZtunnelError], flag: str) -> None:
    assert kind.response_flag == flag


def test_reasons_tell_errors_apart_that_share_a_flag() -> None:
    assert RouteError.reason != UnreachableError.reason


def test_a_broken_tunnel_says_protocol_error_unless_told_otherwise() -> None:
    assert TunnelError("bad").code == 1
    assert TunnelError("bad", code=11).code == 11


def test_a_refused_connect_keeps_its_status() -> None:
    error = ConnectRefusedError("http status: 503 Service Unavailable", status=503)
    assert error.status == 503
    assert str(error) == "http status: 503 Service Unavailable"


def test_lacking_a_privilege_is_a_startup_error() -> None:
    assert issubclass(PrivilegeError, ConfigError)


def test_the_first_error_of_a_group_however_deep() -> None:
    cause = DrainError("first")
    assert first(cause) is cause
    assert first(ExceptionGroup("", [ExceptionGroup("", [cause]), DeniedError("second")])) is cause

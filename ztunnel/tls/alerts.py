"""TLS alerts: codes, names, and the plaintext record of one (RFC 8446 s6)."""

from __future__ import annotations

from enum import IntEnum

WARNING, FATAL = 1, 2


class Alert(IntEnum):
    """The codes that we send or explain."""

    CLOSE_NOTIFY = 0
    UNEXPECTED_MESSAGE = 10
    BAD_RECORD_MAC = 20
    RECORD_OVERFLOW = 22
    HANDSHAKE_FAILURE = 40
    BAD_CERTIFICATE = 42
    UNSUPPORTED_CERTIFICATE = 43
    CERTIFICATE_REVOKED = 44
    CERTIFICATE_EXPIRED = 45
    CERTIFICATE_UNKNOWN = 46
    ILLEGAL_PARAMETER = 47
    UNKNOWN_CA = 48
    ACCESS_DENIED = 49
    DECODE_ERROR = 50
    DECRYPT_ERROR = 51
    PROTOCOL_VERSION = 70
    INSUFFICIENT_SECURITY = 71
    INTERNAL_ERROR = 80
    USER_CANCELED = 90
    MISSING_EXTENSION = 109
    UNRECOGNIZED_NAME = 112
    CERTIFICATE_REQUIRED = 116
    NO_APPLICATION_PROTOCOL = 120


def alert_body(code: int) -> bytes:
    """Give the two bytes of an alert; only close_notify and user_canceled are warnings."""
    gentle = code in (Alert.CLOSE_NOTIFY, Alert.USER_CANCELED)
    return bytes((WARNING if gentle else FATAL, code))


def plaintext_alert(code: int) -> bytes:
    """Give a whole alert record, for the time before the first keys."""
    return b"\x15\x03\x03\x00\x02" + alert_body(code)


def describe_alert(code: int) -> str:
    """Say what a peer's alert means: `peer sent alert: bad certificate (42)`."""
    try:
        name = Alert(code).name.lower().replace("_", " ")
    except ValueError:
        name = "unknown"
    return f"peer sent alert: {name} ({code})"

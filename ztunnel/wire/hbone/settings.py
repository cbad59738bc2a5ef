"""What we announce, what we put up with, and what the peer announced (RFC 9113 s6.5)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from h2.errors import ErrorCodes
from h2.settings import SettingCodes

from ztunnel.errors import TunnelError
from ztunnel.wire.hbone.frames import (
    DEFAULT_WINDOW,
    MAX_MAX_FRAME_SIZE,
    MAX_STREAM_ID,
    MAX_WINDOW,
    MIN_MAX_FRAME_SIZE,
    SETTING,
)

KIB: Final = 1024
MIB: Final = 1024 * KIB

# dataplane.md 6.1
CLIENT_HEADER_LIST_SIZE: Final = 16 * KIB
SERVER_HEADER_LIST_SIZE: Final = 64 * KIB

# nghttp2 takes 32 too; there are nine registered settings, and each entry costs a loop.
MAX_SETTINGS_ENTRIES: Final = 32

UNLIMITED_STREAMS: Final = MAX_STREAM_ID  # what a peer means that announces no limit
DEFAULT_HEADER_TABLE_SIZE: Final = 4096  # RFC 7541 s6.5.2; our encoder never uses more


@dataclass(frozen=True, slots=True, kw_only=True)
class HboneSettings:
    """What we announce to the peer, in bytes where not said otherwise (dataplane.md 6.1).

    The connection window is four times the stream's, or one stalled stream blocks the others.
    `max_concurrent_streams` is sent by a server only. A `max_header_list_size` of None means
    16 KiB for a client and 64 KiB for a server.

    Raises:
        ValueError: a value that RFC 9113 does not allow.
    """

    stream_window: int = 4 * MIB
    connection_window: int = 16 * MIB
    max_frame_size: int = 1 * MIB
    max_concurrent_streams: int = 200
    max_header_list_size: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.stream_window <= MAX_WINDOW:
            raise ValueError(f"stream window {self.stream_window} is not in 1..{MAX_WINDOW}")
        # A window can be enlarged but never shrunk below the protocol's default.
        if not DEFAULT_WINDOW <= self.connection_window <= MAX_WINDOW:
            raise ValueError(
                f"connection window {self.connection_window} is not in"
                f" {DEFAULT_WINDOW}..{MAX_WINDOW}"
            )
        if not MIN_MAX_FRAME_SIZE <= self.max_frame_size <= MAX_MAX_FRAME_SIZE:
            raise ValueError(
                f"frame size {self.max_frame_size} is not in"
                f" {MIN_MAX_FRAME_SIZE}..{MAX_MAX_FRAME_SIZE}"
            )
        if not 0 <= self.max_concurrent_streams <= MAX_STREAM_ID:
            raise ValueError(f"{self.max_concurrent_streams} concurrent streams")

    def header_list_size(self, *, client: bool) -> int:
        """Return the largest decoded header list we take, counted as RFC 7541 s4.1 does."""
        if self.max_header_list_size is not None:
            return self.max_header_list_size
        return CLIENT_HEADER_LIST_SIZE if client else SERVER_HEADER_LIST_SIZE

    def announced(self, *, client: bool) -> dict[SettingCodes, int]:
        """Return the entries of our SETTINGS frame."""
        first = (
            {SettingCodes.ENABLE_PUSH: 0}
            if client
            else {SettingCodes.MAX_CONCURRENT_STREAMS: self.max_concurrent_streams}
        )
        return first | {
            SettingCodes.INITIAL_WINDOW_SIZE: self.stream_window,
            SettingCodes.MAX_FRAME_SIZE: self.max_frame_size,
            SettingCodes.MAX_HEADER_LIST_SIZE: self.header_list_size(client=client),
        }


PAYLOADS_MAX = 64  # each has a few hundred bytes at most


@dataclass(frozen=True, slots=True, kw_only=True)
class HboneLimits:
    """What we put up with before a peer is cut off or a stream refused.

    Going over `max_streams` refuses the stream, everything else ends the connection with
    ENHANCE_YOUR_CALM.
    """

    # Announced are 200; a peer that has not read our SETTINGS yet may be over it in good faith.
    max_streams: int = 400
    # As compressed; as much as a server's largest decoded list, so it never binds an honest peer.
    max_header_block: int = 64 * KIB
    # A block of that size needs four frames of the smallest maximum there is (16 KiB).
    max_continuations: int = 8
    # Streams cancelled before we answered, or broken so that we must reset them, beyond those that
    # finished well and one per read. A full house may be cancelled at once.
    max_resets: int = 500
    # PING, SETTINGS, empty DATA, WINDOW_UPDATE and so on, beyond what useful work earns.
    max_nuisance: int = 2000
    # Answers to the peer (PING and SETTINGS acknowledgements, RST_STREAM) that wait to be taken.
    max_reply_bytes: int = 64 * KIB
    # RFC 9113 s6.5.2 lets us open any number of streams before SETTINGS; Envoy allows 100.
    assumed_peer_streams: int = 100


@lru_cache(maxsize=PAYLOADS_MAX)
def parse_settings(payload: bytes, *, client: bool) -> tuple[tuple[int, int], ...]:
    """Read and check a SETTINGS payload; later entries win, unknown ones are kept.

    Remembered, as nearly all peers say the same.

    Raises:
        TunnelError: a length, a value or a number of entries that may not be.
    """
    if len(payload) % SETTING.size:
        raise TunnelError(
            f"SETTINGS of {len(payload)} bytes, not a multiple of six",
            code=ErrorCodes.FRAME_SIZE_ERROR,
        )
    if len(payload) > MAX_SETTINGS_ENTRIES * SETTING.size:
        raise TunnelError("too many entries in SETTINGS", code=ErrorCodes.ENHANCE_YOUR_CALM)
    values: dict[int, int] = {}
    for code, value in SETTING.iter_unpack(payload):
        _check_setting(code, value, client=client)
        values[code] = value
    return tuple(values.items())


def _check_setting(code: int, value: int, *, client: bool) -> None:
    """Raise TunnelError for a value outside the range RFC 9113 s6.5.2 gives it."""
    match code:
        case SettingCodes.ENABLE_PUSH:
            # A server may only say 0.
            legal = value == 0 or (value == 1 and not client)
        case SettingCodes.ENABLE_CONNECT_PROTOCOL:
            legal = value <= 1
        case SettingCodes.INITIAL_WINDOW_SIZE:
            if value > MAX_WINDOW:
                raise TunnelError(
                    f"SETTINGS_INITIAL_WINDOW_SIZE of {value}",
                    code=ErrorCodes.FLOW_CONTROL_ERROR,
                )
            legal = True
        case SettingCodes.MAX_FRAME_SIZE:
            legal = MIN_MAX_FRAME_SIZE <= value <= MAX_MAX_FRAME_SIZE
        case _:
            legal = True
    if not legal:
        raise TunnelError(
            f"SETTINGS_{SettingCodes(code).name} of {value}", code=ErrorCodes.PROTOCOL_ERROR
        )

"""Carrying what happened to a stream to the stream's owner, if it still has one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ztunnel.wire.hbone import events as happened

if TYPE_CHECKING:
    from collections.abc import Callable

    from ztunnel.transport.tunnel import Tunnel


def on_data(_: Tunnel, event: happened.DataReceived) -> None:
    """Hand over bytes."""
    owner = event.stream.owner
    if owner is not None:
        owner.on_data(event)


def on_end(_: Tunnel, event: happened.StreamEnded) -> None:
    """Tell that the peer has finished sending."""
    if event.stream.owner is not None:
        event.stream.owner.on_end()


def on_reset(_: Tunnel, event: happened.StreamReset) -> None:
    """Tell that the stream was aborted."""
    if event.stream.owner is not None:
        event.stream.owner.on_reset(event.code)


def on_response(_: Tunnel, event: happened.ResponseReceived) -> None:
    """Hand over the answer to a CONNECT."""
    if event.stream.owner is not None:
        event.stream.owner.on_response(event)


STREAM_EVENTS: dict[type, Callable[[Tunnel, Any], None]] = {
    happened.DataReceived: on_data,
    happened.StreamEnded: on_end,
    happened.StreamReset: on_reset,
    happened.ResponseReceived: on_response,
}

"""Who is told what happens to a tunnel and to its streams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ztunnel.errors import ZtunnelError
    from ztunnel.transport.tunnel import Tunnel
    from ztunnel.wire.hbone import events as happened


class Resumable(Protocol):
    """A relay that wants to send more when the tunnel can."""

    def pump(self) -> None:
        """Go on sending."""


class TunnelOwner(Protocol):
    """Who answers for a whole tunnel: the pool on our side, the inbound room on the other."""

    def on_settings(self, tunnel: Tunnel) -> None:
        """Note that the peer's settings have arrived: the tunnel is usable."""

    def on_request(self, tunnel: Tunnel, request: happened.RequestReceived) -> None:
        """Serve a new stream."""

    def on_goaway(self, tunnel: Tunnel) -> None:
        """Note that the peer takes no further streams."""

    def on_released(self, tunnel: Tunnel) -> None:
        """Note that a stream has ended."""

    def on_closed(self, tunnel: Tunnel, error: ZtunnelError | None) -> None:
        """Note that the connection has ended; `error` None means in good order."""


class StreamOwner(Protocol):
    """Who answers for one stream."""

    def on_response(self, event: happened.ResponseReceived) -> None:
        """Take the answer to our CONNECT."""

    def on_data(self, event: happened.DataReceived) -> None:
        """Take bytes; the views in `event` are valid during the call only."""

    def on_end(self) -> None:
        """Note that the peer has finished sending."""

    def on_reset(self, code: int) -> None:
        """Note that the peer has aborted the stream."""

    def on_window(self) -> None:
        """Note that more may be sent on this stream."""

    def on_lost(self, error: ZtunnelError) -> None:
        """Note that the connection is gone."""

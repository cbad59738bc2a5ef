"""One CONNECT stream of a connection, as plain data (RFC 9113 s5.1)."""

from __future__ import annotations

from typing import Any


class Stream:
    """The state of one stream; only its connection changes it.

    `send_window` is what the peer still allows us and may be negative; `receive_window` is what we
    still allow the peer. `owed` counts bytes consumed but not yet given back by WINDOW_UPDATE.
    `readable` says that DATA may come: the message has begun and has not ended. `answered` says
    that the response has been sent (server) or received (client). `owner` is the shell's to use.
    """

    __slots__ = (
        "answered",
        "id",
        "local_ended",
        "owed",
        "owner",
        "readable",
        "receive_window",
        "remote_ended",
        "send_window",
        "was_reset",
    )

    def __init__(
        self, stream_id: int, *, send_window: int, receive_window: int, readable: bool
    ) -> None:
        self.id = stream_id
        self.send_window = send_window
        self.receive_window = receive_window
        self.owed = 0
        self.readable = readable
        self.answered = False
        self.local_ended = False
        self.remote_ended = False
        self.was_reset = False
        self.owner: Any = None

    def __repr__(self) -> str:
        flags = "".join(
            letter if flag else "-"
            for letter, flag in (
                ("a", self.answered),
                ("l", self.local_ended),
                ("r", self.remote_ended),
                ("x", self.was_reset),
            )
        )
        return f"<Stream {self.id} {flags} send={self.send_window} receive={self.receive_window}>"

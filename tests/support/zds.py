"""A node proxy that only speaks ZDS, and does what the test tells it to."""

from __future__ import annotations

import os
import socket
from types import TracebackType
from typing import Self

import trio
import trio.testing

from ztunnel.linux import fdpass, netns
from ztunnel.linux.netns import NetnsId
from ztunnel.wire.zds import Request, SnapshotSent, decode_request, encode_ack, encode_hello


class ScriptedProxy:
    """Connects when entered."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.namespaces: dict[str, NetnsId] = {}

    def __enter__(self) -> Self:
        self._sock.connect(self._path)
        self._sock.settimeout(0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._sock.close()

    def hello(self) -> None:
        self.send(encode_hello())

    def send(self, data: bytes, fd: int | None = None) -> None:
        fdpass.send_message(self._sock, data, fd)

    async def take(self) -> Request | None:
        """Receive a request without answering; None when the agent hung up."""
        await trio.lowlevel.wait_readable(self._sock)
        try:
            message = fdpass.receive_message(self._sock)
        except ConnectionResetError:
            return None
        if message is None:
            return None
        request = decode_request(message.data)
        if message.fd is not None:
            self.namespaces[getattr(request, "uid", "")] = netns.identify(message.fd)
            os.close(message.fd)
        return request

    async def obey(self, error: str = "") -> Request | None:
        """Receive a request and answer it."""
        request = await self.take()
        self.send(encode_ack(error))
        return request

    async def snapshot(self) -> list[Request]:
        """Say hello and obey until the snapshot is complete; return what came before."""
        self.hello()
        requests: list[Request] = []
        while (request := await self.obey()) != SnapshotSent():
            assert request is not None
            requests.append(request)
        # Let the agent read our last answer: only then it counts us as ready.
        await trio.testing.wait_all_tasks_blocked(0.01)
        return requests

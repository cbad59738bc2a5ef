"""A scripted HBONE client: the `ssl` module and the h2 library, none of our own code."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import h2.config
import h2.connection
import h2.events
import h2.settings
import trio
from h2.connection import ConnectionState

from ztunnel.tls.certificate import WorkloadCertificate
from ztunnel.tls.context import TlsContexts

SECONDS = 10
FRAME_HEADER_BYTES = 9
E = TypeVar("E", bound=h2.events.Event)


def anonymous_context() -> ssl.SSLContext:
    """Make a client that shows no certificate and believes everybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


class ScriptedClient:
    """One connection to a server's HBONE port."""

    def __init__(self, tls: trio.SSLStream[trio.SocketStream]) -> None:
        self.tls = tls
        self.h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=True, validate_outbound_headers=False)
        )
        self._events: list[h2.events.Event] = []
        self._raw = bytearray()  # a frame whose rest has not come

    async def send(self, raw: bytes = b"") -> None:
        """Send what h2 has gathered, then `raw`."""
        await self.tls.send_all(self.h2.data_to_send() + raw)

    async def request(
        self, authority: str | None, *, method: str = "CONNECT", **headers: str
    ) -> int:
        """Ask for a tunnel; give the stream's id."""
        stream = self.h2.get_next_available_stream_id()
        fields = [(":method", method)]
        if authority is not None:
            fields.append((":authority", authority))
        if method != "CONNECT":
            fields += [(":scheme", "https"), (":path", "/")]
        self.h2.send_headers(stream, fields + list(headers.items()))
        await self.send()
        return stream

    async def status(self, stream: int) -> int:
        """Wait for the answer to a request."""
        event = await self.until(h2.events.ResponseReceived, lambda e: e.stream_id == stream)
        return int(dict(event.headers)[b":status"])

    async def until(self, kind: type[E], wanted: Callable[[Any], bool] = lambda _: True) -> E:
        """Wait for an event; the ones before it are dropped.

        Raises:
            EOFError: the server has closed the connection.
        """
        with trio.fail_after(SECONDS):
            while True:
                while self._events:
                    event = self._events.pop(0)
                    if isinstance(event, kind) and wanted(event):
                        return event
                data = await self.tls.receive_some(65_536)
                if not data:
                    raise EOFError
                self._digest(data)
                await self.send()

    def _digest(self, data: bytes | bytearray) -> None:
        """Feed h2 frame by frame: it would take a GOAWAY for the end, and a PING may follow."""
        self._raw += data
        while len(self._raw) >= FRAME_HEADER_BYTES:
            size = FRAME_HEADER_BYTES + int.from_bytes(self._raw[:3], "big")
            if len(self._raw) < size:
                return
            self._events += self.h2.receive_data(bytes(self._raw[:size]))
            del self._raw[:size]
            if self.h2.state_machine.state is ConnectionState.CLOSED:
                self.h2.state_machine.state = ConnectionState.CLIENT_OPEN

    async def closed(self) -> None:
        """Wait until the server has closed the connection."""
        try:
            while True:
                await self.until(h2.events.ConnectionTerminated)
        except (EOFError, trio.BrokenResourceError):
            return


@asynccontextmanager
async def a_scripted_client(
    address: tuple[str, int] | trio.SocketStream,
    identity: WorkloadCertificate | ssl.SSLContext,
) -> AsyncIterator[ScriptedClient]:
    """Connect, shake hands, and exchange the first frames."""
    context = (
        identity
        if isinstance(identity, ssl.SSLContext)
        else TlsContexts(own_records=False).client(identity).ssl_context
    )
    with trio.fail_after(SECONDS):
        if isinstance(address, trio.SocketStream):
            tcp = address
        else:
            tcp = await trio.open_tcp_stream(*address)
        tls = trio.SSLStream(tcp, context, https_compatible=True)
        try:
            client = ScriptedClient(tls)
            client.h2.initiate_connection()
            await client.send()
            await client.until(h2.events.RemoteSettingsChanged)
        except BaseException:
            await trio.aclose_forcefully(tcp)
            raise
    try:
        yield client
    finally:
        await trio.aclose_forcefully(tcp)

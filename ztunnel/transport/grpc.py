"""Calls to the control plane over gRPC (state-and-xds.md 2), for xDS and for the CA alike.

How to use it:

    client = GrpcClient(GrpcAccess.for_ca(config))
    answer = await client.unary(CREATE_CERTIFICATE_PATH, request_bytes, seconds=20.0)

    stream = await client.stream(ADS_PATH)
    try:
        stream.send(request_bytes)
        while (message := await stream.receive()) is not None:
            ...
    finally:
        stream.close()

Messages are bytes on both sides; nothing here knows protobuf. Every failure is a `CallError`.
Files are read again for every call: the trust root, so that a new one is used without a restart,
and the token, which the kubelet renews. A channel is made anew whenever the root has changed.

grpcio knows no trio. A unary call needs no thread: its own threads wake us. A stream has a daemon
thread that does nothing but move whole messages into a bounded channel.

Two differences from the reference are grpcio's: it negotiates TLS 1.2 if the server has nothing
better, and while it tries the alternative host name it also asks for that name (SNI).
"""

from __future__ import annotations

import contextlib
import queue
import ssl
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

import grpc
import trio
from cryptography import x509

from ztunnel.errors import CallError, LimitError
from ztunnel.model.settings import ServerUrl, Source, SourceKind

if TYPE_CHECKING:
    from ztunnel.config import Config

CONNECT_SECONDS = 5.0  # as the reference
MESSAGE_BYTES_MAX = 200 * 1024 * 1024  # the first response of a large mesh; grpcio's own is 4 MiB
REQUESTS_QUEUED_MAX = 10_000  # acknowledgements and questions a server did not take yet
INBOX_MESSAGES = 1  # one to work on, one arriving: more would only take memory
STATUS_TEXT_CHARS = 300

# Where distributions keep the roots they trust, if OpenSSL was not built to know.
SYSTEM_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
)

_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),  # the versions of a large mesh
    # istiod answers pings faster than every 15 s with a GOAWAY.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),  # an idle stream is the normal case
    ("grpc.min_reconnect_backoff_ms", int(CONNECT_SECONDS * 1000)),  # also how long to connect
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a new channel must mean a new connection
)

# How grpcio names what has no status of gRPC.
LOCAL = "LOCAL"


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcAccess:
    """Where a server is, whom to trust there and what to show it.

    `alternative_hostname` is accepted in the server's certificate besides its own name. The
    cluster's id goes along with a token only.
    """

    server: ServerUrl
    root: Source
    alternative_hostname: str | None = None
    token: Source | None = None
    cluster_id: str = ""
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @classmethod
    def for_xds(cls, config: Config) -> Self:
        """Make one for the control plane; there must be an address."""
        assert config.xds_address is not None
        return cls(
            server=config.xds_address,
            root=config.xds_root,
            alternative_hostname=config.alternative_xds_hostname,
            token=config.token,
            cluster_id=config.cluster_id,
            headers=config.xds_headers,
        )

    @classmethod
    def for_ca(cls, config: Config) -> Self:
        """Make one for the certificate authority; there must be an address."""
        assert config.ca_address is not None
        return cls(
            server=config.ca_address,
            root=config.ca_root,
            alternative_hostname=config.alternative_ca_hostname,
            token=config.token,
            cluster_id=config.cluster_id,
            headers=config.ca_headers,
        )

    def read_roots(self) -> bytes:
        """Return the PEM bundle to trust; blocks.

        Raises:
            CallError: it cannot be read, or has no certificate. Never falls back to others.
        """
        what = f"trust root {self.root!r}"
        try:
            pem = _system_roots() if self.root.kind is SourceKind.SYSTEM else _read(self.root)
            x509.load_pem_x509_certificates(pem)
        except (OSError, ValueError) as exc:
            raise CallError(f"{what}: {exc}", status=LOCAL) from exc
        return pem

    def read_metadata(self) -> tuple[tuple[str, str], ...]:
        """Return what every call carries; blocks.

        Raises:
            CallError: there should be a token but it cannot be read, or is empty.
        """
        if self.token is None:
            return self.headers
        what = f"token {self.token!r}"
        try:
            token = _read(self.token).decode("ascii").strip()
        except (OSError, ValueError) as exc:
            raise CallError(f"{what}: {exc}", status=LOCAL) from exc
        if not token.isprintable() or not token:
            raise CallError(f"{what}: it is empty or has control characters", status=LOCAL)
        credentials = (("authorization", f"Bearer {token}"), ("clusterid", self.cluster_id))
        return credentials + self.headers


class MessageStream:
    """A bidirectional call: whole messages out and in. One task receives; any may send."""

    def __init__(
        self, channel: grpc.Channel, path: str, metadata: tuple[tuple[str, str], ...]
    ) -> None:
        self._channel = channel
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._arrived, self._inbox = trio.open_memory_channel[bytes](INBOX_MESSAGES)
        self._loop = trio.lowlevel.current_trio_token()
        self._failure: CallError | None = None
        self._has_answered = False
        start = channel.stream_stream(path, _as_is, _as_is)
        self._call = start(iter(self._requests.get, None), metadata=metadata)
        threading.Thread(target=self._move, name="grpc stream", daemon=True).start()

    @property
    def has_answered(self) -> bool:
        """Whether any message was received: before that, the call may not even have begun."""
        return self._has_answered

    def send(self, message: bytes) -> None:
        """Send a message some time soon; it is lost if the call ends first.

        Raises:
            LimitError: the server takes no messages.
        """
        if self._requests.qsize() >= REQUESTS_QUEUED_MAX:
            raise LimitError(f"{REQUESTS_QUEUED_MAX} requests are waiting for the server")
        self._requests.put(message)

    async def receive(self) -> bytes | None:
        """Return the next message, None once the server has closed the stream without error.

        Raises:
            CallError: the call failed.
        """
        try:
            message = await self._inbox.receive()
        except trio.EndOfChannel:
            if self._failure is not None:
                raise self._failure from None
            return None
        self._has_answered = True
        return message

    def close(self) -> None:
        """End the call, and its thread a few milliseconds later; may be repeated."""
        self._requests.put(None)
        self._call.cancel()
        self._inbox.close()
        self._channel.close()

    def _move(self) -> None:
        # Whoever closed the stream, or ended the loop, does not want to hear of it.
        unheard = (trio.BrokenResourceError, trio.RunFinishedError, trio.Cancelled)
        with contextlib.suppress(*unheard):
            try:
                for message in self._call:
                    trio.from_thread.run(self._arrived.send, message, trio_token=self._loop)
            except grpc.RpcError as exc:
                self._failure = _call_error(exc)
            trio.from_thread.run_sync(self._arrived.close, trio_token=self._loop)


class _Shared:
    """A channel for unary calls; once retired it closes after the last of them."""

    __slots__ = ("_calls", "_is_retired", "channel", "roots")

    def __init__(self, channel: grpc.Channel, roots: bytes) -> None:
        self.channel = channel
        self.roots = roots
        self._calls = 0
        self._is_retired = False

    def begin(self) -> None:
        self._calls += 1

    def end(self) -> None:
        self._calls -= 1
        self._close_if_unused()

    def retire(self) -> None:
        self._is_retired = True
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._is_retired and not self._calls:
            self.channel.close()


class GrpcClient:
    """Calls to one server."""

    def __init__(self, access: GrpcAccess) -> None:
        self._access = access
        self._shared: _Shared | None = None

    async def unary(self, path: str, request: bytes, *, seconds: float) -> bytes:
        """Make a call that must be over in `seconds`.

        Raises:
            CallError: it failed.
        """
        roots, metadata = await self._read()
        if self._shared is None or self._shared.roots != roots:
            channel = await self._connect(roots)
            self.close()
            self._shared = _Shared(channel, roots)
        shared = self._shared
        start = shared.channel.unary_unary(path, _as_is, _as_is)
        call = start.future(request, timeout=seconds, metadata=metadata)
        done = trio.Event()
        loop = trio.lowlevel.current_trio_token()

        def wake(_: object) -> None:
            with contextlib.suppress(trio.RunFinishedError):
                loop.run_sync_soon(done.set)

        shared.begin()
        call.add_done_callback(wake)
        try:
            await done.wait()
            return call.result()
        except grpc.RpcError as exc:
            if self._access.alternative_hostname and shared is self._shared:
                self.close()  # the server may have become the one with the other name
            raise _call_error(exc) from exc
        finally:
            call.cancel()
            shared.end()

    async def stream(self, path: str) -> MessageStream:
        """Start a bidirectional call on a channel of its own; the caller closes it.

        The call may still fail to connect: `receive` will say so.

        Raises:
            CallError: the trust root or the token cannot be read.
        """
        roots, metadata = await self._read()
        return MessageStream(await self._connect(roots), path, metadata)

    def close(self) -> None:
        """Close the connection of the unary calls, once those under way are done."""
        if self._shared is not None:
            self._shared.retire()
            self._shared = None

    async def _read(self) -> tuple[bytes, tuple[tuple[str, str], ...]]:
        access = self._access
        return await trio.to_thread.run_sync(
            lambda: (access.read_roots(), access.read_metadata()),
            limiter=trio.CapacityLimiter(
                1
            ),  # names that are slow to resolve take the usual threads
        )

    async def _connect(self, roots: bytes) -> grpc.Channel:
        """Make a channel; with an alternative name, find out which of the two it must be.

        grpcio can only replace the name to verify, not add one.
        """
        target, alternative = self._access.server.target, self._access.alternative_hostname
        credentials = grpc.ssl_channel_credentials(roots)
        channel = grpc.secure_channel(target, credentials, options=_OPTIONS)
        try:
            if alternative is None or await _can_connect(channel):
                return channel
        except trio.Cancelled:
            channel.close()
            raise
        channel.close()
        override = ("grpc.ssl_target_name_override", alternative)
        return grpc.secure_channel(target, credentials, options=(*_OPTIONS, override))


async def _can_connect(channel: grpc.Channel) -> bool:
    """Tell whether the channel gets through to a server that it trusts."""
    decided = trio.Event()
    loop = trio.lowlevel.current_trio_token()
    states: list[grpc.ChannelConnectivity] = []

    def on_state(state: grpc.ChannelConnectivity) -> None:
        if state in {
            grpc.ChannelConnectivity.READY,
            grpc.ChannelConnectivity.TRANSIENT_FAILURE,
        }:
            states.append(state)
            with contextlib.suppress(trio.RunFinishedError):
                loop.run_sync_soon(decided.set)

    channel.subscribe(on_state, try_to_connect=True)
    try:
        with trio.move_on_after(CONNECT_SECONDS):
            await decided.wait()
    finally:
        channel.unsubscribe(on_state)
    return states[:1] == [grpc.ChannelConnectivity.READY]


def _read(source: Source) -> bytes:
    if source.kind is SourceKind.FILE:
        return Path(source.value).read_bytes()
    return source.value.encode()


def _system_roots() -> bytes:
    """Read the bundle of this system; grpcio would use one that it brings along."""
    for path in (ssl.get_default_verify_paths().cafile, *SYSTEM_BUNDLES):
        if path and Path(path).is_file():  # None if OpenSSL's own is not there
            return Path(path).read_bytes()
    raise FileNotFoundError("no trust store of the system was found")


def _call_error(exc: grpc.RpcError) -> CallError:
    call = cast("grpc.Call", cast("object", exc))  # it is both, which its types do not say
    status = call.code().name
    return CallError(f"{status}: {str(call.details())[:STATUS_TEXT_CHARS]}", status=status)


def _as_is(message: bytes) -> bytes:
    return message

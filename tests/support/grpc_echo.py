"""A real gRPC server that echoes, and misbehaves on demand."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from tests.support.certs import AUTHORITY
from ztunnel.devmesh.ca_server import server_credentials

SECONDS = 10.0
OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1),
)


class EchoServer:
    """Echoes messages; `quit` ends a stream, `abort` breaks it, `wait` never answers."""

    def __init__(self, *names: str, port: int = 0) -> None:
        self.seen: list[dict[str, str]] = []
        self.peers: list[str] = []  # by which connection each call came
        self.is_waiting = threading.Event()
        self.released = threading.Event()
        self.has_ended = threading.Event()  # a stream
        self._server = grpc.server(ThreadPoolExecutor(8), options=OPTIONS)
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "Unary": grpc.unary_unary_rpc_method_handler(self._unary),
            "Stream": grpc.stream_stream_rpc_method_handler(self._stream),
        }
        self._server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("lab.Echo", methods)]
        )
        credentials = server_credentials(AUTHORITY, names)
        self.port = self._server.add_secure_port(f"127.0.0.1:{port}", credentials)
        self._server.start()

    def stop(self) -> None:
        self.released.set()
        self._server.stop(None).wait(SECONDS)

    def drain(self, seconds: float) -> threading.Event:
        """Take no more calls, and let those under way end; the event tells when they have."""
        return self._server.stop(seconds)

    def _note(self, context: grpc.ServicerContext) -> None:
        self.peers.append(context.peer())
        self.seen.append({key: str(value) for key, value in context.invocation_metadata()})

    def _unary(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self._note(context)
        if request == b"wait":
            self.is_waiting.set()
            self.released.wait(SECONDS)
        if request == b"abort":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you")
        return request

    def _stream(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        self._note(context)
        context.add_callback(self.has_ended.set)
        for request in requests:
            if request == b"quit":
                return
            if request == b"abort":
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "enough")
            yield request

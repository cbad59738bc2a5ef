"""A certificate authority that answers istiod's call over gRPC, well or badly as it is told.

`MeshCa.register` adds it to a `grpc.Server`, so that one port can serve the whole control plane;
`serving_ca` runs one by itself. Calls come on grpcio's threads: each reads `authority`, `fault` and
`ttl_seconds_max`, which may be exchanged at any time, and adds to `calls` and `issued`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from ztunnel.errors import IdentityError
from ztunnel.identity.dev_ca import DAY_SECONDS, DevelopmentCa
from ztunnel.model.identity import SCHEME
from ztunnel.tls.certificate import uri_names
from ztunnel.tls.csr import private_pem
from ztunnel.wire.ca import (
    CREATE_CERTIFICATE_PATH,
    CertificateRequest,
    decode_request,
    encode_response,
)

CALLS_KEPT = 1000
THREADS = 8
BEARER = "Bearer "


class CaFault(Enum):
    """What the authority does wrong."""

    NONE = auto()
    DOWN = auto()  # UNAVAILABLE
    REFUSES = auto()  # UNAUTHENTICATED, as istiod for a pod it does not know yet
    SLOW = auto()  # answers after `slow_seconds`
    WRONG_NAME = auto()
    WRONG_KEY = auto()
    EXPIRED = auto()
    NO_ROOT = auto()
    GARBAGE = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class CaCall:
    """What one caller said, from where; `token` without its scheme."""

    request: CertificateRequest
    token: str
    cluster_id: str
    metadata: tuple[tuple[str, str], ...]
    peer: str  # differs by connection


class MeshCa:
    """Signs for `authority`. `token` None lets everybody in."""

    def __init__(
        self,
        authority: DevelopmentCa,
        *,
        ttl_seconds_max: float = DAY_SECONDS,
        token: str | None = None,
        slow_seconds: float = 1.0,
    ) -> None:
        self.authority = authority
        self.ttl_seconds_max = ttl_seconds_max
        self.fault = CaFault.NONE
        self.calls: deque[CaCall] = deque(maxlen=CALLS_KEPT)
        self.issued: deque[tuple[str, int]] = deque(maxlen=CALLS_KEPT)  # name, serial
        self._token = token
        self._slow_seconds = slow_seconds
        self._stopped = threading.Event()

    def register(self, server: grpc.Server) -> None:
        """Serve the call on `server`, beside whatever else it serves."""
        _, service, method = CREATE_CERTIFICATE_PATH.split("/")
        handler: grpc.RpcMethodHandler[bytes, bytes]
        handler = grpc.unary_unary_rpc_method_handler(self._create)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {method: handler}),)
        )

    def stop(self) -> None:
        """Let go of the callers that a slow authority keeps waiting."""
        self._stopped.set()

    def _create(self, data: bytes, context: grpc.ServicerContext) -> bytes:
        metadata = tuple((key, str(value)) for key, value in context.invocation_metadata() or ())
        try:
            request = decode_request(data)
        except IdentityError as exc:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(exc))
        shown = dict(metadata)
        token = shown.get("authorization", "").removeprefix(BEARER)
        cluster_id = shown.get("clusterid", "")
        self.calls.append(
            CaCall(
                request=request,
                token=token,
                cluster_id=cluster_id,
                metadata=metadata,
                peer=context.peer(),
            )
        )
        fault, authority = self.fault, self.authority
        if fault is CaFault.DOWN:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the CA is down")
        if fault is CaFault.REFUSES or self._token not in (None, token):
            context.abort(
                grpc.StatusCode.UNAUTHENTICATED, "request impersonation authentication failure"
            )
        if fault is CaFault.SLOW:
            self._stopped.wait(self._slow_seconds)
        try:
            return encode_response(self._sign(authority, request, fault))
        except IdentityError as exc:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(exc))

    def _sign(
        self, authority: DevelopmentCa, request: CertificateRequest, fault: CaFault
    ) -> Sequence[bytes]:
        ttl = min(request.validity_seconds, self.ttl_seconds_max)
        if fault is CaFault.EXPIRED:
            ttl = -ttl
        good = authority.sign(request.csr_pem, ttl_seconds=ttl)
        leaf = x509.load_pem_x509_certificate(good[0])
        uris = uri_names(leaf)
        if request.impersonated and uris != (request.impersonated,):
            raise IdentityError(f"signing request of {uris[0]} for {request.impersonated}")
        self.issued.append((uris[0], leaf.serial_number))
        match fault:
            case CaFault.WRONG_NAME:
                key = leaf.public_key()
                assert isinstance(key, ec.EllipticCurvePublicKey)
                other = f"{SCHEME}{authority.trust_domain}/ns/nobody/sa/asked"
                return [_leaf(authority, key, [other]), *good[1:]]
            case CaFault.WRONG_KEY:
                key = ec.generate_private_key(ec.SECP256R1()).public_key()
                return [_leaf(authority, key, uris), *good[1:]]
            case CaFault.NO_ROOT:
                return good[:1]
            case CaFault.GARBAGE:
                return [b"what", b"is", b"this"]
            case _:
                return good


def _leaf(authority: DevelopmentCa, key: ec.EllipticCurvePublicKey, uris: Sequence[str]) -> bytes:
    return authority.certify(key, uris).public_bytes(Encoding.PEM)


def server_credentials(authority: DevelopmentCa, hosts: Sequence[str]) -> grpc.ServerCredentials:
    """Make a key and certificate for a server of the control plane; in memory only."""
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = authority.certify(key.public_key(), [], hosts=hosts)
    chain = b"".join(one.public_bytes(Encoding.PEM) for one in (leaf, *authority.intermediates))
    return grpc.ssl_server_credentials([(private_pem(key), chain)])


@contextmanager
def serving_ca(
    ca: MeshCa,
    *,
    address: str = "127.0.0.1:0",
    hosts: Sequence[str] = ("localhost", "127.0.0.1"),
    root: DevelopmentCa | None = None,
) -> Generator[int, None, None]:
    """Serve a CA and nothing else over TLS, certified by `root` or by itself; give the port."""
    server = grpc.server(ThreadPoolExecutor(THREADS), options=(("grpc.so_reuseport", 0),))
    ca.register(server)
    port = server.add_secure_port(address, server_credentials(root or ca.authority, hosts))
    server.start()
    try:
        yield port
    finally:
        ca.stop()
        server.stop(grace=0).wait()

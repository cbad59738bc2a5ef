"""Certificates from the mesh's CA over gRPC (dataplane.md 8.2, 8.3; state-and-xds.md 12).

One attempt per call; when to try again is the manager's. Trust root and token are read anew for
each call by `transport.grpc`. Differences from the reference, on purpose: a call has a deadline;
the leaf must be for our key and carry the name asked for in every mode, not only in shared mode; it
must lead to one of the roots that came along; what a CA may send has a limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from ztunnel.errors import CallError, IdentityError
from ztunnel.tls.certificate import WorkloadCertificate, has_signed, parse_bundle
from ztunnel.tls.csr import SigningRequest, make_signing_request
from ztunnel.transport.pace import Pace
from ztunnel.wire.ca import (
    CREATE_CERTIFICATE_PATH,
    CertificateRequest,
    decode_response,
    encode_request,
)

if TYPE_CHECKING:
    from ztunnel.model.identity import Identity

# The reference sets none, and a CA that hangs then holds one of eight places for ever. Istiod
# answers in milliseconds; what takes longer than this is lost.
CALL_SECONDS = 10.0
ANSWER_BYTES_MAX = 1024 * 1024  # a bundle of hundreds of roots; a chain has a few KiB
_UNREADABLE = (ValueError, UnsupportedAlgorithm, x509.InvalidVersion)


class Caller(Protocol):
    """A unary call, such as `transport.grpc.GrpcClient` makes."""

    async def unary(self, path: str, request: bytes, *, seconds: float) -> bytes:
        """Make a call that must be over in `seconds`.

        Raises:
            CallError: it failed.
        """

    async def share(self) -> None:
        """Let calls at about the same time share a connection, until cancelled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaClient:
    """Gets certificates for the workloads of this node.

    `impersonates` says that we ask in the name of others (shared mode); else the token is the
    workload's own. `address` is for error texts.
    """

    caller: Caller
    address: str
    ttl_seconds: float
    impersonates: bool
    call_seconds: float = CALL_SECONDS
    pace: Pace = field(default_factory=Pace)

    def __str__(self) -> str:
        return f"CA {self.address}"

    async def run(self) -> None:
        """Let calls at about the same time share a connection, until cancelled."""
        await self.caller.share()

    async def issue(self, identity: Identity) -> WorkloadCertificate:
        """Get a certificate with a fresh key.

        Raises:
            IdentityError: the CA did not answer, refused, or sent something else than was asked
                for; the message names the CA and the cause.
        """
        with await self.pace.turn():
            request = make_signing_request(identity)  # 0.1 ms of work, so no thread is worth it
        wire = encode_request(
            CertificateRequest(
                request.csr_pem,
                max(1, round(self.ttl_seconds)),
                str(identity) if self.impersonates else "",
            )
        )
        try:
            answer = await self.caller.unary(
                CREATE_CERTIFICATE_PATH, wire, seconds=self.call_seconds
            )
            with await self.pace.turn():
                return accepted(answer, request, identity)
        except CallError as exc:
            details = str(exc).removeprefix(f"{exc.status}: ").removesuffix(f" ({self.address})")
            raise IdentityError(f"signing gRPC error ({exc.status}): {details} ({self})") from exc
        except IdentityError as exc:
            raise IdentityError(f"{exc} ({self})") from exc


def accepted(answer: bytes, request: SigningRequest, identity: Identity) -> WorkloadCertificate:
    """Take the CA's answer apart: leaf, intermediates, root bundle.

    Raises:
        IdentityError: it is not a certificate for our key and `identity` under those roots.
    """
    if len(answer) > ANSWER_BYTES_MAX:
        raise IdentityError(f"the CA's answer is longer than {ANSWER_BYTES_MAX} bytes")
    chain_pem, roots_pem = decode_response(answer)
    try:
        chain = x509.load_pem_x509_certificates(chain_pem)
        made = WorkloadCertificate.load(
            chain_pem=b"".join(one.public_bytes(Encoding.PEM) for one in chain),
            key_pem=request.key_pem,
            roots_pem=roots_pem,
        )
        is_ours = _key_of(chain[0]) == _own_key(request)
    except _UNREADABLE as exc:
        raise IdentityError(f"the CA sent an unreadable certificate: {exc}") from exc
    if made.identity != identity:
        raise IdentityError(f"did not find expected SAN: {identity}")
    if not is_ours:
        raise IdentityError("the CA sent a certificate for another key than ours")
    if not _leads_to_a_root(chain, roots_pem):
        raise IdentityError("the CA sent a chain that none of its roots has signed")
    return made


def _key_of(certificate: x509.Certificate) -> bytes:
    key = certificate.public_key()
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _own_key(request: SigningRequest) -> bytes:
    key = load_pem_private_key(request.key_pem, password=None).public_key()
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _leads_to_a_root(chain: Sequence[x509.Certificate], roots_pem: bytes) -> bool:
    """Say whether each certificate signed the one before it, and a root the last."""
    roots = [x509.load_der_x509_certificate(der) for der in parse_bundle(roots_pem)[0]]
    return all(has_signed(above, below) for below, above in pairwise(chain)) and any(
        chain[-1] == root or has_signed(root, chain[-1]) for root in roots
    )

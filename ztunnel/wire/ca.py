"""The certificate authority's one call, both ends (state-and-xds.md 6.4 and 12)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Struct

from ztunnel.errors import IdentityError
from ztunnel.wire.pb import ca_pb2 as pb

CREATE_CERTIFICATE_PATH = "/istio.v1.auth.IstioCertificateService/CreateCertificate"
IMPERSONATED = "ImpersonatedIdentity"
CHAIN_MIN = 2  # the leaf and the root bundle


@dataclass(frozen=True, slots=True)
class CertificateRequest:
    """What is asked of the authority; `impersonated` is "" for a proxy that asks for itself."""

    csr_pem: bytes
    validity_seconds: int
    impersonated: str = ""


def encode_request(request: CertificateRequest) -> bytes:
    """Encode a request."""
    message = pb.IstioCertificateRequest(
        csr=request.csr_pem.decode("ascii"), validity_duration=request.validity_seconds
    )
    if request.impersonated:
        metadata = Struct()
        metadata.update({IMPERSONATED: request.impersonated})
        message.metadata.CopyFrom(metadata)
    return message.SerializeToString()


def decode_request(data: bytes) -> CertificateRequest:
    """Decode a request.

    Raises:
        IdentityError: it is none.
    """
    try:
        message = pb.IstioCertificateRequest.FromString(data)
    except DecodeError as exc:
        raise IdentityError(f"malformed certificate request: {exc}") from exc
    impersonated = message.metadata.fields[IMPERSONATED].string_value
    return CertificateRequest(message.csr.encode(), message.validity_duration, impersonated)


def encode_response(chain_pem: Sequence[bytes]) -> bytes:
    """Encode the answer: leaf first, root bundle last."""
    chain = [pem.decode("ascii") for pem in chain_pem]
    return pb.IstioCertificateResponse(cert_chain=chain).SerializeToString()


def decode_response(data: bytes) -> tuple[bytes, bytes]:
    """Return (chain, roots) as PEM: the leaf with its intermediates, and the root bundle.

    Raises:
        IdentityError: it is no answer, or has no root.
    """
    try:
        chain = pb.IstioCertificateResponse.FromString(data).cert_chain
    except DecodeError as exc:
        raise IdentityError(f"malformed answer of the CA: {exc}") from exc
    if not chain:
        raise IdentityError("chain returned from CA is empty: there is no root")
    if len(chain) < CHAIN_MIN:
        raise IdentityError(f"the CA sent {len(chain)} certificates: there is no root")
    parts = [part.encode().strip() + b"\n" for part in chain]
    return b"".join(parts[:-1]), parts[-1]

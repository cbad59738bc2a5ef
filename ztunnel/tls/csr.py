"""A new key and the signing request for it (dataplane.md 8.2)."""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from ztunnel.errors import IdentityError
from ztunnel.model.identity import Identity


@dataclass(frozen=True, slots=True)
class SigningRequest:
    """What the CA gets, and the key that must stay here (PKCS#8 PEM)."""

    csr_pem: bytes
    key_pem: bytes = field(repr=False)


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Print a private key as PKCS#8 PEM without encryption."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def make_signing_request(identity: Identity) -> SigningRequest:
    """Make a fresh P-256 key and ask for `identity`: empty subject, one critical URI name.

    Raises:
        IdentityError: the identity cannot stand in a certificate (it is not ASCII).
    """
    try:
        name = x509.UniformResourceIdentifier(str(identity))
    except ValueError as exc:
        raise IdentityError(f"failed to create CSR: {identity}: {exc}") from exc
    key = ec.generate_private_key(ec.SECP256R1())
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(x509.SubjectAlternativeName([name]), critical=True)
        .sign(key, SHA256())
    )
    return SigningRequest(request.public_bytes(Encoding.PEM), private_pem(key))

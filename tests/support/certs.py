"""Certificates and finished TLS connections for tests."""

from __future__ import annotations

import ssl
import tempfile
from collections.abc import Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from ztunnel.identity.dev_ca import DAY_SECONDS, DevelopmentCa, Usage
from ztunnel.model.identity import Identity, Namespace, ServiceAccount, TrustDomain
from ztunnel.tls.certificate import WorkloadCertificate
from ztunnel.tls.context import TlsContext, TlsContexts
from ztunnel.tls.csr import private_pem
from ztunnel.tls.handshake import Established, Handshake


def a_name(
    account: str = "default", *, namespace: str = "shop", trust_domain: str = "cluster.local"
) -> Identity:
    return Identity(TrustDomain(trust_domain), Namespace(namespace), ServiceAccount(account))


def an_authority(trust_domain: str = "cluster.local") -> DevelopmentCa:
    return DevelopmentCa.create(trust_domain)


AUTHORITY = an_authority()  # made once: most tests need some authority, not a new one


def a_certificate(
    identity: Identity | None = None,
    *,
    authority: DevelopmentCa = AUTHORITY,
    ttl_seconds: float = DAY_SECONDS,
    usage: Usage | None = Usage.BOTH,
    uris: Sequence[str] | None = None,
    roots_pem: bytes | None = None,
) -> WorkloadCertificate:
    """Give a certificate; `uris` replaces the identity's name, `roots_pem` the trust bundle."""
    if uris is None:
        uris = [str(identity or a_name())]
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = authority.certify(key.public_key(), uris, ttl_seconds=ttl_seconds, usage=usage)
    return WorkloadCertificate.load(
        chain_pem=b"".join(
            one.public_bytes(Encoding.PEM) for one in (leaf, *authority.intermediates)
        ),
        key_pem=private_pem(key),
        roots_pem=authority.roots_pem if roots_pem is None else roots_pem,
    )


def a_client_context(certificate: WorkloadCertificate | None = None, **settings: Any) -> TlsContext:
    return TlsContexts(**settings).client(certificate or a_certificate(a_name("client")))


def a_server_context(certificate: WorkloadCertificate | None = None, **settings: Any) -> TlsContext:
    return TlsContexts(**settings).server(certificate or a_certificate(a_name("server")))


def shake_hands(client: Handshake, server: Handshake) -> None:
    """Carry bytes between two handshakes until both are done; raises what they raise."""
    to_server = client.receive(b"")
    while not (client.done and server.done):
        to_client = b"" if server.done else server.receive(to_server)
        to_server = b"" if client.done else client.receive(to_client)
        assert to_client or to_server or (client.done and server.done), "the handshake is stuck"


def an_established_pair(
    client: TlsContext | None = None, server: TlsContext | None = None
) -> tuple[Established, Established]:
    """Give both ends of a finished connection, client first."""
    one = Handshake(client or a_client_context(), server_side=False)
    other = Handshake(server or a_server_context(), server_side=True)
    shake_hands(one, other)
    return one.finish(), other.finish()


def talk_both_ways(one: Established, other: Established) -> None:
    """See bytes pass from either end to the other."""
    out = memoryview(bytearray(1 << 18))
    for sender, receiver in ((one, other), (other, one)):
        sealed = memoryview(sender.records.seal_small(b"hello"))
        assert receiver.records.open(sealed, out) == (len(sealed), 5)
        assert bytes(out[:5]) == b"hello"


def server_context(*names: str) -> ssl.SSLContext:
    """Make TLS settings for a server with host names that `AUTHORITY` has certified."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = AUTHORITY.certify(key.public_key(), [], hosts=names)
    with tempfile.NamedTemporaryFile() as file:
        file.write(private_pem(key) + leaf.public_bytes(Encoding.PEM))
        file.flush()
        context.load_cert_chain(file.name)
    return context

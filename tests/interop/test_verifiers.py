"""Certificates and revocation lists of our making, judged by programs that are not ours.

What is judged came out of the whole path: the development CA's gRPC server, the CA client, a
signing request, an intermediate. Keys lie in a private temporary folder, for others to read.
"""

from __future__ import annotations

import json
from pathlib import Path
from subprocess import STDOUT

import pytest
import trio

from tests.interop.test_envoy_alone import a_pair
from tests.support.ca import a_running_ca
from tests.support.certs import a_name, an_authority
from tests.support.envoy_config import Credentials
from tests.support.peers import echo, echo_and_check, listen, serve
from ztunnel.identity.dev_ca import DevelopmentCa
from ztunnel.model.identity import Identity
from ztunnel.tls.certificate import WorkloadCertificate

pytestmark = pytest.mark.interop

AUTHORITIES = {"root": an_authority(), "intermediate": an_authority().subordinate("between")}
BETWEEN = pytest.mark.parametrize("authority", AUTHORITIES.values(), ids=AUTHORITIES)
CART = a_name("cart")
LEDGER = a_name("ledger", namespace="bank")  # whom the pair of Envoys expects

# A server and a client of Node shake hands and say what they think of each other.
NODE = """
const fs = require("fs"), tls = require("tls"), crypto = require("crypto");
const of = (name) => ({ cert: fs.readFileSync(name + ".pem"), key: fs.readFileSync(name + ".key"),
  ca: fs.readFileSync("roots.pem"), minVersion: "TLSv1.3", ALPNProtocols: ["h2"] });
const found = {};
const server = tls.createServer({ ...of("server"), requestCert: true, rejectUnauthorized: true },
  (socket) => { found.client = [socket.authorized, socket.getPeerCertificate().subjectaltname];
    socket.end("x"); });
server.on("tlsClientError", (error) => { console.log(JSON.stringify({ error: error.code }));
  process.exit(); });
server.listen(0, "127.0.0.1", () => {
  const socket = tls.connect({ ...of("client"), port: server.address().port,
    checkServerIdentity: () => undefined }, () => {
    found.server = [socket.authorized, socket.getPeerCertificate().subjectaltname];
    found.alpn = socket.alpnProtocol; });
  socket.on("data", () => {});
  socket.on("error", () => {});
  socket.on("close", () => { server.close(); console.log(JSON.stringify(found)); });
});
"""


async def certified(authority: DevelopmentCa, *identities: Identity) -> list[WorkloadCertificate]:
    """Get certificates as a node does."""
    async with a_running_ca(authority, ttl_seconds_max=600) as running:
        client = running.client()
        return [await client.issue(identity) for identity in identities]


async def run(*words: str | Path, cwd: Path) -> tuple[int, str]:
    """Run a program; give its exit status and what it said."""
    with trio.fail_after(20):
        done = await trio.run_process(
            list(words), cwd=cwd, capture_stdout=True, stderr=STDOUT, check=False
        )
    return done.returncode, done.stdout.decode()


def split(certificate: WorkloadCertificate, folder: Path) -> None:
    """Write leaf, intermediates and roots as `openssl verify` wants them."""
    blocks = certificate.chain_pem.split(b"-----END CERTIFICATE-----\n")
    leaf, *between = [block + b"-----END CERTIFICATE-----\n" for block in blocks if block.strip()]
    (folder / "leaf.pem").write_bytes(leaf)
    (folder / "between.pem").write_bytes(b"".join(between) or certificate.roots_pem)
    (folder / "roots.pem").write_bytes(certificate.roots_pem)


@BETWEEN
@pytest.mark.parametrize("purpose", ["sslserver", "sslclient"])
@pytest.mark.requires_program("openssl")
async def test_openssl_finds_nothing_to_object_to(
    authority: DevelopmentCa, purpose: str, tmp_path: Path
) -> None:
    (made,) = await certified(authority, CART)
    split(made, tmp_path)
    words = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", "roots.pem"]
    status, said = await run(*words, "-untrusted", "between.pem", "leaf.pem", cwd=tmp_path)
    assert (status, said) == (0, "leaf.pem: OK\n")


@BETWEEN
@pytest.mark.requires_program("openssl")
async def test_openssl_reads_our_revocation_lists_as_we_do(
    authority: DevelopmentCa, tmp_path: Path
) -> None:
    revoked, fine = await certified(authority, CART, LEDGER)
    (tmp_path / "lists.pem").write_bytes(authority.revoke(revoked.serial))
    verify = ["openssl", "verify", "-x509_strict", "-crl_check"]
    verify += ["-CRLfile", "lists.pem", "-CAfile", "roots.pem"]
    for made, expected in ((revoked, "certificate revoked"), (fine, "leaf.pem: OK")):
        split(made, tmp_path)
        _, said = await run(*verify, "-untrusted", "between.pem", "leaf.pem", cwd=tmp_path)
        assert expected in said


@BETWEEN
async def test_two_envoys_accept_each_other_by_our_certificates(
    authority: DevelopmentCa, envoy_program: Path
) -> None:
    cart, ledger = await certified(authority, CART, LEDGER)
    async with trio.open_nursery() as nursery:
        listener, port = await listen()
        await nursery.start(serve, echo, listener)
        async with a_pair(envoy_program, shown(cart), shown(ledger), port) as pair:
            with trio.fail_after(20):
                await echo_and_check(pair.connect, streams=2)
        nursery.cancel_scope.cancel(reason="checked")


def shown(certificate: WorkloadCertificate) -> Credentials:
    return Credentials(certificate.chain_pem, certificate.key_pem, certificate.roots_pem)


async def as_node_sees_it(
    client: WorkloadCertificate, server: WorkloadCertificate, folder: Path
) -> dict[str, object]:
    for name, certificate in (("client", client), ("server", server)):
        (folder / f"{name}.pem").write_bytes(certificate.chain_pem)
        (folder / f"{name}.key").write_bytes(certificate.key_pem)
    (folder / "roots.pem").write_bytes(server.roots_pem)
    status, said = await run("node", "-e", NODE, cwd=folder)
    assert status == 0, said
    found: dict[str, object] = json.loads(said)
    return found


@BETWEEN
@pytest.mark.requires_program("node")
async def test_node_accepts_both_ends(authority: DevelopmentCa, tmp_path: Path) -> None:
    cart, ledger = await certified(authority, CART, LEDGER)
    assert await as_node_sees_it(cart, ledger, tmp_path) == {
        "client": [True, f"URI:{CART}"],
        "server": [True, f"URI:{LEDGER}"],
        "alpn": "h2",
    }


@pytest.mark.requires_program("node")
async def test_node_refuses_a_client_of_another_authority(tmp_path: Path) -> None:
    (cart,) = await certified(an_authority("elsewhere.example"), CART)
    (ledger,) = await certified(AUTHORITIES["root"], LEDGER)
    found = await as_node_sees_it(cart, ledger, tmp_path)
    assert list(found) == ["error"]

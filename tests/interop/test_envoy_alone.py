"""Envoy against Envoy: proves the harness, and what it takes for granted of a peer.

Only the certificates are ours, so this also shows that another TLS library accepts them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from subprocess import PIPE

import pytest
import trio

from tests.support.certs import AUTHORITY, a_certificate, an_authority
from tests.support.envoy import Envoy, EnvoyError, running_envoy
from tests.support.envoy_config import Credentials, HboneClient, HboneServer
from tests.support.peers import (
    Connect,
    Handler,
    download_and_check,
    echo,
    echo_and_check,
    listen,
    read_to_end,
    serve,
    sink,
    source,
    upload_and_check,
)
from tests.support.ports import claimed_ports
from ztunnel.identity.dev_ca import DevelopmentCa

pytestmark = pytest.mark.interop

CLIENT = "spiffe://cluster.local/ns/shop/sa/cart"
SERVER = "spiffe://cluster.local/ns/bank/sa/ledger"
BAGGAGE = "k8s.cluster.name=c1,k8s.namespace.name=shop"


@dataclass(frozen=True, slots=True)
class Pair:
    """Client and server Envoy in front of one application."""

    client: Envoy
    server: Envoy
    authority: str

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream(self.client.address, self.client.port)


def credentials_for(uri: str, *, authority: DevelopmentCa = AUTHORITY) -> Credentials:
    certificate = a_certificate(authority=authority, uris=[uri])
    return Credentials(certificate.chain_pem, certificate.key_pem, certificate.roots_pem)


@asynccontextmanager
async def a_pair(
    program: Path, client: Credentials, server: Credentials, application_port: int
) -> AsyncIterator[Pair]:
    authority = f"127.0.0.1:{application_port}"
    receiving = HboneServer(credentials=server, accepted_identities="spiffe://cluster.local/")
    async with running_envoy(receiving, program=program) as far:
        sending = HboneClient(
            credentials=client,
            hbone_port=far.port,
            authority=authority,
            expected_identity=SERVER,
            headers=(("baggage", BAGGAGE),),
        )
        async with running_envoy(sending, program=program) as near:
            yield Pair(near, far, authority)


@pytest.mark.parametrize(
    ("application", "check"),
    [
        pytest.param(echo, partial(echo_and_check, streams=16), id="16 parallel echoes"),
        pytest.param(sink, upload_and_check, id="the answer comes after our half-close"),
        pytest.param(source, download_and_check, id="their half-close comes before ours"),
    ],
)
async def test_random_bytes_pass_two_envoys(
    application: Handler,
    check: Callable[[Connect], Awaitable[None]],
    envoy_program: Path,
) -> None:
    client, server = credentials_for(CLIENT), credentials_for(SERVER)
    async with trio.open_nursery() as nursery:
        listener, port = await listen()
        await nursery.start(serve, application, listener)
        async with a_pair(envoy_program, client, server, port) as pair:
            with trio.fail_after(20):
                await check(pair.connect)
        nursery.cancel_scope.cancel(reason="checked")


async def test_the_servers_log_names_peer_authority_and_baggage(envoy_program: Path) -> None:
    client, server = credentials_for(CLIENT), credentials_for(SERVER)
    async with trio.open_nursery() as nursery:
        listener, port = await listen()
        await nursery.start(serve, sink, listener)
        async with a_pair(envoy_program, client, server, port) as pair:
            with trio.fail_after(20):
                await upload_and_check(pair.connect, size=1000)
                [line] = await pair.server.access_log()
        nursery.cancel_scope.cancel(reason="checked")
    assert line["peer"] == CLIENT
    assert (line["method"], line["authority"]) == ("CONNECT", pair.authority)
    assert line["baggage"] == BAGGAGE
    assert (int(line["code"]), int(line["received"]), int(line["sent"])) == (200, 1000, 32)


@pytest.mark.parametrize("stranger", ["client", "server"])
async def test_a_certificate_of_another_authority_gets_no_byte_through(
    stranger: str, envoy_program: Path
) -> None:
    ours = {"client": credentials_for(CLIENT), "server": credentials_for(SERVER)}
    foreign = credentials_for(CLIENT if stranger == "client" else SERVER, authority=an_authority())
    # Only what it shows is foreign, so it is the other end that must refuse.
    ours[stranger] = replace(foreign, roots=ours[stranger].roots)
    await assert_nothing_passes(ours["client"], ours["server"], envoy_program)


async def test_a_server_of_another_identity_gets_no_byte(envoy_program: Path) -> None:
    impostor = credentials_for("spiffe://cluster.local/ns/bank/sa/impostor")
    await assert_nothing_passes(credentials_for(CLIENT), impostor, envoy_program)


async def assert_nothing_passes(client: Credentials, server: Credentials, program: Path) -> None:
    async with trio.open_nursery() as nursery:
        listener, port = await listen()
        await nursery.start(serve, echo, listener)
        async with a_pair(program, client, server, port) as pair:
            with trio.fail_after(20):
                async with await pair.connect() as stream:
                    assert await said_to(stream) == b""
                [line] = await pair.client.access_log()
                assert await refusals(pair.client) + await refusals(pair.server) > 0
        nursery.cancel_scope.cancel(reason="checked")
    assert "UF" in line["flags"].split(",")  # upstream connection failure


async def refusals(envoy: Envoy) -> int:
    """Count the certificates that this Envoy looked at and did not accept."""
    stats = (await envoy.admin("/stats?filter=ssl.fail_verify")).decode()
    return sum(int(line.rpartition(" ")[2]) for line in stats.splitlines())


async def said_to(stream: trio.SocketStream) -> bytes:
    """Send, and give what comes back before the end or a reset."""
    try:
        await stream.send_all(b"anyone there?")
        return await read_to_end(stream)
    except trio.BrokenResourceError:
        return b""


async def test_an_envoy_told_its_port_listens_there_and_is_gone_afterwards(
    envoy_program: Path,
) -> None:
    with claimed_ports(2) as (port, other):
        assert port != other
        config = HboneServer(credentials=credentials_for(SERVER), listen_port=port)
        async with running_envoy(config, program=envoy_program) as envoy:
            assert envoy.port == port
            await trio.aclose_forcefully(await trio.open_tcp_stream("127.0.0.1", port))
        assert envoy.process.returncode is not None
        assert not envoy.folder.exists()
        with pytest.raises(OSError, match=r"127\.0\.0\.1"):
            await trio.open_tcp_stream("127.0.0.1", port)


@pytest.mark.netns
@pytest.mark.requires_program("unshare", "nsenter")
async def test_an_envoy_in_a_namespace_answers_its_admin_but_is_not_reached_from_outside(
    envoy_program: Path,
) -> None:
    config = HboneServer(credentials=credentials_for(SERVER))
    async with (
        a_namespace() as netns,
        running_envoy(config, program=envoy_program, netns=netns) as envoy,
    ):
        assert b"LIVE" in await envoy.admin("/ready")
        with pytest.raises(OSError, match=r"127\.0\.0\.1"):
            await trio.open_tcp_stream(envoy.address, envoy.port)


@asynccontextmanager
async def a_namespace() -> AsyncIterator[Path]:
    """Hold an empty network namespace open by a process that does nothing."""
    process = await trio.lowlevel.open_process(
        ["unshare", "--net", "sh", "-c", "echo; exec sleep 60"], stdout=PIPE
    )
    assert process.stdout is not None
    try:
        await process.stdout.receive_some(1)  # it is inside
        yield Path(f"/proc/{process.pid}/ns/net")
    finally:
        process.kill()
        with trio.move_on_after(5, shield=True):
            await process.wait()
        await trio.aclose_forcefully(process.stdout)


async def test_an_envoy_that_cannot_start_says_why(envoy_program: Path) -> None:
    broken = replace(credentials_for(SERVER), key=b"no key")
    with pytest.raises(EnvoyError, match="private key"):
        async with running_envoy(HboneServer(credentials=broken), program=envoy_program):
            raise AssertionError("an Envoy without a key must not start")

"""Peers that are not ours: scripted with `ssl` and h2, well-behaved and otherwise."""

from __future__ import annotations

import ssl
from contextlib import suppress

import h2.errors
import h2.events
import pytest
import trio

from tests.support.builders import a_service
from tests.support.certs import a_certificate, a_name, an_authority
from tests.support.flow import Pair, a_pair, connect
from tests.support.peers import echo, read_exactly, read_to_end
from tests.support.scripted import ScriptedClient, a_scripted_client, anonymous_context
from ztunnel.tls.certificate import WorkloadCertificate

FRONTEND = a_name("frontend")
BAD_FRAME = b"\x00\x00\x05\x06\x00\x00\x00\x00\x00hello"  # a PING of five bytes


def known(pair: Pair, **more: object) -> WorkloadCertificate:
    """A certificate that the mesh's own authority issued."""
    return a_certificate(FRONTEND, authority=pair.mesh.authority, **more)  # type: ignore[arg-type]


def own_address(pair: Pair) -> str:
    host, port = pair.app_address
    return f"{host}:{port}"


async def ends_of(pair: Pair, stream: trio.SocketStream) -> None:
    await stream.send_all(b"ping")
    assert await read_exactly(stream, 4) == b"ping"
    await stream.send_eof()
    assert await read_to_end(stream) == b""
    await stream.aclose()


@pytest.mark.parametrize("own_records", [True, False])
async def test_a_foreign_client_is_served(*, own_records: bool) -> None:
    async with a_pair(own_records=own_records) as pair:
        pair.serve(echo)
        async with a_scripted_client(pair.hbone, known(pair)) as client:
            stream = await client.request(own_address(pair))
            assert await client.status(stream) == 200
            client.h2.send_data(stream, b"hello", end_stream=True)
            await client.send()
            data = await client.until(h2.events.DataReceived)
            assert data.data == b"hello"
            await client.until(h2.events.StreamEnded)
            [inbound] = await pair.lines.wait_for_ends(1)
            assert inbound["level"] == "info"
            assert inbound.bytes == (5, 5)
            assert inbound["src.identity"] == str(FRONTEND)


@pytest.mark.parametrize(
    ("authority", "method", "status", "text"),
    [
        ("{own}", "GET", 400, "expected method CONNECT, got GET"),
        ("nonsense", "CONNECT", 400, "no valid authority pseudo header"),
        ("{host}:0", "CONNECT", 400, "no valid authority pseudo header"),
        ("192.0.2.77:80", "CONNECT", 400, "ip mismatch: {host} != 192.0.2.77"),
        ("who.knows.test:80", "CONNECT", 503, "no service or workload for hostname"),
        ("{host}:15008", "CONNECT", 503, "attempted recursive call to ourselves"),
        ("unmapped.shop.svc.cluster.local:81", "CONNECT", 503, "cannot resolve port"),
    ],
)
async def test_a_wrong_request_gets_its_status_and_one_line(
    authority: str, method: str, status: int, text: str
) -> None:
    async with a_pair() as pair:
        host = pair.app_address[0]
        words = {"own": own_address(pair), "host": host}
        pair.mesh.put(a_service("unmapped.shop.svc.cluster.local", port_map={80: 8080}))
        async with a_scripted_client(pair.hbone, known(pair)) as client:
            stream = await client.request(authority.format(**words), method=method)
            assert await client.status(stream) == status
            [inbound] = await pair.lines.wait_for_ends(1)
        assert (inbound["message"], inbound["level"]) == ("connection failed", "warn")
        assert text.format(**words) in inbound["error"]
        assert inbound["reason"] == "rejected"


async def test_an_application_that_is_down_is_503_and_a_full_line() -> None:
    async with a_pair() as pair:
        address = own_address(pair)
        await pair.app.aclose()
        async with a_scripted_client(pair.hbone, known(pair)) as client:
            stream = await client.request(address)
            assert await client.status(stream) == 503
            [inbound] = await pair.lines.wait_for_ends(1)
        assert (inbound["message"], inbound["level"]) == ("connection complete", "error")
        assert inbound["error"].startswith("connection failed: Connection refused")
        assert inbound["reason"] == "unreachable"


async def test_the_caller_of_an_application_that_is_down_sees_an_abort() -> None:
    async with a_pair() as pair:
        await pair.app.aclose()
        async with await pair.call() as stream:
            with pytest.raises(trio.BrokenResourceError), trio.fail_after(10):
                await read_to_end(stream)
        outbound, inbound = await pair.ends()
        assert outbound["error"] == "http status: 503 Service Unavailable"
        assert inbound["error"].startswith("connection failed: Connection refused")


def a_foreigner(pair: Pair) -> WorkloadCertificate:
    """Sound and signed by our root, but of another trust domain."""
    return a_certificate(
        a_name("frontend", trust_domain="elsewhere.test"), authority=pair.mesh.authority
    )


def somebody_elses(pair: Pair) -> WorkloadCertificate:
    """Our names, signed by another root; it believes in ours."""
    return a_certificate(
        FRONTEND, authority=an_authority(), roots_pem=pair.mesh.authority.roots_pem
    )


def yesterdays(pair: Pair) -> WorkloadCertificate:
    return known(pair, ttl_seconds=-3600.0)


def nobody(_: Pair) -> ssl.SSLContext:
    return anonymous_context()


@pytest.mark.parametrize(
    ("identity", "text"),
    [
        pytest.param(a_foreigner, "did not present the expected trustdomain", id="trust domain"),
        pytest.param(somebody_elses, "certificate", id="another root"),
        pytest.param(yesterdays, "certificate has expired", id="expired"),
        pytest.param(nobody, "peer did not return a certificate", id="no certificate"),
    ],
)
async def test_whom_we_do_not_trust_is_refused_with_one_line(identity: object, text: str) -> None:
    async with a_pair() as pair:
        pair.serve(echo)
        neighbour = await pair.call()
        with pytest.raises((trio.BrokenResourceError, EOFError)):
            async with a_scripted_client(pair.hbone, identity(pair)):  # type: ignore[operator]
                pass
        [refused] = await pair.lines.wait_for_ends(1)
        assert (refused["message"], refused["level"]) == ("connection failed", "warn")
        assert refused["reason"] in {"tls_failure", "identity_mismatch"}
        assert text in refused["error"]
        await ends_of(pair, neighbour)
        await pair.lines.wait_for_ends(3)


async def test_whoever_does_not_speak_tls_is_refused_with_one_line() -> None:
    async with a_pair() as pair:
        async with connect(pair.hbone) as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            with trio.fail_after(10), suppress(trio.BrokenResourceError):
                await read_to_end(stream)
        [refused] = await pair.lines.wait_for_ends(1)
        assert refused["reason"] == "tls_failure"


async def test_a_silent_peer_is_dropped_when_the_handshake_takes_too_long() -> None:
    async with a_pair(tls_handshake_seconds=0.05) as pair:
        async with connect(pair.hbone) as stream:
            with trio.fail_after(10):
                assert await stream.receive_some(1) == b""
        [refused] = await pair.lines.wait_for_ends(1)
        assert refused["error"] == "tls handshake error: not finished within 0.05s"
        assert pair.mesh.node.handshakes.taken == 0


async def test_too_many_handshakes_at_once_are_refused() -> None:
    async with a_pair(max_handshakes=1) as pair:
        async with connect(pair.hbone), connect(pair.hbone) as second:
            with pytest.raises(trio.BrokenResourceError), trio.fail_after(10):
                await second.receive_some(1)
            [refused] = await pair.lines.wait_for_ends(1)
            assert refused["error"] == "1 TLS handshakes are under way already"
        await pair.lines.wait_for_ends(2)


async def test_a_broken_frame_ends_its_connection_with_goaway_and_no_other() -> None:
    async with a_pair() as pair:
        pair.serve(echo)
        neighbour = await pair.call()
        await neighbour.send_all(b"x")
        assert await read_exactly(neighbour, 1) == b"x"
        async with a_scripted_client(pair.hbone, known(pair)) as client:
            stream = await client.request(own_address(pair))
            assert await client.status(stream) == 200
            await client.send(BAD_FRAME)
            goaway = await client.until(h2.events.ConnectionTerminated)
            assert goaway.error_code == h2.errors.ErrorCodes.FRAME_SIZE_ERROR
            await client.closed()
        [cut] = await pair.lines.wait_for_ends(1)
        assert cut["reason"] == "h2_error"
        assert cut["level"] == "error"
        await ends_of(pair, neighbour)
        await pair.lines.wait_for_ends(3)


async def test_a_client_that_vanishes_cuts_its_streams_and_the_application_sees_it() -> None:
    async with a_pair() as pair:
        seen = trio.Event()

        async def app(stream: trio.SocketStream) -> None:
            with pytest.raises(trio.BrokenResourceError):
                await read_to_end(stream)
            seen.set()

        pair.serve(app)
        async with a_scripted_client(pair.hbone, known(pair)) as client:
            assert await client.status(await client.request(own_address(pair))) == 200
        with trio.fail_after(10):
            await seen.wait()
        [cut] = await pair.lines.wait_for_ends(1)
        assert cut["reason"] == "peer_error"


async def early_bytes(client: ScriptedClient, stream: int, content: bytes) -> None:
    for byte in content:
        client.h2.send_data(stream, bytes([byte]))
    await client.send()


async def test_thousands_of_tiny_frames_all_arrive_also_before_the_answer() -> None:
    content = bytes(range(256)) * 12
    async with a_pair() as pair:
        pair.serve(echo)
        async with a_scripted_client(pair.hbone, known(pair)) as client:
            stream = await client.request(own_address(pair))
            await early_bytes(client, stream, content)
            assert await client.status(stream) == 200
            await early_bytes(client, stream, content)
            client.h2.end_stream(stream)
            await client.send()
            received = bytearray()
            while len(received) < 2 * len(content):
                received += (await client.until(h2.events.DataReceived)).data
            assert received == content * 2
            [inbound] = await pair.lines.wait_for_ends(1)
            assert inbound.bytes == (len(received), len(received))

"""The control plane as a client on a real socket sees it; proxies meet it in tests/flow."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import trio
from cryptography import x509

from tests.support.builders import a_policy, a_workload
from ztunnel.devmesh.control_plane import ControlPlane, follow
from ztunnel.errors import CallError
from ztunnel.identity.dev_ca import DevelopmentCa
from ztunnel.model.identity import Identity
from ztunnel.model.settings import ServerUrl, Source, SourceKind
from ztunnel.tls.certificate import uri_names
from ztunnel.tls.csr import make_signing_request
from ztunnel.transport.grpc import GrpcClient, MessageStream
from ztunnel.transport.grpc_access import GrpcAccess
from ztunnel.wire.ca import (
    CREATE_CERTIFICATE_PATH,
    CertificateRequest,
    decode_response,
    encode_request,
)
from ztunnel.wire.delta import ADS_PATH
from ztunnel.wire.pb import xds_pb2 as pb
from ztunnel.wire.resources import ADDRESS_TYPE

AUTHORITY = DevelopmentCa.create()
SECONDS = 10.0
CART = Identity.parse("spiffe://cluster.local/ns/shop/sa/cart")


@pytest.fixture
def plane() -> Iterator[ControlPlane]:
    made = ControlPlane(AUTHORITY, token="hush")
    made.start()
    yield made
    made.stop()


def a_client(plane: ControlPlane, token: str = "hush") -> GrpcClient:
    return GrpcClient(
        GrpcAccess(
            server=ServerUrl("localhost", plane.port),
            root=Source(SourceKind.LITERAL, AUTHORITY.roots_pem.decode()),
            token=Source(SourceKind.LITERAL, token),
        )
    )


@asynccontextmanager
async def a_stream(plane: ControlPlane) -> AsyncIterator[MessageStream]:
    """Give a stream that has asked for addresses and got the first answer."""
    request = pb.DeltaDiscoveryRequest(type_url=ADDRESS_TYPE)
    request.node.id = "ztunnel~192.0.2.1~a.b~b.svc.cluster.local"
    async with a_client(plane).stream(ADS_PATH) as stream:
        stream.send(request.SerializeToString())
        with trio.fail_after(SECONDS):
            await next_response(stream)
            yield stream


async def next_response(stream: MessageStream) -> pb.DeltaDiscoveryResponse:
    message = await stream.receive()
    assert message is not None
    return pb.DeltaDiscoveryResponse.FromString(message)


async def names_in_next(stream: MessageStream) -> list[str]:
    return [resource.name for resource in (await next_response(stream)).resources]


async def test_what_is_published_is_pushed(plane: ControlPlane) -> None:
    async with a_stream(plane) as stream:
        plane.publish([a_workload("a"), a_policy()])
        assert await names_in_next(stream) == ["lab//Pod/shop/a"]
        plane.publish_one(a_workload("b"))
        assert await names_in_next(stream) == ["lab//Pod/shop/b"]
        plane.publish([])
        response = await next_response(stream)
        assert set(response.removed_resources) == {"lab//Pod/shop/a", "lab//Pod/shop/b"}


async def test_a_stale_control_plane_tells_later(plane: ControlPlane) -> None:
    async with a_stream(plane) as stream:
        plane.be_stale(stale=True)
        plane.publish([a_workload("withheld")])
        plane.send_raw(pb.DeltaDiscoveryResponse(nonce="marker").SerializeToString())
        assert (await next_response(stream)).nonce == "marker"
        plane.be_stale(stale=False)
        assert await names_in_next(stream) == ["lab//Pod/shop/withheld"]


async def test_a_slow_control_plane_holds_its_answers_up(plane: ControlPlane) -> None:
    async with a_stream(plane) as stream:
        plane.delay_seconds = 0.2
        before = trio.current_time()
        plane.publish([a_workload("late")])
        await names_in_next(stream)
        assert trio.current_time() - before >= 0.19


async def test_streams_end_on_demand(plane: ControlPlane) -> None:
    async with a_stream(plane) as stream:
        plane.disconnect(None)
        assert await stream.receive() is None
    async with a_stream(plane) as stream:
        plane.disconnect(grpc.StatusCode.RESOURCE_EXHAUSTED)
        with pytest.raises(CallError, match="RESOURCE_EXHAUSTED"):
            await stream.receive()
    assert plane.wait_for(lambda: plane.open_streams == 0, seconds=SECONDS)
    assert plane.counts.streams == 2


async def test_acknowledgements_and_refusals_are_counted(plane: ControlPlane) -> None:
    async with a_stream(plane) as stream:
        ack = pb.DeltaDiscoveryRequest(type_url=ADDRESS_TYPE, response_nonce="nonce-1")
        stream.send(ack.SerializeToString())
        ack.error_detail.message = "x: no"
        stream.send(ack.SerializeToString())
        done = await trio.to_thread.run_sync(
            lambda: plane.wait_for(lambda: bool(plane.counts.refusals), seconds=SECONDS)
        )
        assert done
    assert plane.counts.acks == 1
    assert plane.counts.refusals == ["x: no"]


@pytest.mark.parametrize(
    ("message", "status"),
    [(pb.DeltaDiscoveryRequest().SerializeToString(), "INVALID_ARGUMENT"), (b"\xff", "INVALID")],
)
async def test_a_client_that_does_not_say_who_it_is_is_refused(
    plane: ControlPlane, message: bytes, status: str
) -> None:
    async with a_client(plane).stream(ADS_PATH) as stream:
        stream.send(message)
        with trio.fail_after(SECONDS), pytest.raises(CallError, match=status):
            await stream.receive()


async def test_without_the_token_there_is_neither_state_nor_certificate(
    plane: ControlPlane,
) -> None:
    client = a_client(plane, token="guess")
    with trio.fail_after(SECONDS):
        async with client.stream(ADS_PATH) as stream:
            with pytest.raises(CallError, match="UNAUTHENTICATED"):
                await stream.receive()
        with pytest.raises(CallError, match="UNAUTHENTICATED"):
            await client.unary(CREATE_CERTIFICATE_PATH, b"", seconds=SECONDS)


async def test_certificates_are_signed_on_the_same_port(plane: ControlPlane) -> None:
    client = a_client(plane)
    csr = make_signing_request(CART).csr_pem
    request = encode_request(CertificateRequest(csr, 3600, str(CART)))
    answer = await client.unary(CREATE_CERTIFICATE_PATH, request, seconds=SECONDS)
    chain, roots = decode_response(answer)
    assert uri_names(x509.load_pem_x509_certificate(chain)) == (str(CART),)
    assert roots == AUTHORITY.roots_pem
    assert [name for name, _ in plane.ca.issued] == [str(CART)]


async def test_it_can_be_stopped_and_started_on_the_same_port(plane: ControlPlane) -> None:
    plane.publish([a_workload("a")])
    port = plane.port
    async with a_stream(plane) as stream:
        await trio.to_thread.run_sync(plane.stop)
        with contextlib.suppress(CallError):  # or it comes to say a clean end
            assert await stream.receive() is None
    assert plane.start(f"127.0.0.1:{port}") == port
    async with a_stream(plane):
        assert plane.counts.streams == 2


POD = "kind: Pod\nmetadata: {name: NAME, namespace: shop}\nstatus: {podIP: 192.0.2.10}\n"


async def test_a_file_is_followed_and_a_broken_one_changes_nothing(
    plane: ControlPlane, tmp_path: Path, nursery: trio.Nursery
) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(POD.replace("NAME", "one"))
    async with a_stream(plane) as stream:
        nursery.start_soon(lambda: follow(plane, path, poll_seconds=0.01))
        assert await names_in_next(stream) == ["Kubernetes//Pod/shop/one"]
        path.write_text("kind: [")
        await trio.sleep(0.05)
        path.unlink()
        await trio.sleep(0.05)
        path.write_text(POD.replace("NAME", "two"))
        response = await next_response(stream)
        assert [resource.name for resource in response.resources] == ["Kubernetes//Pod/shop/two"]
        assert list(response.removed_resources) == ["Kubernetes//Pod/shop/one"]
        nursery.cancel_scope.cancel()

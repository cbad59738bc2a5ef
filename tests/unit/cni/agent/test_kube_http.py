from __future__ import annotations

import ssl
from pathlib import Path

import pytest
import trio
import trustme
from hypothesis import given, strategies as st

from cni.agent import kube_http
from cni.agent.errors import KubeError
from cni.agent.kube_http import ApiServer, KubeClient, Lines
from tests.support.kube import FakeKube, a_pod, running


def client_of(kube: FakeKube) -> KubeClient:
    assert kube.server is not None
    return KubeClient(kube.server)


async def test_something_is_fetched() -> None:
    kube = FakeKube()
    kube.put(a_pod())
    async with running(kube):
        body = await client_of(kube).get("/api/v1/pods", {"limit": "5"})
    assert b"uid-shop-a" in body
    assert kube.requests == ["GET /api/v1/pods?limit=5"]


async def test_something_is_patched() -> None:
    kube = FakeKube()
    kube.put(a_pod())
    change = {"metadata": {"annotations": {"ambient.istio.io/redirection": "enabled"}}}
    async with running(kube):
        await client_of(kube).merge_patch("/api/v1/namespaces/shop/pods/a/status", change)
    assert kube.status() == "enabled"


async def test_the_token_is_read_anew_each_time(tmp_path: Path) -> None:
    token = tmp_path / "token"
    kube = FakeKube(token="one")
    async with running(kube, token=token):
        token.write_text("one\n")
        await client_of(kube).get("/api/v1/pods")
        kube.token = "two"
        with pytest.raises(KubeError, match="401 Unauthorized") as raised:
            await client_of(kube).get("/api/v1/pods")
        assert raised.value.status == 401
        token.write_text("two\n")
        await client_of(kube).get("/api/v1/pods")


async def test_without_its_token_file_nothing_is_asked(tmp_path: Path) -> None:
    kube = FakeKube()
    async with running(kube, token=tmp_path / "missing"):
        with pytest.raises(KubeError, match="No such file"):
            await client_of(kube).get("/api/v1/pods")


async def test_the_server_must_prove_who_it_is(tmp_path: Path) -> None:
    authority, other = trustme.CA(), trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    good, bad = tmp_path / "good.pem", tmp_path / "bad.pem"
    authority.cert_pem.write_to_path(good)
    other.cert_pem.write_to_path(bad)
    kube = FakeKube()
    async with running(kube, tls=context, roots=good):
        await client_of(kube).get("/api/v1/pods")
    for roots in (bad, None, tmp_path / "missing"):
        async with running(kube, tls=context, roots=roots):
            with pytest.raises(KubeError):
                await client_of(kube).get("/api/v1/pods")
    async with running(kube, tls=context, roots=bad, verify=False):
        await client_of(kube).get("/api/v1/pods")


async def test_a_refusal_has_its_status_and_reason() -> None:
    kube = FakeKube(refuse=[403, 500])
    async with running(kube):
        for status in (403, 500):
            with pytest.raises(KubeError, match=f"GET /x: {status} asked to fail") as raised:
                await client_of(kube).get("/x")
            assert raised.value.status == status


async def test_a_server_that_hangs_up_or_is_away_is_an_error() -> None:
    kube = FakeKube()
    async with running(kube):
        kube.stop()
        with pytest.raises(KubeError) as raised:
            await client_of(kube).get("/x")
        assert raised.value.status is None
    with pytest.raises(KubeError, match="GET /x"):
        await client_of(kube).get("/x")


async def test_a_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube_http, "REQUEST_SECONDS", 0.05)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        port = listener.socket.getsockname()[1]
        server = ApiServer(host="127.0.0.1", port=port, tls=False, token=None)
        with pytest.raises(KubeError, match="no answer in time"):
            await KubeClient(server).get("/x")


async def test_what_is_not_http_is_an_error() -> None:
    async def babble(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"hello there\r\n\r\n")

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    server = ApiServer(host="127.0.0.1", port=port, tls=False, token=None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, babble, listeners)
        with pytest.raises(KubeError, match="GET /x"):
            await KubeClient(server).get("/x")
        nursery.cancel_scope.cancel()


async def test_an_endless_body_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    kube = FakeKube()
    kube.put(a_pod())
    async with running(kube), client_of(kube).watch("/api/v1/pods", {"limit": "9"}) as answer:
        with pytest.raises(KubeError, match="more than 10 bytes"):
            await answer.body(10)


@given(st.lists(st.binary(min_size=1, max_size=20)), st.integers(1, 7))
def test_lines_are_whole_however_the_wire_cuts_them(lines: list[bytes], step: int) -> None:
    wanted = [line.replace(b"\n", b".") for line in lines]
    wire = b"".join(line + b"\n" for line in wanted)
    cutter = Lines()
    pieces = [wire[at : at + step] for at in range(0, len(wire), step)]
    found = [line for piece in pieces for line in cutter.feed(piece)]
    assert found == [line for line in wanted if line.strip()]


def test_a_line_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube_http, "LINE_BYTES_MAX", 10)
    with pytest.raises(KubeError, match="more than 10 bytes"):
        Lines().feed(b"x" * 11)

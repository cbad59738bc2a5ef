"""A resolver at an address of the link, such as `fe80::1%eth0`, is asked without the proxy."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.dns import printed, running, with_resolv_conf
from tests.support.dns_scene import (
    DNSMASQ,
    RESOLVER_V6,
    Scene,
    a_scene,
    dig,
    serving,
    short,
    wait_for_port,
)
from tests.support.namespaces import accept, connect, echoed, listen, needs_root
from ztunnel.devmesh.cluster import Pod

pytestmark = [
    pytest.mark.netns,
    needs_root,
    pytest.mark.requires_program("dig", "unbound", "dnsmasq"),
]

GATEWAY = "fe80::1%eth0"


def gateway_of(pod: Pod) -> str:
    """Write it so that it can be read outside the pod, too: with the number of `eth0`."""
    return f"fe80::1%{pod.netns.call(lambda: socket.if_nametoindex('eth0'))}"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """With a resolver on the node, at the pods' gateway; no test changes anything in it."""
    with a_scene(tmp_path_factory.mktemp("dns")) as scene:
        # One for all cables of the node: it hears whoever asks the gateway.
        words = (*DNSMASQ, "--log-facility=/dev/null", "--host-record=link.example,192.0.2.77")
        with running(scene.pod.node, *words):
            wait_for_port(scene.bare, gateway_of(scene.bare))
            yield scene


@pytest.mark.parametrize("by", ["+notcp", "+tcp"])
@pytest.mark.parametrize("rtype", ["A", "AAAA", "TXT"])
async def test_it_answers_as_before(scene: Scene, by: str, rtype: str) -> None:
    async with serving(scene) as served:
        question = (by, f"@{GATEWAY}", "link.example", rtype)
        before = await dig(scene.bare, *question)
        assert ("192.0.2.77" in before) == (rtype == "A")
        assert "status: " in before
        assert await dig(scene.pod, *question) == before
        assert served.metrics.dns_requests._counts == {}
        # All other resolvers are asked by us, as ever.
        assert await short(scene.pod, by, f"@{RESOLVER_V6}", "cart.shop") == ["10.96.0.7"]


@pytest.mark.requires_program("getent", "unshare")
async def test_glibc_finds_names_by_it(scene: Scene, tmp_path: Path) -> None:
    conf = tmp_path / "resolv.conf"
    conf.write_text(f"nameserver {GATEWAY}\noptions timeout:2\n")
    async with serving(scene):
        words = with_resolv_conf(conf, "getent", "ahostsv4", "link.example")
        assert "192.0.2.77" in await printed(scene.pod, *words)


def test_connections_along_the_link_go_there(scene: Scene) -> None:
    with (
        listen(scene.pod.node.netns, 8080) as server,
        connect(scene.pod.netns, gateway_of(scene.pod), 8080) as client,
        accept(server) as served,
    ):
        assert echoed(client, served)


def test_a_pod_is_called_along_the_link_through_its_proxy(scene: Scene) -> None:
    """What comes in is judged all the same, whichever address of the pod it is for."""
    own = scene.pod.netns.call(_link_local_address)
    with (
        listen(scene.pod.netns, 15006, mark=0x539) as proxy,
        listen(scene.pod.netns, 8080),
        connect(scene.pod.node.netns, f"{own}%{scene.pod.port}", 8080),
        accept(proxy) as caught,
    ):
        assert caught.getsockname()[1] == 15006


def _link_local_address() -> str:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.connect(("fe80::1", 53, 0, socket.if_nametoindex("eth0")))
        return str(sock.getsockname()[0]).partition("%")[0]

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from ipaddress import ip_network
from pathlib import Path
from typing import TypeVar

import pytest

from cni.redirect.apply import apply_redirect, inspect_redirect, read_stamp, remove_redirect
from cni.redirect.errors import RedirectError
from cni.redirect.plan import Exclusion, RedirectPlan
from tests.support.namespaces import accept, connect, echoed, listen, needs_root, open_descriptors
from ztunnel.devmesh.cluster import Cluster, new_namespace
from ztunnel.linux.netns import PodNetns

T = TypeVar("T")


class Gone:
    """A namespace that cannot be entered."""

    def call(self, action: Callable[[], T]) -> T:
        raise OSError("setns: Invalid argument")


def test_a_namespace_that_cannot_be_entered_is_reported() -> None:
    with pytest.raises(RedirectError, match="cannot enter the pod's namespace: setns"):
        apply_redirect(Gone(), RedirectPlan())
    with pytest.raises(RedirectError, match="cannot enter"):
        remove_redirect(Gone())
    with pytest.raises(RedirectError, match="cannot enter"):
        inspect_redirect(Gone(), RedirectPlan())
    with pytest.raises(RedirectError, match="cannot enter"):
        read_stamp(Gone())


def test_what_is_no_namespace_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with PodNetns.open(tmp_path / "file") as space, pytest.raises(RedirectError, match="setns"):
        apply_redirect(space, RedirectPlan())


@pytest.mark.netns
@needs_root
def test_a_pod_whose_loopback_is_down_is_reported_and_nothing_leaks() -> None:
    with new_namespace() as space:
        before = open_descriptors()
        with pytest.raises(RedirectError, match="lo interface down"):
            apply_redirect(space, RedirectPlan())
        remove_redirect(space)
        assert open_descriptors() == before


@pytest.mark.netns
@needs_root
def test_what_was_written_is_read_back_and_the_stamp_with_it() -> None:
    with Cluster() as cluster:
        pod = cluster.add_pod(cluster.add_node("node"), "pod", "10.1.0.1")
        before = open_descriptors()
        assert read_stamp(pod.netns) is None
        for stamp in ("pod x", "pod y"):
            apply_redirect(pod.netns, RedirectPlan(), stamp)
            assert read_stamp(pod.netns) == stamp
        assert inspect_redirect(pod.netns, RedirectPlan()) == []
        assert inspect_redirect(pod.netns, RedirectPlan(dns=True)) != []
        apply_redirect(pod.netns, RedirectPlan())
        assert read_stamp(pod.netns) == "pod y"  # the kernel keeps what the table was made with
        remove_redirect(pod.netns)
        assert read_stamp(pod.netns) is None
        assert open_descriptors() == before


@pytest.mark.netns
@needs_root
@pytest.mark.parametrize(
    "exclusion",
    [
        Exclusion(ports=(8080,)),
        Exclusion(networks=(ip_network("10.1.0.2/31"), ip_network("fd00::/16"))),
    ],
    ids=["ports", "networks"],
)
@pytest.mark.parametrize("ip", ["10.1.0.", "fd00::"])
def test_what_is_excluded_passes_in_both_directions(exclusion: Exclusion, ip: str) -> None:
    with Cluster() as cluster, ExitStack() as stack:
        node = cluster.add_node("node")
        pod = cluster.add_pod(node, "pod", "10.1.0.1", "fd00::1")
        other = cluster.add_pod(node, "other", "10.1.0.2", "fd00::2")
        for server, client, target in ((pod, other, f"{ip}1"), (other, pod, f"{ip}2")):
            app = stack.enter_context(listen(server.netns, 8080))
            apply_redirect(pod.netns, RedirectPlan())
            with pytest.raises(ConnectionRefusedError):
                connect(client.netns, target, 8080)
            plan = RedirectPlan(inbound_exclusion=exclusion, outbound_exclusion=exclusion)
            apply_redirect(pod.netns, plan)
            calling = stack.enter_context(connect(client.netns, target, 8080))
            assert echoed(calling, stack.enter_context(accept(app)))

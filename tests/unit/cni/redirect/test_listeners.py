from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest

from cni.redirect.errors import RedirectError
from cni.redirect.listeners import PROXY_PORTS, silent_ports
from tests.support.namespaces import listen, needs_root, output_of
from ztunnel.devmesh.cluster import Cluster

T = TypeVar("T")


class Gone:
    """A namespace that cannot be entered."""

    def call(self, action: Callable[[], T]) -> T:
        raise OSError("setns: Invalid argument")


def test_a_namespace_that_cannot_be_entered_is_reported() -> None:
    with pytest.raises(RedirectError, match="cannot read who listens"):
        silent_ports(Gone())


@pytest.mark.netns
@needs_root
def test_listeners_of_both_families_are_seen() -> None:
    with Cluster() as cluster:
        node = cluster.add_node("node")
        output_of(node, "ip", "link", "set", "lo", "up")
        assert silent_ports(node.netns) == list(PROXY_PORTS)
        with listen(node.netns, 15001, host="127.0.0.1"), listen(node.netns, 15008):
            assert silent_ports(node.netns) == [15006]
            assert silent_ports(node.netns, (15008,)) == []

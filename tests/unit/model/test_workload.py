from __future__ import annotations

import gc

from tests.support.builders import a_gateway, a_workload, an_identity
from ztunnel.model.workload import AppProtocol, Health, NetworkMode, TunnelProtocol, Workload


def test_a_workload_has_the_identity_of_its_account() -> None:
    assert a_workload(sa="cart", ns="shop").identity == an_identity("cart", "shop")


def test_a_workload_that_says_nothing_is_healthy_plain_and_of_capacity_one() -> None:
    plain = Workload()
    assert (plain.health, plain.capacity) == (Health.HEALTHY, 1)
    assert (plain.protocol, plain.network_mode) == (TunnelProtocol.NONE, NetworkMode.STANDARD)
    assert plain.application_tunnel is plain.waypoint is plain.network_gateway is None


def test_the_garbage_collector_does_not_walk_a_hundred_thousand_of_them() -> None:
    assert not gc.is_tracked(a_workload())


def test_a_gateway_prints_as_it_is_written() -> None:
    assert str(a_gateway("shop/wp.example.com").destination) == "shop/wp.example.com"
    assert str(a_gateway("far/192.0.2.1").destination) == "far/192.0.2.1"


def test_words_are_those_of_the_static_configuration() -> None:
    assert [str(word) for word in (*TunnelProtocol, *AppProtocol)] == [
        "TCP",
        "HBONE",
        "NONE",
        "PROXY",
    ]

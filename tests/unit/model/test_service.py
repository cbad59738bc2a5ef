from __future__ import annotations

from tests.support.builders import a_service
from ztunnel.model.service import BalanceMode, HealthPolicy, LoadBalancer, Visibility


def test_a_service_is_known_by_namespace_and_host_name() -> None:
    assert a_service("cart.example.com", ns="shop").key == "shop/cart.example.com"


def test_a_service_that_says_nothing_is_public_and_not_canonical() -> None:
    plain = a_service()
    assert plain.visibility is Visibility.PUBLIC
    assert not plain.canonical
    assert plain.load_balancer is None


def test_a_load_balancer_that_says_nothing_takes_all_healthy_endpoints() -> None:
    plain = LoadBalancer()
    assert plain.mode is BalanceMode.STANDARD
    assert plain.health_policy is HealthPolicy.ONLY_HEALTHY
    assert plain.routing_preferences == ()

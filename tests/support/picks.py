"""Services with endpoints in many places, and picks among them."""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from hypothesis import strategies as st

from tests.support.builders import a_service, a_workload
from ztunnel.decide.balance import Pick, Purpose, pick
from ztunnel.model.network import Port
from ztunnel.model.service import BalanceMode, HealthPolicy, LoadBalancer, Scope, Service
from ztunnel.model.workload import Health, Locality, Workload
from ztunnel.state.store import Store

KEY = "shop/cart.shop.svc.cluster.local"
CALLER = a_workload(
    "caller", node="n1", cluster_id="c1", locality=Locality("r1", "z1", "s1"), ips=["192.0.2.99"]
)


def an_endpoint(name: str, place: str = "r1/z1/s1", **more: Any) -> Workload:
    """Make a workload of the service `KEY`, somewhere."""
    more.setdefault("services", {KEY: {80: 8080}})
    return a_workload(name, uid=name, locality=Locality(*place.split("/")), **more)


def choose(
    store: Store, service: Service, seed: int = 0, port: int = 80, **more: Any
) -> Pick | None:
    """Pick an endpoint for `CALLER`, or for whoever `more` says."""
    more.setdefault("source", CALLER)
    more.setdefault("purpose", Purpose.STANDARD)
    rng = random.Random(seed)
    return pick(store.services, service, Port(port), rng=rng, **more)


def names(store: Store, service: Service, **more: Any) -> set[str]:
    """Collect the names of what sixty picks choose."""
    picks = (choose(store, service, seed, **more) for seed in range(60))
    return {found.workload.name for found in picks if found}


class _Dial(random.Random):
    """Not random at all: every draw takes what stands at one point of what could be drawn."""

    def __init__(self, point: Fraction) -> None:
        super().__init__()
        self._point = point
        self.parts = 0  # equal ones, into which the last draw was divided

    def _randbelow(self, n: int) -> int:
        self.parts = n
        return int(self._point * n)


def chances(draw: Callable[[random.Random], Workload | None]) -> dict[str, Fraction]:
    """Say exactly how probable it is that each endpoint is drawn, with one random number."""
    probe = _Dial(Fraction(0))
    draw(probe)
    drawn: dict[str, Fraction] = {}
    for part in range(probe.parts):
        one = draw(_Dial(Fraction(part, probe.parts)))
        assert one is not None
        drawn[one.name] = drawn.get(one.name, Fraction(0)) + Fraction(1, probe.parts)
    return drawn


def balanced(mode: BalanceMode, *preferences: Scope) -> Service:
    """Make a service with that way of balancing."""
    return a_service(load_balancer=LoadBalancer(preferences, mode))


endpoints = st.lists(
    st.builds(
        an_endpoint,
        st.sampled_from("abcdefgh"),
        st.sampled_from(["r1/z1/s1", "r1/z2/s1", "r2/z1/s1"]),
        health=st.sampled_from(Health),
        capacity=st.integers(0, 3),
        ips=st.sampled_from([[], ["192.0.2.1"]]),
        network=st.sampled_from(["", "far"]),
        services=st.sampled_from([{KEY: {80: 8080}}, {KEY: {}}, {}]),
    ),
    unique_by=lambda workload: workload.uid,
)
services = st.builds(
    a_service,
    port_map=st.sampled_from([{80: 8080}, {80: 0}, {}]),
    load_balancer=st.none()
    | st.builds(
        LoadBalancer,
        st.lists(st.sampled_from(Scope), max_size=3, unique=True).map(tuple),
        st.sampled_from(BalanceMode),
        st.sampled_from(HealthPolicy),
    ),
)

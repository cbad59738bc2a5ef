from __future__ import annotations

import pickle

from tests.support.builders import a_workload
from ztunnel.model.workload import Workload
from ztunnel.workers.sharing import TEXTS, share


def read_again(workload: Workload) -> Workload:
    copy: Workload = pickle.loads(pickle.dumps(workload))
    share(copy)
    return copy


def test_equal_parts_of_two_workloads_are_one_object() -> None:
    services = {"shop/cart.shop.svc": {80: 8080}}
    one = read_again(a_workload("cart-0", services=services, node="node-1"))
    other = read_again(a_workload("cart-1", services=services, node="node-1"))
    assert all(getattr(one, name) is getattr(other, name) for name in TEXTS)
    assert one.services is other.services


def test_a_workload_stays_what_it_was() -> None:
    before = a_workload(services={"a/b": {1: 2, 3: 4}, "c/d": {}}, node="node-1")
    assert read_again(before) == before

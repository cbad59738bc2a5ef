"""The dump of what the store knows, and of the static configuration, as readers get it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tests.support.builders import a_policy, a_service, a_workload
from ztunnel.admin.config_dump import Section, Wish, config_dump, constant
from ztunnel.admin.sections import state_sections, static_config
from ztunnel.state.store import Store, Update

CART = a_service("cart")
ENDPOINT = a_workload("cart-0", services={CART.key: {80: 8080}})
OTHER = a_workload("alone")


def dumped(sections: Mapping[str, Section]) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(b"".join(config_dump(sections, Wish())))
    return shown


def test_the_store_is_shown_with_the_endpoints_of_each_service() -> None:
    store, policy = Store(), a_policy()
    store.apply(Update(workloads=[OTHER, ENDPOINT], services=[CART], policies=[policy]))
    shown = dumped(state_sections(store))
    assert [one["uid"] for one in shown["workloads"]] == sorted([OTHER.uid, ENDPOINT.uid])
    assert [one["name"] for one in shown["policies"]] == [policy.name]
    (service,) = shown["services"]
    assert service["hostname"] == CART.hostname
    assert list(service["endpoints"]) == [ENDPOINT.uid]
    assert service["endpoints"][ENDPOINT.uid]["port"] == {"80": 8080}


def test_the_static_configuration_is_shown_without_what_others_said() -> None:
    store, static = Store(), Update(workloads=[ENDPOINT], services=[CART], replace_all=True)
    store.apply(static)
    store.apply(Update(workloads=[OTHER], policies=[a_policy()]))
    shown = dumped({"staticConfig": constant(lambda: static_config(static, store))})["staticConfig"]
    (workload,) = shown["workloads"]
    assert workload["uid"] == ENDPOINT.uid
    assert workload["services"] == {CART.key: {"80": 8080}}
    assert list(shown["services"][0]["endpoints"]) == [ENDPOINT.uid]
    assert shown["policies"] == []


def test_no_static_configuration_is_shown_as_empty_lists() -> None:
    sections = {"staticConfig": constant(lambda: static_config(Update(), Store()))}
    assert dumped(sections)["staticConfig"] == {"policies": [], "services": [], "workloads": []}

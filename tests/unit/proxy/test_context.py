from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.support.builders import a_policy, a_workload, an_identity
from tests.support.flow import Mesh, a_mesh
from ztunnel.errors import DeniedError, RouteError
from ztunnel.proxy import context as module
from ztunnel.proxy.context import Places, ProxyContext
from ztunnel.transport.sockets import SocketFactory
from ztunnel.wire.zds import PodInfo

CART = a_workload("cart-0", sa="cart")


def a_context(mesh: Mesh) -> ProxyContext:
    return ProxyContext(
        node=mesh.node,
        info=PodInfo(CART.name, CART.namespace, CART.service_account),
        sockets=SocketFactory(netns=None, mark=None, keepalive=None),
        spawn=mesh.nursery.start_soon,
    )


def test_places_run_out_and_come_back() -> None:
    places = Places(2)
    assert [places.take() for _ in range(3)] == [True, True, False]
    places.give_back()
    assert places.take()


def test_without_a_bound_there_is_always_a_place() -> None:
    places = Places(0)
    assert all(places.take() for _ in range(1000))


async def test_the_workload_is_looked_up_again_after_each_change() -> None:
    async with a_mesh() as mesh:
        context = a_context(mesh)
        assert context.workload() is None
        mesh.put(CART)
        assert context.workload() == CART
        changed = a_workload("cart-0", sa="cart", ips=["192.0.2.99"])
        mesh.put(changed)
        assert context.workload() == changed
        mesh.put(removed_workloads=[CART.uid])
        assert context.workload() is None


async def test_a_workload_that_comes_in_time_is_waited_for() -> None:
    async with a_mesh() as mesh, trio.open_nursery() as nursery:
        context = a_context(mesh)
        found = []

        async def wait() -> None:
            found.append(await context.known_workload())

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        mesh.put(a_workload("somebody else"))
        await trio.testing.wait_all_tasks_blocked()
        mesh.put(CART)
        await trio.testing.wait_all_tasks_blocked()
        assert found == [CART]
        assert await context.known_workload() == CART


async def test_a_workload_that_changes_while_it_is_waited_for_is_given_as_it_is_now() -> None:
    strict = a_workload("cart-0", sa="cart", policies=["shop/strict"])
    async with a_mesh() as mesh:
        context = a_context(mesh)
        mesh.put(CART)
        found = []

        async def look_up() -> None:
            found.append(await context.known_workload() == context.workload())

        async def turn_on_strict() -> None:
            mesh.put(strict)

        # In whatever order tasks are woken: who is judged by an old record stays so judged.
        for _ in range(20):
            mesh.put(CART)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(look_up)
                nursery.start_soon(turn_on_strict)
        assert all(found)


async def test_a_workload_that_does_not_come_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(module, "LOCAL_WORKLOAD_SECONDS", 0.01)
    async with a_mesh() as mesh:
        with pytest.raises(RouteError, match=r"local workload: cart.shop \(cart-0\).*0.01s"):
            await a_context(mesh).known_workload()
        assert not mesh.store._listeners


async def test_a_policy_that_the_workload_names_is_waited_for() -> None:
    async with a_mesh() as mesh, trio.open_nursery() as nursery:
        named = a_workload("cart-0", sa="cart", policies=["shop/late"])
        mesh.put(named)
        context = a_context(mesh)
        assert context.lacks_policy(named)
        found = []

        async def wait() -> None:
            found.append(await context.known_policies())

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert found == []
        mesh.put(a_policy("late"))
        await trio.testing.wait_all_tasks_blocked()
        assert found == [named]
        assert not context.lacks_policy(named)


async def test_a_policy_that_does_not_come_denies() -> None:
    async with a_mesh(policy_wait_seconds=0.01) as mesh:
        mesh.put(a_workload("cart-0", sa="cart", policies=["shop/late"]))
        with pytest.raises(DeniedError, match="shop/late applies to the workload"):
            await a_context(mesh).known_policies()


async def test_the_identity_is_the_account_that_the_node_agent_vouches_for() -> None:
    async with a_mesh() as mesh:
        lying = a_workload("cart-0", sa="admin", ns="bank")
        assert a_context(mesh).identity(lying) == an_identity("cart", "shop")

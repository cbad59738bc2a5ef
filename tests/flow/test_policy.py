from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import trio
from msgspec import structs

from tests.support.builders import a_policy, a_workload, allow, deny
from tests.support.flow import Pair, a_pair, connect, expect_abort
from tests.support.peers import echo, read_exactly, read_to_end
from ztunnel.decide.authorize import authorize
from ztunnel.model.identity import Identity
from ztunnel.model.network import Endpoint
from ztunnel.model.policy import Action, Match, MatchKind, Policy, PolicyScope, StringMatch
from ztunnel.model.workload import PolicyKey, Workload
from ztunnel.proxy import inbound_stream, plaintext, supervision
from ztunnel.proxy.judgement import judge

# What istiod makes of PeerAuthentication STRICT: whoever has no principal is denied.
STRICT = a_policy(
    "strict",
    ns="istio-system",
    action=Action.DENY,
    match=Match(not_principals=(StringMatch(MatchKind.PRESENCE),)),
)


def in_shop(policy: Policy) -> Policy:
    return replace(policy, scope=PolicyScope.NAMESPACE)


def strict(workload: Workload) -> Workload:
    return structs.replace(workload, policies=(PolicyKey(STRICT.key),))


async def a_running_call(pair: Pair) -> trio.SocketStream:
    stream = await pair.call()
    await stream.send_all(b"ping")
    assert await read_exactly(stream, 4) == b"ping"
    return stream


async def test_a_denied_call_is_reset_and_both_sides_say_why() -> None:
    async with a_pair() as pair:
        pair.mesh.put(in_shop(deny("shop/frontend", name="no-frontend")))
        async with await pair.call() as stream:
            await expect_abort(stream)
        outbound, inbound = await pair.ends()
        assert outbound["level"] == inbound["level"] == "error"
        assert outbound["error"] == "http status: 401 Unauthorized"
        assert outbound["reason"] == "remote_denied"
        assert inbound["policy"] == "shop/no-frontend"
        assert inbound["reason"] == "denied"
        assert "explicitly denied by: shop/no-frontend" in inbound["error"]
        assert outbound.bytes == inbound.bytes == (0, 0)


async def test_a_call_that_no_allow_policy_mentions_learns_the_nearest_miss() -> None:
    async with a_pair() as pair:
        pair.mesh.put(in_shop(allow("shop/admin", name="only-admin")))
        async with await pair.call() as stream:
            await expect_abort(stream)
        outbound, inbound = await pair.ends()
        assert outbound["error"] == "http status: 401 Unauthorized"
        assert "allow policies exist, but none allowed" in inbound["error"]
        assert "shop/only-admin rule 0" in inbound["error"]
        assert "shop/frontend" in inbound["error"]
        assert "shop/admin" in inbound["error"]


async def test_a_refusal_leaves_the_neighbours_of_its_tunnel_alone() -> None:
    async with a_pair() as pair:
        pair.serve(echo)
        running = await a_running_call(pair)
        other = await a_running_call(pair)
        assert len(pair.client.pool) == 1
        denying = in_shop(deny("shop/frontend"))
        # Only new connections are asked: the policy is of another namespace first.
        pair.mesh.put(replace(denying, name="elsewhere", namespace="bank"))
        await other.send_all(b"more")
        assert await read_exactly(other, 4) == b"more"
        for stream in (running, other):
            await stream.send_eof()
            assert await read_to_end(stream) == b""
            await stream.aclose()
        ends = await pair.lines.wait_for_ends(4)
        assert {end["level"] for end in ends} == {"info"}


async def test_a_new_policy_cuts_the_running_connection_on_both_sides() -> None:
    async with a_pair() as pair:
        pair.serve(echo)
        async with await a_running_call(pair) as stream:
            pair.mesh.put(in_shop(deny("shop/frontend", name="late")))
            await expect_abort(stream)
        outbound, inbound = await pair.ends()
        assert inbound["error"] == "connection closed due to policy change"
        assert inbound["policy"] == "shop/late"
        assert outbound["error"] == "peer reset the stream (code 8)"
        assert outbound.bytes == inbound.bytes == (4, 4)


async def test_a_policy_that_still_allows_lets_the_running_connection_be() -> None:
    async with a_pair() as pair:
        pair.serve(echo)
        async with await a_running_call(pair) as stream:
            pair.mesh.put(in_shop(allow("shop/frontend")))
            await trio.testing.wait_all_tasks_blocked()
            await stream.send_eof()
            assert await read_to_end(stream) == b""
        outbound, inbound = await pair.ends()
        assert outbound["level"] == inbound["level"] == "info"


async def call_in_the_clear(pair: Pair) -> trio.SocketStream:
    """Call the server pod's plaintext port; unredirected, that is also where it wants to go."""
    await trio.lowlevel.checkpoint()
    return connect(pair.plaintext)


async def test_strict_mutual_tls_that_arrives_late_cuts_plaintext_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with a_pair() as pair:
        pair.serve(echo)
        redirect(monkeypatch, pair)
        tunnelled = await a_running_call(pair)
        plain = await call_in_the_clear(pair)
        await plain.send_all(b"ping")
        assert await read_exactly(plain, 4) == b"ping"
        # The policy comes first and means nobody; then the workload begins to name it.
        pair.mesh.put(STRICT)
        await plain.send_all(b"pong")
        assert await read_exactly(plain, 4) == b"pong"
        pair.mesh.put(strict(pair.server_workload))
        await expect_abort(plain)
        await plain.aclose()
        [cut] = await pair.lines.wait_for_ends(1)
        assert cut["error"] == "connection closed due to policy change"
        assert cut["policy"] == STRICT.key
        assert cut.bytes == (8, 8)
        assert "src.identity" not in cut
        await tunnelled.send_eof()
        assert await read_to_end(tunnelled) == b""
        await tunnelled.aclose()
        assert [end["level"] for end in await pair.lines.wait_for_ends(3)][1:] == ["info"] * 2


async def test_strict_mutual_tls_refuses_new_plaintext(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_pair() as pair:
        redirect(monkeypatch, pair)
        pair.mesh.put(
            STRICT, structs.replace(pair.server_workload, policies=(PolicyKey(STRICT.key),))
        )
        async with await call_in_the_clear(pair) as plain:
            await expect_abort(plain)
        [refused] = await pair.lines.wait_for_ends(1)
        assert refused["policy"] == STRICT.key
        assert refused["level"] == "error"


async def test_connections_are_judged_again_for_their_own_workload_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[object] = []

    def counted(*about: Any) -> object:
        asked.append(about)
        return authorize(*about)

    monkeypatch.setattr(supervision, "authorize", counted)
    async with a_pair() as pair:
        pair.serve(echo)
        async with await a_running_call(pair) as stream:
            pair.mesh.put(structs.replace(pair.server_workload, canonical_name="first"))
            await trio.testing.wait_all_tasks_blocked()
            assert len(asked) == 1
            pair.mesh.put(a_workload("stranger", ips=["192.0.2.77"]))
            await trio.testing.wait_all_tasks_blocked()
            assert len(asked) == 1
            pair.mesh.put(structs.replace(pair.server_workload, canonical_name="second"))
            await trio.testing.wait_all_tasks_blocked()
            assert len(asked) == 2
            await stream.send_eof()
            assert await read_to_end(stream) == b""


def redirect(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    """Do what the packet filter does: tell the listener where the caller meant to go."""
    monkeypatch.setattr(plaintext, "original_destination", lambda _: Endpoint.of(pair.app_address))


async def test_the_source_a_policy_judges_is_the_certificate_and_not_the_headers() -> None:
    async with a_pair() as pair:
        pair.serve(echo)
        # The caller's baggage says frontend; its address belongs to another workload.
        pair.mesh.put(
            a_workload("impostor", ns="bank", sa="teller", ips=["127.0.0.1"]),
            in_shop(allow("shop/frontend")),
        )
        async with await a_running_call(pair) as stream:
            await stream.send_eof()
            assert await read_to_end(stream) == b""
        _, inbound = await pair.ends()
        assert inbound["src.identity"] == str(frontend(pair))


def frontend(pair: Pair) -> Identity:
    return pair.client_workload.identity


async def test_a_caller_that_comes_again_is_judged_by_the_policy_of_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[object] = []

    def counted(*about: Any) -> object:
        asked.append(about)
        return judge(*about)

    monkeypatch.setattr(inbound_stream, "judge", counted)
    async with a_pair() as pair:
        pair.serve(echo)
        pair.mesh.put(in_shop(allow("shop/frontend")))
        for _ in range(3):
            await (await a_running_call(pair)).aclose()
        assert len(asked) == 1  # the same caller, the same question, the same state
        await pair.lines.wait_for_ends(6)
        first, second, third = pair.lines.ended("inbound")
        sources = {line.pop("src.addr") for line in (first, second, third)}
        assert len(sources) == 1  # that of the tunnel

        pair.mesh.put(in_shop(deny("shop/frontend", name="no-frontend")))
        for _ in range(2):
            async with await pair.call() as stream:
                await expect_abort(stream)
        assert len(asked) == 3  # a refusal is explained anew each time
        metrics = "".join(pair.mesh.node.metrics.text())
    assert 'ztunnel_policy_decisions_total{action="allow"} 3' in metrics
    assert 'ztunnel_policy_decisions_total{action="deny"} 2' in metrics

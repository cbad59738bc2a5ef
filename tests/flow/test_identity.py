"""Certificates come, go and are taken back, while connections are being made."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import h2.events
import pytest
import trio
import trio.testing
from msgspec import structs

from tests.support.builders import a_service, a_workload
from tests.support.ca import a_running_ca
from tests.support.certs import a_certificate, a_name, an_authority
from tests.support.flow import Pair, a_pair, connect, expect_abort, loopback_address
from tests.support.identity import (
    ChangeableIssuer,
    a_call,
    a_stream_of_calls,
    certificate_of,
    identity_of,
    renewed,
    sleep_until,
)
from tests.support.peers import echo, read_exactly, read_to_end
from tests.support.scripted import ScriptedClient, a_scripted_client
from ztunnel.devmesh.ca_server import CaFault
from ztunnel.identity.dev_ca import DevelopmentCa, wall_clock
from ztunnel.model.identity import TrustDomain
from ztunnel.model.workload import TunnelProtocol
from ztunnel.tls.certificate import WorkloadCertificate
from ztunnel.tls.crl import Revocations, parse_lists

REVOKED = "connection closed: peer certificate revoked by CRL"


async def a_running_call(vip: tuple[str, int]) -> trio.SocketStream:
    stream = connect(vip)
    await stream.send_all(b"ping")
    assert await read_exactly(stream, 4) == b"ping"
    return stream


async def still_runs(stream: trio.SocketStream) -> None:
    await stream.send_all(b"more")
    assert await read_exactly(stream, 4) == b"more"


def metric(pair: Pair, line: str) -> bool:
    return f"{line}\n" in "".join(pair.mesh.node.metrics.text())


# Renewal.


async def test_twenty_renewals_under_a_steady_stream_of_calls_cost_none() -> None:
    async with a_running_ca() as running:
        issuer = running.client(ttl_seconds=2)
        async with a_pair(issuer=issuer) as pair:
            pair.serve(echo)
            async with a_stream_of_calls(pair) as calls:
                with trio.fail_after(20):
                    while len(running.ca.calls) < 22:
                        # Some fall due by themselves; the others are asked for, to save time.
                        for proxy in (pair.client, pair.server):
                            await renewed(pair.mesh, proxy)
                            await trio.sleep(0.15)
            assert calls.made > 20
            inner = [one for one in running.ca.calls if one.request.impersonated]
            assert len(inner) >= 22


async def test_a_ca_that_is_down_for_nine_tenths_of_a_lifetime_costs_no_call() -> None:
    async with a_running_ca() as running, a_pair(issuer=running.client(ttl_seconds=3)) as pair:
        pair.serve(echo)
        await a_call(pair)
        running.ca.fault = CaFault.DOWN
        start, first = wall_clock(), [certificate_of(pair.client), certificate_of(pair.server)]
        end = min(one.not_after for one in first)
        async with a_stream_of_calls(pair):
            await sleep_until(start + 0.9 * (end - start))
            assert len(running.ca.calls) >= 4, "it was asked in vain"
            running.ca.fault = CaFault.NONE
            await sleep_until(max(one.not_after for one in first) + 0.1)
        assert certificate_of(pair.client) is not first[0]
        assert certificate_of(pair.server) is not first[1]


async def test_after_a_renewal_new_streams_use_a_new_connection() -> None:
    async with a_pair(issuer=ChangeableIssuer(an_authority())) as pair:
        pair.serve(echo)
        stream = await a_running_call(pair.vip)
        (old,) = pair.client.pool.tunnels()
        await renewed(pair.mesh, pair.client)
        await a_call(pair)
        assert len(pair.client.pool) == 1
        assert old in pair.client.pool.tunnels(), "it still carries a stream"
        await still_runs(stream)
        await stream.send_eof()
        assert await read_to_end(stream) == b""
        await stream.aclose()
        await pair.lines.wait_for_ends(4)
        assert old.closed, "old ones end when idle"


async def test_after_a_renewal_of_the_server_its_peers_are_sent_elsewhere() -> None:
    async with a_pair(issuer=ChangeableIssuer(an_authority())) as pair:
        pair.serve(echo)
        stream = await a_running_call(pair.vip)
        (old,) = pair.server.tunnels.all()
        await renewed(pair.mesh, pair.server)
        await a_call(pair)  # the first stream after the renewal is served, then comes GOAWAY
        await trio.testing.wait_all_tasks_blocked()
        await a_call(pair)
        assert [one for one in pair.server.tunnels.all() if one is not old]
        await still_runs(stream)
        await stream.aclose()


async def test_an_idle_tunnel_with_an_old_certificate_is_closed_in_the_end() -> None:
    async with a_pair(issuer=ChangeableIssuer(an_authority())) as pair:
        pair.serve(echo)
        await a_call(pair)
        (old,) = pair.client.pool.tunnels()
        await renewed(pair.mesh, pair.client)
        pair.client.pool.leave_old()
        await trio.testing.wait_all_tasks_blocked()
        assert old.closed
        assert len(pair.client.pool) == 0


async def test_a_connection_without_certificate_says_for_whom_and_why() -> None:
    async with a_running_ca() as running:
        running.ca.fault = CaFault.REFUSES
        async with a_pair(issuer=running.client()) as pair:
            async with await pair.call() as stream:
                await expect_abort(stream)
            (outbound,) = await pair.lines.wait_for_ends(1)
        assert outbound["reason"] == "identity_error"
        assert f"{a_name('frontend')}: signing gRPC error (UNAUTHENTICATED)" in outbound["error"]
        assert f"(CA https://localhost:{running.port})" in outbound["error"]


# Resumption.


async def test_a_second_tunnel_resumes_until_a_certificate_is_renewed() -> None:
    issuer = ChangeableIssuer(an_authority())
    async with a_pair(issuer=issuer, tls_resumption=True) as pair:
        pair.serve(echo)
        resumed = []
        for renew in (False, False, True, False):
            if renew:
                await renewed(pair.mesh, pair.client)
            await a_call(pair)
            context = pair.mesh.node.tls.server(certificate_of(pair.server)).ssl_context
            resumed.append(context.session_stats()["hits"])
            for tunnel in pair.client.pool.tunnels():
                assert tunnel.facts.peer == identity_of(pair.server)
                tunnel.close()
            await trio.testing.wait_all_tasks_blocked()
        assert resumed == [0, 1, 1, 2]
        calls = pair.lines.ended("inbound")
        assert {call["src.identity"] for call in calls} == {str(a_name("frontend"))}


# Expiry. A scripted client, as ours would leave the tunnel by itself.


async def a_stream(client: ScriptedClient, pair: Pair) -> int:
    host, port = pair.app_address
    return await client.request(f"{host}:{port}")


async def test_on_a_tunnel_whose_peer_has_expired_nothing_new_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with a_pair() as pair:
        pair.serve(echo)
        short = a_certificate(a_name("frontend"), authority=pair.mesh.authority, ttl_seconds=60)
        async with a_scripted_client(pair.hbone, short) as client:
            first = await a_stream(client, pair)
            assert await client.status(first) == 200
            certificates = pair.mesh.node.certificates
            monkeypatch.setattr(certificates, "_clock", lambda: wall_clock() + 120)
            second = await a_stream(client, pair)
            assert await client.status(second) == 503
            await client.until(h2.events.ConnectionTerminated)
            (refused,) = await pair.lines.wait_for_ends(1)
            assert "certificate of this HBONE connection has expired" in refused["error"]
            assert refused["reason"] == "identity_error"
            (tunnel,) = pair.server.tunnels.all()
            assert len(tunnel.core.streams) == 1, "what runs may go on"


# Roots.


@pytest.mark.parametrize("server_first", [False, True], ids=["client first", "server first"])
async def test_roots_are_exchanged_without_a_failed_handshake(*, server_first: bool) -> None:
    old, new = an_authority(), an_authority()
    assert old.root.subject == new.root.subject, "as Istio's, they differ only by key"
    both_old = replace(old, other_roots=(new.root,))
    both_new = replace(new, other_roots=(old.root,))
    issuer = ChangeableIssuer(old)
    async with a_pair(issuer=issuer) as pair:
        pair.serve(echo)
        proxies = [pair.client, pair.server]
        if server_first:
            proxies.reverse()
        async with a_stream_of_calls(pair) as calls:
            await a_call(pair)
            for phase in (both_old, both_new, new):
                issuer.authority = phase
                for proxy in proxies:
                    made = await renewed(pair.mesh, proxy)
                    assert made.roots_pem == phase.roots_pem
                    handshakes = issuer.issued
                    await a_call(pair)
                    await a_call(pair)
                    assert issuer.issued == handshakes
        assert calls.made > 2
        assert certificate_of(pair.client).roots_pem == new.roots_pem


async def test_without_overlap_the_exchange_of_roots_fails() -> None:
    issuer = ChangeableIssuer(an_authority())
    async with a_pair(issuer=issuer) as pair:
        pair.serve(echo)
        await a_call(pair)
        issuer.authority = an_authority()
        await renewed(pair.mesh, pair.client)
        async with await pair.call() as stream:
            await expect_abort(stream)


# Trust domains.


async def refused(pair: Pair, certificate: WorkloadCertificate) -> None:
    async with a_scripted_client(pair.hbone, certificate) as client:
        await client.closed()
        raise EOFError


@pytest.mark.parametrize("is_known", [False, True])
async def test_a_client_of_an_alias_of_our_trust_domain_is_one_of_us(*, is_known: bool) -> None:
    aliases = (TrustDomain("old.example"),) if is_known else ()
    async with a_pair(trust_domain_aliases=aliases) as pair:
        pair.serve(echo)
        name = a_name("frontend", trust_domain="old.example")
        certificate = a_certificate(name, authority=pair.mesh.authority)
        if not is_known:
            with pytest.raises((EOFError, trio.BrokenResourceError)):
                await refused(pair, certificate)
            (ended,) = await pair.lines.wait_for_ends(1)
            assert "did not present the expected trustdomain (cluster.local)" in ended["error"]
            return
        async with a_scripted_client(pair.hbone, certificate) as client:
            stream = await a_stream(client, pair)
            assert await client.status(stream) == 200
            client.h2.end_stream(stream)
            await client.send()
            await client.until(h2.events.StreamEnded)
            (ended,) = await pair.lines.wait_for_ends(1)
            assert ended["src.identity"] == str(name)


# Revocation.


@asynccontextmanager
async def two_clients(
    issuer: ChangeableIssuer, revocations: Revocations
) -> AsyncIterator[tuple[Pair, Pair]]:
    """Two client pods of different accounts that call one server pod."""
    async with a_pair(issuer=issuer, revocations=revocations) as pair:
        pair.serve(echo)
        ip = loopback_address()
        pod = a_workload("other", ns="shop", sa="other", ips=[ip], protocol=TunnelProtocol.HBONE)
        client = await pair.mesh.add_proxy(pod, hbone=0)
        port, app_port = client.addresses["outbound"].port, pair.app_address[1]
        host = "cart2.shop.svc.cluster.local"
        server = pair.server_workload
        reachable = {**server.services, f"shop/{host}": {port: app_port}}
        pair.mesh.put(
            a_workload("other", ns="shop", sa="other", ips=[], protocol=TunnelProtocol.HBONE),
            a_service(host, ns="shop", vips=[ip], port_map={port: app_port}),
        )
        pair.mesh.put(structs.replace(server, services=reachable))
        other = replace(pair, client=client, client_workload=pod, vip=(ip, port))
        yield pair, other


def in_force(revocations: Revocations, *pems: bytes) -> None:
    revocations.replace(parse_lists(b"".join(pems)))


@pytest.mark.parametrize("own_records", [True, False])
async def test_revocation_of_a_client_cuts_its_tunnels_and_no_others(*, own_records: bool) -> None:
    authority, revocations = an_authority(), Revocations()
    async with a_pair(
        issuer=ChangeableIssuer(authority), revocations=revocations, own_records=own_records
    ) as pair:
        pair.serve(echo)
        stream = await a_running_call(pair.vip)
        stranger = a_certificate(a_name("stranger"), authority=authority)
        async with a_scripted_client(pair.hbone, stranger) as client:
            number = await a_stream(client, pair)
            assert await client.status(number) == 200
            in_force(revocations, authority.revoke(stranger.serial))
            goodbye = await client.until(h2.events.ConnectionTerminated)
            assert goodbye.error_code == 0
            await client.closed()
            (ended,) = await pair.lines.wait_for_ends(1)
        assert ended["error"] == REVOKED
        assert (ended["reason"], ended["level"]) == ("revoked", "error")
        text = "".join(pair.mesh.node.metrics.text())
        assert 'istio_crl_policy_rejections_total{reporter="destination"} 1\n' in text
        assert 'response_flags="CERT_REVOKED"' in text
        await still_runs(stream)
        await stream.aclose()


async def test_exactly_the_right_tunnels_are_cut() -> None:
    authority, revocations = an_authority(), Revocations()
    async with two_clients(ChangeableIssuer(authority), revocations) as (one, other):
        mine, theirs = await a_running_call(one.vip), await a_running_call(other.vip)
        await still_runs(theirs)
        in_force(revocations, authority.revoke(certificate_of(one.client).serial))
        await expect_abort(mine)
        await still_runs(theirs)
        (inbound,) = one.lines.ended("inbound")
        assert (inbound["src.identity"], inbound["error"]) == (str(a_name("frontend")), REVOKED)
        in_force(revocations, authority.revoke(certificate_of(one.server).serial))
        await expect_abort(theirs)
        last = one.lines.ended("outbound")[-1]
        assert last["error"] == REVOKED
        assert metric(one, 'istio_crl_policy_rejections_total{reporter="source"} 1')
        await mine.aclose()
        await theirs.aclose()


async def test_with_an_intermediate_all_tunnels_below_it_are_cut() -> None:
    authority, revocations = an_authority(), Revocations()
    below: DevelopmentCa = authority.subordinate()
    issuer = ChangeableIssuer(authority, by_identity={a_name("frontend"): below})
    async with two_clients(issuer, revocations) as (one, other):
        mine, theirs = await a_running_call(one.vip), await a_running_call(other.vip)
        in_force(revocations, authority.revoke(below.signer.serial_number))
        await expect_abort(mine)
        await still_runs(theirs)
        await mine.aclose()
        await theirs.aclose()


async def test_a_revoked_server_is_refused_until_it_has_another_certificate() -> None:
    authority, revocations = an_authority(), Revocations()
    async with a_pair(issuer=ChangeableIssuer(authority), revocations=revocations) as pair:
        pair.serve(echo)
        certificate = await pair.mesh.node.certificates.certificate_for(identity_of(pair.server))
        in_force(revocations, authority.revoke(certificate.serial))
        async with await pair.call() as stream:
            await expect_abort(stream)
        await pair.lines.wait_for("outbound", "connection complete", "revoked by CRL")
        outbound = pair.lines.ended("outbound")[0]
        assert "peer certificate revoked by CRL" in outbound["error"]
        assert outbound["reason"] == "revoked"
        assert metric(pair, 'istio_crl_policy_rejections_total{reporter="source"} 1')
        await renewed(pair.mesh, pair.server)
        await trio.sleep(0.6)  # the pool remembers a failed dial for half a second
        await a_call(pair)


async def test_a_revoked_client_is_refused_in_the_handshake_and_counted() -> None:
    authority, revocations = an_authority(), Revocations()
    async with a_pair(issuer=ChangeableIssuer(authority), revocations=revocations) as pair:
        stranger = a_certificate(a_name("stranger"), authority=authority)
        in_force(revocations, authority.revoke(stranger.serial))
        with pytest.raises((EOFError, trio.BrokenResourceError)):
            await refused(pair, stranger)
        (ended,) = await pair.lines.wait_for_ends(1)
        assert "tls handshake error: peer certificate revoked by CRL" in ended["error"]
        assert metric(pair, 'istio_crl_policy_rejections_total{reporter="destination"} 1')

"""The guided tour: each step tries something a mesh promises, and says what happened and why."""

from __future__ import annotations

import os
import secrets
import socket
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import dns.message
import dns.rdatatype
import trio

from ztunnel.devmesh.mesh import DevMesh
from ztunnel.devmesh.wire_tap import WireTap

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ztunnel.devmesh.cluster import Member
    from ztunnel.model.network import IpAddress

APP_PORT = 8080
CHAT_PORT = 8081
VIP_PORT = 80
ANSWER_SECONDS = 5.0
SETTLE_SECONDS = 2.0
NO_RESOLVER = "10.96.0.53"
DNS_PORT = 53
DNS_BYTES = 4096
OUTSIDE_IP = "203.0.113.10"
LEGACY_IP = "10.244.1.200"
BALANCED_CALLS = 16
NO_CART = """
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-cart, namespace: bank}
spec:
  selector: {matchLabels: {app: ledger}}
  action: DENY
  rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/cart]}}]}]
"""
HTTP_REQUEST = b"GET "
HTTP_ANSWER = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"
WEB = "spiffe://cluster.local/ns/shop/sa/web"
CART = "spiffe://cluster.local/ns/shop/sa/cart"


@dataclass(slots=True)
class Outcome:
    """What a step found: `why` it went so, in one line."""

    held: bool
    why: str


@dataclass(slots=True)
class Call:
    """One request and what came back; `error` when nothing did."""

    answer: str = ""
    error: str = ""

    @property
    def server(self) -> str:
        """Return which application answered."""
        return self.answer.partition(" ")[0]


@dataclass(slots=True)
class Tour:
    """The steps on a running mesh. `say` prints a line."""

    mesh: DevMesh
    tap: WireTap
    say: Callable[[str], None]
    good: Callable[[str], str]
    bad: Callable[[str], str]
    results: list[bool] = field(default_factory=list)
    secret: str = field(default_factory=lambda: f"secret-{secrets.token_hex(8)}")

    def report(self, tried: str, outcome: Outcome) -> None:
        """Print one line about one step."""
        self.results.append(outcome.held)
        mark = self.good("ok  ") if outcome.held else self.bad("FAIL")
        self.say(f"{mark} {tried}: {outcome.why}")

    def address(self, pod: str, version: int = 4) -> IpAddress:
        """Return a pod's address."""
        return next(ip for ip in self.mesh.pods[pod].addresses if ip.version == version)

    def vip(self, version: int) -> IpAddress:
        """Return the service's address."""
        vips = next(iter(self.mesh.config.services)).vips
        return next(vip.ip for vip in vips if vip.ip.version == version)

    def mark(self) -> dict[str, int]:
        """Remember how far each proxy's log has come."""
        return {name: len(proxy.lines.all) for name, proxy in self.mesh.proxies.items()}

    async def line(self, node: str, since: dict[str, int], *parts: str) -> str:
        """Wait for a line in a proxy's log; empty if it does not come."""
        try:
            lines = self.mesh.proxies[node].lines
            return await lines.wait_for(*parts, since=since[node], seconds=SETTLE_SECONDS)
        except trio.TooSlowError:
            return ""

    async def call(self, source: Member, target: IpAddress | str, port: int) -> Call:
        """Ask an application something, from inside a pod or host."""
        try:
            stream = await self.mesh.connect(source, target, port)
        except OSError as error:
            return Call(error=os.strerror(error.errno) if error.errno else str(error))
        answer = b""
        try:
            async with stream:
                with trio.fail_after(ANSWER_SECONDS):
                    await stream.send_all(self.secret.encode())
                    await stream.send_eof()
                    async for chunk in stream:
                        answer += chunk
        except trio.TooSlowError:
            return Call(error="no answer in time")
        except (trio.BrokenResourceError, OSError):
            return Call(error="connection reset")
        return Call(answer=answer.decode()) if answer else Call(error="closed without an answer")

    async def tunnelled(
        self, tried: str, target: IpAddress, port: int, server: tuple[str, ...], since_node: str
    ) -> None:
        """Call from `web` and see that a tunnel with both identities carried it."""
        since = self.mark()
        call = await self.call(self.mesh.pods["web"], target, port)
        if call.error:
            self.report(tried, Outcome(held=False, why=call.error))
            return
        sent = await self.line("node-a", since, 'direction="outbound"', WEB, CART, ":15008")
        taken = await self.line(since_node, since, 'direction="inbound"', WEB, CART)
        why = f"{call.server} answered through a tunnel from {WEB} to {CART}"
        if not (sent and taken):
            why = "answered, but the log of a proxy does not show the tunnel"
        self.report(tried, Outcome(bool(sent and taken) and call.server in server, why))

    async def steps(self) -> None:
        """Run the whole tour."""
        await self.tunnelled(
            "web calls cart-a by pod IP, same node",
            self.address("cart-a"), APP_PORT, ("cart-a",), "node-a",
        )  # fmt: skip
        await self.tunnelled(
            "web calls cart-b by pod IP, other node",
            self.address("cart-b"), APP_PORT, ("cart-b",), "node-b",
        )  # fmt: skip
        await self.tunnelled(
            "web calls cart-b over IPv6, other node",
            self.address("cart-b", 6), APP_PORT, ("cart-b",), "node-b",
        )  # fmt: skip
        await self.named()
        await self.balanced()
        await self.wire()
        await self.source_address()
        await self.denied()
        await self.allowed()
        await self.plaintext()
        await self.strict()
        await self.passed_through()
        await self.policy_changes()
        await self.show_logs()

    async def named(self) -> None:
        """Ask for the service's name: the proxy answers within the pod, whomever the pod asked."""
        service = next(iter(self.mesh.config.services))
        query = dns.message.make_query(service.hostname, dns.rdatatype.A)
        web = self.mesh.pods["web"]
        sock = web.netns.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        answer = "no answer"
        with trio.socket.from_stdlib_socket(sock) as asking, trio.move_on_after(ANSWER_SECONDS):
            await asking.sendto(query.to_wire(), (NO_RESOLVER, DNS_PORT))
            reply = dns.message.from_wire((await asking.recvfrom(DNS_BYTES))[0])
            answer = ", ".join(str(record) for record in reply.answer)
        held = str(self.vip(4)) in answer
        why = f"{answer} (nobody listens at {NO_RESOLVER}, the resolver it asked)"
        self.report(f"web looks up {service.hostname}", Outcome(held, why))

    async def balanced(self) -> None:
        """Call the service often: both of its pods answer, near and far."""
        web = self.mesh.pods["web"]
        servers: dict[str, int] = {}
        for number in range(BALANCED_CALLS):
            call = await self.call(web, self.vip(6 if number % 2 else 4), VIP_PORT)
            servers[call.server or call.error] = servers.get(call.server or call.error, 0) + 1
        shown = ", ".join(f"{name} {count}x" for name, count in sorted(servers.items()))
        held = set(servers) == {"cart-a", "cart-b"}
        self.report(
            f"web calls the service cart {BALANCED_CALLS} times by its VIPs",
            Outcome(held, f"answered by {shown}"),
        )

    async def wire(self) -> None:
        """See that the calls so far were encrypted, as the wire itself shows it."""
        tally = self.tap.tally
        secret = self.secret.encode()
        held = tally.encrypted_records > 0 and secret not in tally.leaked | tally.readable
        why = (
            f"{tally.encrypted_records} encrypted TLS records in {tally.hbone_segments} packets "
            f"on port 15008, the request's text in none of {tally.segments} packets"
        )
        self.report("what the wire between the nodes shows", Outcome(held, why))

    async def source_address(self) -> None:
        """See that the application is told the caller's own address."""
        call = await self.call(self.mesh.pods["web"], self.address("cart-b"), APP_PORT)
        caller = str(self.address("web"))
        self.report(
            "the application sees the caller's own address",
            Outcome(f"caller={caller}" in call.answer, call.answer or call.error),
        )

    async def denied(self) -> None:
        """See policy refuse an identity, and say which policy it was."""
        since = self.mark()
        call = await self.call(self.mesh.pods["web"], self.address("ledger"), APP_PORT)
        line = await self.line("node-b", since, "explicitly denied by: bank/no-web", WEB)
        why = f"{call.error}; node-b's log names the policy bank/no-web and the caller"
        if not (call.error and line):
            why = f"expected a refusal in the log, got {call.answer or call.error!r}"
        held = bool(call.error and line)
        self.report("web calls ledger, which policy denies it", Outcome(held, why))

    async def allowed(self) -> None:
        """See the same pod answer somebody else."""
        call = await self.call(self.mesh.pods["cart-a"], self.address("ledger"), APP_PORT)
        self.report(
            "cart-a calls ledger, which no policy denies it",
            Outcome(call.server == "ledger", f"{call.server or call.error} answered"),
        )

    async def plaintext(self) -> None:
        """See a caller outside the mesh reach a permissive pod, in the clear."""
        since = self.mark()
        call = await self.call(self.mesh.outside["legacy"], self.address("cart-b"), APP_PORT)
        line = await self.line("node-b", since, 'direction="inbound"', f"src.addr={LEGACY_IP}")
        seen = self.secret.encode() in self.tap.tally.readable
        why = "answered in plaintext; this time the wire tap could read the request"
        if not (call.server == "cart-b" and line and seen):
            why = f"expected a readable plaintext call, got {call.answer or call.error!r}"
        self.report(
            "legacy, not in the mesh, calls cart-b (permissive)",
            Outcome(call.server == "cart-b" and bool(line) and seen, why),
        )

    async def strict(self) -> None:
        """See the same caller refused where mutual TLS is demanded."""
        since = self.mark()
        call = await self.call(self.mesh.outside["legacy"], self.address("ledger"), APP_PORT)
        line = await self.line("node-b", since, "istio_converted_static_strict", LEGACY_IP)
        why = f"{call.error}; STRICT mutual TLS refuses whoever has no identity"
        if not (call.error and line):
            why = f"expected a refusal, got {call.answer or call.error!r}"
        self.report("legacy calls ledger (STRICT)", Outcome(bool(call.error and line), why))

    async def passed_through(self) -> None:
        """See traffic to an address nobody in the mesh owns pass untouched."""
        since = self.mark()
        call = await self.call(self.mesh.pods["web"], OUTSIDE_IP, APP_PORT)
        line = await self.line("node-a", since, f"dst.addr={OUTSIDE_IP}:{APP_PORT}", "outbound")
        held = call.server == "internet" and bool(line) and "dst.hbone_addr" not in line
        caller = f"caller={self.address('web')}" in call.answer
        why = f"{call.server} answered and saw web's own address; no tunnel"
        if not (held and caller):
            why = f"expected an untouched call, got {call.answer or call.error!r}"
        self.report("web calls a host outside the mesh", Outcome(held and caller, why))

    async def policy_changes(self) -> None:
        """Add a policy to the file while a connection runs that it forbids."""
        cart, ledger = self.mesh.pods["cart-a"], self.address("ledger")
        async with await self.mesh.connect(cart, ledger, CHAT_PORT) as stream:
            await stream.send_all(b"ping")
            with trio.move_on_after(ANSWER_SECONDS):
                answer = await stream.receive_some(4)
            since = self.mark()
            path = trio.Path(self.mesh.path)
            before = await path.read_text()
            await path.write_text(before + NO_CART)
            cut = await ends(stream)
        line = await self.line("node-b", since, "closed due to policy change", "bank/no-cart")
        again = await self.call(cart, ledger, APP_PORT)
        await path.write_text(before)
        held = answer == b"ping" and cut and bool(line) and bool(again.error)
        why = "the running connection was cut, and a new one is refused"
        if not held:
            why = f"expected that to end the connection; cut: {cut}, new call: {again}"
        self.report("a policy against cart is added to the file", Outcome(held, why))

    async def show_logs(self) -> None:
        """Show the access-log lines of both sides for one connection."""
        since = self.mark()
        await self.call(self.mesh.pods["web"], self.address("cart-b"), APP_PORT)
        parts = ("connection complete", WEB, 'dst.workload="cart-b"')
        outbound = await self.line("node-a", since, 'direction="outbound"', *parts)
        inbound = await self.line("node-b", since, 'direction="inbound"', *parts)
        self.say("")
        self.say("The access log of one connection, at its source and at its destination:")
        self.say(f"  node-a  {outbound}")
        self.say(f"  node-b  {inbound}")
        self.report(
            "one line on each side for each connection",
            Outcome(bool(outbound and inbound), "shown above"),
        )


async def ends(stream: trio.SocketStream) -> bool:
    """Tell whether a connection is cut within a few seconds."""
    with trio.move_on_after(ANSWER_SECONDS):
        try:
            return await stream.receive_some() == b""
        except trio.BrokenResourceError:
            return True
    return False


async def echo(stream: trio.SocketStream) -> None:
    """Be an application that talks for as long as it is talked to."""
    try:
        async with stream:
            async for chunk in stream:
                await stream.send_all(chunk)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return  # the connection was cut


def answering(name: str) -> Callable[[trio.SocketStream], Awaitable[None]]:
    """Make an application that says who it is and whom it sees."""

    async def answer(stream: trio.SocketStream) -> None:
        host = stream.socket.getpeername()[0].removeprefix("::ffff:")
        try:
            async with stream:
                request = bytes(await stream.receive_some())
                answer = f"{name} caller={host} bytes={len(request)}"
                if request.startswith(HTTP_REQUEST):
                    answer = f"{HTTP_ANSWER}{answer}\n"
                await stream.send_all(answer.encode())
                await stream.send_eof()
                async for _ in stream:  # closing with anything unread would reset the connection
                    pass
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return  # the caller left: nothing to answer

    return answer


async def take_tour(
    mesh: DevMesh,
    *,
    say: Callable[[str], None],
    good: Callable[[str], str],
    bad: Callable[[str], str],
    then: Callable[[list[bool]], Awaitable[None]],
) -> list[bool]:
    """Start the applications and the tap, run every step; return which expectations held.

    `then` is called with that while the applications still run.
    """
    cluster = mesh.cluster
    mesh.outside["internet"] = cluster.add_outside("internet", OUTSIDE_IP)
    mesh.outside["legacy"] = cluster.add_pod(mesh.nodes["node-a"], "legacy", LEGACY_IP)
    tap = WireTap(mesh.nodes["node-b"])
    tour = Tour(mesh, tap, say, good, bad)
    tap.look_for([tour.secret.encode()])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tap.run)
        for name, member in {**mesh.pods, "internet": mesh.outside["internet"]}.items():
            listener = await mesh.listen(member, APP_PORT)
            nursery.start_soon(partial(trio.serve_listeners, answering(name), [listener]))
        chat = await mesh.listen(mesh.pods["ledger"], CHAT_PORT)
        nursery.start_soon(partial(trio.serve_listeners, echo, [chat]))
        await tour.steps()
        await then(tour.results)
        nursery.cancel_scope.cancel(reason="the tour is over")
    return tour.results


def seconds_since(start: float) -> str:
    """Print how long something took."""
    return f"{time.perf_counter() - start:.1f} s"

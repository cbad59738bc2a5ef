"""A pool of tunnels whose dials lead to real tunnels in the same reactor."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from tests.support.certs import a_name
from tests.support.tunnels import CONNECT, Heard, TunnelPair, a_permit, a_reactor
from ztunnel.errors import ZtunnelError
from ztunnel.model.network import Endpoint, parse_ip
from ztunnel.transport.attempt import Attempt
from ztunnel.transport.pool import Pool, PoolKey
from ztunnel.transport.reactor import Reactor
from ztunnel.transport.tunnel import Tunnel
from ztunnel.wire.hbone.settings import HboneSettings

KEY = PoolKey(
    a_name("frontend"), (a_name("cart"),), Endpoint.parse("192.0.2.1:15008"), parse_ip("192.0.2.9")
)


class Caller:
    """Waits for a tunnel and opens a stream."""

    def __init__(self) -> None:
        self.told = trio.Event()
        self.opened: Any = None
        self.error: ZtunnelError | None = None

    def on_tunnel(self, tunnel: Tunnel) -> None:
        self.opened = tunnel, tunnel.open(CONNECT, Heard())
        self.told.set()

    def on_no_tunnel(self, error: ZtunnelError) -> None:
        self.error = error
        self.told.set()


class Lab:
    """A pool whose dials lead to real tunnels in the same reactor."""

    def __init__(self, reactor: Reactor, nursery: trio.Nursery, **limits: Any) -> None:
        self.reactor = reactor
        self.dialled: list[PoolKey] = []
        self.peers: list[TunnelPair] = []
        self.peer_settings = HboneSettings()
        self.fail_with: Exception | None = None
        self.leaving = 0  # so many dials meet a peer that drains
        self.gate = trio.Event()  # dials wait for it
        self.gate.set()
        limits = {"streams_per_tunnel": 3, "idle_seconds": 60.0, "dial_seconds": 5.0} | limits

        self.nursery = nursery
        self.pool = Pool(reactor, self.dial, **limits)

    def dial(self, key: PoolKey, permit: object, attempt: Attempt) -> trio.CancelScope:
        self.dialled.append(key)
        scope = trio.CancelScope()

        async def carry_out() -> None:
            with scope:
                try:
                    tunnel = await self._raise(attempt.pool)
                except Exception as error:  # noqa: BLE001 - told, as a real one does
                    attempt.on_no_tunnel(error)
                else:
                    attempt.on_tunnel(tunnel)

        self.nursery.start_soon(carry_out)
        return scope

    async def _raise(self, owner: Pool) -> Tunnel:
        await self.gate.wait()
        await trio.lowlevel.checkpoint()
        if self.fail_with is not None:
            raise self.fail_with
        pair = TunnelPair(
            self.reactor,
            client_settings=HboneSettings(),
            server_settings=self.peer_settings,
            own_records=True,
        )
        pair.client._owner = owner
        self.peers.append(pair)
        if self.leaving:
            self.leaving -= 1
            pair.server.drain()
        return pair.client

    async def open(self, key: PoolKey = KEY) -> Any:
        """Do what a connection does: ask for a tunnel, and open at once when it is there."""
        caller = Caller()
        tunnel = self.pool.get(key, a_permit())
        if tunnel is not None:
            caller.on_tunnel(tunnel)
        else:
            self.pool.request(key, a_permit(), caller)
        await caller.told.wait()
        if caller.error is not None:
            raise caller.error
        return caller.opened

    async def open_many(self, number: int, key: PoolKey = KEY) -> list[Any]:
        found: list[Any] = []

        async def one() -> None:
            found.append(await self.open(key))

        async with trio.open_nursery() as nursery:
            for _ in range(number):
                nursery.start_soon(one)
        return found


@asynccontextmanager
async def a_lab(**limits: Any) -> AsyncIterator[Lab]:
    async with a_reactor() as reactor, trio.open_nursery() as nursery:
        lab = Lab(reactor, nursery, **limits)
        with trio.fail_after(10):
            yield lab
        nursery.cancel_scope.cancel()
        lab.pool.close()
        for pair in lab.peers:
            pair.server.close()
            assert pair.client.closed


def end(tunnel: Tunnel, stream: Any) -> None:
    tunnel.core.reset(stream, 8)
    tunnel.released()

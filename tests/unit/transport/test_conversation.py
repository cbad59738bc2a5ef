from __future__ import annotations

import socket

import trio

from ztunnel.transport.conversation import receive, send


async def test_more_than_the_socket_takes_is_sent_whole_and_in_order() -> None:
    near, far = socket.socketpair()
    near.settimeout(0)
    far.settimeout(0)
    wanted = bytes(range(256)) * 8000
    received = bytearray()

    async def take() -> None:
        while data := await receive(far, 50_000):
            received.extend(data)

    with near, far:
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(take)
                await send(near, wanted)
                near.shutdown(socket.SHUT_WR)
    assert received == wanted


async def test_waiting_to_receive_can_be_cancelled() -> None:
    near, far = socket.socketpair()
    near.settimeout(0)
    with near, far, trio.move_on_after(0.01) as scope:
        await receive(near, 1)
    assert scope.cancelled_caught

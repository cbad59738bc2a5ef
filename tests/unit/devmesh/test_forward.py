from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio

from tests.support.flow import abort
from tests.support.peers import (
    echo,
    echo_and_check,
    listen,
    read_to_end,
    serve,
    sink,
    upload_and_check,
)
from ztunnel.devmesh.forward import forward


@asynccontextmanager
async def a_forward(port: int) -> AsyncIterator[int]:
    async with trio.open_nursery() as nursery:
        listener, here = await listen()
        await nursery.start(forward, listener, port)
        with trio.fail_after(10):
            yield here
        nursery.cancel_scope.cancel()


async def test_connections_are_carried_both_ways_and_to_both_ends() -> None:
    for application, check in ((echo, echo_and_check), (sink, upload_and_check)):
        async with trio.open_nursery() as nursery:
            listener, port = await listen()
            await nursery.start(serve, application, listener)
            async with a_forward(port) as here:
                await check(partial(trio.open_tcp_stream, "127.0.0.1", here))
            nursery.cancel_scope.cancel()


async def test_a_server_that_is_down_ends_one_connection_after_another() -> None:
    listener, port = await listen()
    await listener.aclose()
    async with a_forward(port) as here:
        for _ in range(2):
            async with await trio.open_tcp_stream("127.0.0.1", here) as stream:
                assert await read_to_end(stream) == b""


async def test_a_caller_that_breaks_off_ends_the_other_side_and_nothing_else() -> None:
    async with trio.open_nursery() as nursery:
        listener, port = await listen()
        async with a_forward(port) as here:
            stream = await trio.open_tcp_stream("127.0.0.1", here)
            server = await listener.accept()
            abort(stream)
            with pytest.raises((trio.BrokenResourceError, AssertionError)):
                assert await server.receive_some() != b"", "the end came in good order"
            await server.aclose()
            other = await trio.open_tcp_stream("127.0.0.1", here)
            async with other, await listener.accept() as server:
                await other.send_all(b"still here")
                assert await server.receive_some() == b"still here"
        await listener.aclose()
        nursery.cancel_scope.cancel()

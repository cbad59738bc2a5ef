"""A port inside the cluster that leads to a server outside of it.

The control plane and the CA of a development mesh run in our own process, in the namespace it was
started in. A member of the cluster lends them an address: what connects to it there is carried on.
"""

from __future__ import annotations

from functools import partial

import trio

CHUNK_BYTES = 65536


async def forward(
    listener: trio.SocketListener,
    port: int,
    *,
    host: str = "127.0.0.1",
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Carry every connection of `listener` to `port` of this machine, until cancelled.

    A target that is down ends the caller's connection, and no other.
    """
    async with listener:
        task_status.started()
        await trio.serve_listeners(partial(_join, host=host, port=port), [listener])


async def _join(caller: trio.SocketStream, *, host: str, port: int) -> None:
    async with caller:
        try:
            server = await trio.open_tcp_stream(host, port)
        except OSError:
            return
        async with server, trio.open_nursery() as directions:
            directions.start_soon(_carry, caller, server, directions.cancel_scope)
            directions.start_soon(_carry, server, caller, directions.cancel_scope)


async def _carry(
    source: trio.SocketStream, target: trio.SocketStream, both: trio.CancelScope
) -> None:
    """Carry one direction to its end; if it breaks, both are over."""
    try:
        async for chunk in source:
            await target.send_all(chunk)
        await target.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        both.cancel(reason="one end left")

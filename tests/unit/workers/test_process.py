"""A real worker process; it needs no privilege until it is to serve a pod."""

from __future__ import annotations

import trio

from tests.support.worker_peers import a_script
from ztunnel.config import Config
from ztunnel.workers.messages import Begin, Ping, Ready, decode_answer
from ztunnel.workers.process import WorkerProcess

SECONDS = 20


async def read_all(process: WorkerProcess) -> bytes:
    output = b""
    while data := await process.read():
        output += data
    return output


async def test_it_stands_obeys_and_ends_with_its_link() -> None:
    process = WorkerProcess.start()
    with trio.fail_after(SECONDS):
        assert process.read_now() is None
        async with a_script(process.link, decode_answer) as control:
            control.order(Begin(Config(), 3, "info"))
            await control.next(Ready, seconds=SECONDS)
        assert b"worker ready\tworker=3" in await read_all(process)
        await process.wait()
    process.kill()  # too late, and no error
    assert process.close() == "exit status 0"


async def test_what_makes_no_sense_is_said_and_ends_it() -> None:
    process = WorkerProcess.start()
    with trio.fail_after(SECONDS):
        async with a_script(process.link, decode_answer) as control:
            control.order(Ping(1))
            output = await read_all(process)
        await process.wait()
    assert b"ztunnel: the first order is Ping\n" in output
    assert process.close() == "exit status 1"


async def test_a_signal_that_ends_it_is_named() -> None:
    process = WorkerProcess.start()
    process.kill()
    with trio.fail_after(SECONDS):
        await process.wait()
    process.link.close()
    assert process.close() == "killed by SIGKILL"

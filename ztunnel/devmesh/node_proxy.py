"""A node proxy as a real process inside a node's namespace, with its log lines within reach."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TextIO

import trio

from ztunnel.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path

    from ztunnel.devmesh.cluster import Member
    from ztunnel.identity.dev_ca import DevelopmentCa

STOP_SECONDS = 3.0
LINES_KEPT = 10_000
READ_BYTES = 65536
OURS = (sys.executable, "-m", "ztunnel")
PASSED_ON = ("PATH", "LANG", "PYTHONPATH", "VIRTUAL_ENV", "COVERAGE_PROCESS_START")


class LogLines:
    """The lines a process has written, and a way to wait for one."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._rest = b""
        self._more = trio.Event()
        self._ended = False
        self._file: TextIO | None = None

    def feed(self, data: bytes) -> None:
        """Take output as it comes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        texts = [line.decode("utf-8", "replace") for line in lines]
        self.all.extend(texts)
        if self._file is not None:
            self._file.writelines(f"{text}\n" for text in texts)
        del self.all[:-LINES_KEPT]
        self._more.set()

    def write_to(self, path: Path) -> None:
        """Keep the lines in a file from now on too, after those there are."""
        self._file = path.open("w", encoding="utf-8", buffering=1)
        self._file.writelines(f"{line}\n" for line in self.all)

    def end(self) -> None:
        """Note that nothing more will come."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._ended = True
        self._more.set()

    def find(self, *parts: str, since: int = 0) -> str | None:
        """Return the first line from number `since` on that holds all of `parts`."""
        for line in self.all[since:]:
            if all(part in line for part in parts):
                return line
        return None

    async def wait_for(self, *parts: str, since: int = 0, seconds: float = 5.0) -> str:
        """Wait for a line that holds all of `parts`.

        Raises:
            trio.TooSlowError: it did not come in time, or the process has ended without it.
        """
        with trio.fail_after(seconds):
            while (line := self.find(*parts, since=since)) is None:
                if self._ended:
                    raise trio.TooSlowError
                self._more = trio.Event()
                await self._more.wait()
            await trio.lowlevel.checkpoint()
            return line


class NodeProxy:
    """One running node proxy."""

    def __init__(self, node: Member, process: trio.Process) -> None:
        self.node = node
        self.process = process
        self.lines = LogLines()

    async def read(self) -> None:
        """Collect its output until it ends."""
        stdout = self.process.stdout
        assert stdout is not None
        try:
            while data := await stdout.receive_some(READ_BYTES):
                self.lines.feed(bytes(data))
        finally:
            self.lines.end()

    async def stop(self) -> None:
        """Ask it to drain; kill it if it takes too long."""
        self.process.terminate()
        with trio.move_on_after(STOP_SECONDS):
            await self.process.wait()
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()


@asynccontextmanager
async def running_node_proxy(
    node: Member,
    *,
    agent_socket: Path,
    config_path: Path | None = None,
    authority: DevelopmentCa | None = None,
    settings: Mapping[str, str] | None = None,
    program: Sequence[str] = OURS,
) -> AsyncIterator[NodeProxy]:
    """Run `<program> proxy ztunnel` on a node; it is gone when the block ends.

    `program` may be any that honours the reference's environment variables.
    Without a control plane it needs a static configuration and an `authority` of its own, whose
    certificate and key reach it through memory: a file without a name, held by descriptor.
    """
    fd = os.memfd_create("development-ca")
    try:
        env = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        env |= {
            "NODE_NAME": node.name,
            "INPOD_UDS": str(agent_socket),
            "CONNECTION_TERMINATION_DEADLINE": "1s",
        }
        if config_path is not None:
            env |= {"LOCAL_XDS_PATH": str(config_path), "XDS_ADDRESS": ""}
        if authority is not None:
            os.write(fd, authority.to_pem())
            env["FAKE_CA"] = f"/proc/self/fd/{fd}"
        env |= settings or {}
        words = node.command(*program, "proxy", "ztunnel")
        process = await trio.lowlevel.open_process(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            pass_fds=(fd,),
            # Ctrl-C on a terminal goes to a whole group; these are ended by us, in order.
            start_new_session=True,
        )
    finally:
        os.close(fd)
    proxy = NodeProxy(node, process)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(proxy.read)
            yield proxy
            nursery.cancel_scope.cancel(reason="node proxy stops")
    finally:
        with trio.CancelScope(shield=True):
            await proxy.stop()
            with contextlib.suppress(trio.ClosedResourceError):
                assert process.stdout is not None
                await process.stdout.aclose()


def explain_death(proxy: NodeProxy) -> ConfigError:
    """Say why a proxy ended that should not have."""
    tail = "\n".join(proxy.lines.all[-5:]) or "(no output)"
    return ConfigError(
        f"the node proxy of {proxy.node.name} ended with status {proxy.process.returncode}:\n{tail}"
    )

"""What is measured: something that joins the client's and the server's pod of a track."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from cni.redirect.apply import apply_redirect, remove_redirect
from cni.redirect.plan import RedirectPlan
from perf.processes import family
from perf.track import APP_PORT, SERVER_IP, Track
from ztunnel.devmesh.cluster import Member
from ztunnel.identity.dev_ca import DevelopmentCa

READY_SECONDS = 120.0  # ten thousand policies in a file take ten seconds of CPU at each end
POLL_SECONDS = 0.02
STOP_SECONDS = 5.0


class ContenderError(Exception):
    """A contender did not start or ended early; the message has its last words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """How contenders are to be set up for a group of shapes.

    `tunnel_per_connection`: no two connections share a tunnel, so that each needs a handshake,
    and with `resumption` one that resumes a session.
    `deny_policies`, of ten rules each, apply to the server and match nobody. `workloads`,
    `services` and `pods` are how many more of them there are, `enrolled` how many of those pods the
    client's node serves; `plain` workloads are outside the mesh, and all are the outside host.
    `plane`: the client's node has a control plane that says nothing until it is told to
    (`perf.plane`), and then so many workloads, services and policies. `settings` are environment
    variables for node proxies.
    """

    tunnel_per_connection: bool = False
    resumption: bool = False
    deny_policies: int = 1
    workloads: int = 0
    services: int = 0
    pods: int = 0
    enrolled: int = 0
    plain: int = 0
    plane: tuple[int, int, int] | None = None
    settings: tuple[tuple[str, str], ...] = ()


USUAL = Wish()


@dataclass(frozen=True, slots=True)
class Running:
    """A contender that is up: its process at the client's and at the server's end."""

    client: trio.Process
    server: trio.Process
    ready_seconds: float = 0.0  # from the start of the first process until both served
    plane: trio.Process | None = None

    @property
    def ends(self) -> tuple[list[int], list[int]]:
        """The processes of each end, in the order in which results name them, workers and all."""
        return family(self.client.pid), family(self.server.pid)


class Contender(Protocol):
    """A way to join the two pods."""

    name: str

    def running(
        self, track: Track, wish: Wish, authority: DevelopmentCa, folder: Path
    ) -> AbstractAsyncContextManager[Running | None]:
        """Run it on a track; None if it needs no process. `folder` is for its files.

        Raises:
            ContenderError: it did not come up.
        """


class Direct:
    """No proxy at all: what the machine itself can do."""

    name = "direct"

    @asynccontextmanager
    async def running(
        self, track: Track, wish: Wish, authority: DevelopmentCa, folder: Path
    ) -> AsyncIterator[Running | None]:
        """Take the redirection away."""
        del wish, authority, folder
        for pod in (track.client, track.server):
            remove_redirect(pod.netns)
        try:
            yield None
        finally:
            self._capture(track)

    @staticmethod
    def _capture(track: Track) -> None:
        for pod in (track.client, track.server):
            apply_redirect(pod.netns, RedirectPlan())


@asynccontextmanager
async def process_in(
    member: Member, words: list[str], output: Path, *, env: dict[str, str], stdin: bytes = b""
) -> AsyncIterator[trio.Process]:
    """Run a program inside a member with its output in a file; it is gone after the block."""
    with output.open("ab") as log:
        process = await trio.lowlevel.open_process(
            member.command(*words), stdin=-1, stdout=log, stderr=log, env=env
        )
    assert process.stdin is not None
    try:
        await process.stdin.send_all(stdin)
        await process.stdin.aclose()
        yield process
    finally:
        with trio.CancelScope(shield=True):
            process.terminate()
            with trio.move_on_after(STOP_SECONDS):
                await process.wait()
            process.kill()
            await process.wait()


async def answers(track: Track) -> bool:
    """Whether a byte goes through the chain and comes back."""
    sock = track.client.netns.call(trio.socket.socket)
    with sock, trio.move_on_after(1.0):
        try:
            await sock.connect((str(SERVER_IP), APP_PORT))
            await sock.send(b"E.")
            return await sock.recv(1) == b"."
        except OSError:
            return False
    return False


async def wait_until_it_answers(track: Track, running: Running, logs: list[Path]) -> None:
    """Wait until the chain works end to end.

    Raises:
        ContenderError: a process ended, or it took longer than READY_SECONDS.
    """
    with trio.move_on_after(READY_SECONDS):
        while running.client.poll() is None and running.server.poll() is None:
            if await answers(track):
                return
            await trio.sleep(POLL_SECONDS)
    said = "\n".join(f"--- {log.name}\n{tail(log)}" for log in logs)
    raise ContenderError(f"the chain does not carry a byte:\n{said}")


def tail(log: Path, lines: int = 15) -> str:
    """Give the last lines of a file."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])

"""`ztunnel demo`: the guided tour, with options to keep the mesh and to remove it again."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import trio

from ztunnel.devmesh import kept
from ztunnel.devmesh.demo import seconds_since, take_tour
from ztunnel.devmesh.kube_mesh import kube_mesh
from ztunnel.devmesh.mesh import DevMesh
from ztunnel.errors import ZtunnelError, first

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

USAGE = """\
usage: ztunnel demo [--keep | --down] [--name NAME]

Build a mesh of two nodes and four pods out of network namespaces on this machine, run a real node
proxy on each node, and show what a mesh promises. Needs root and a kernel with nftables. Nothing of
the machine's own network is changed, and nothing is left behind, whatever ends it.

options:
  --keep   leave the mesh up afterwards and say how to enter a pod
  --down   remove a mesh that was kept
  --name   what a kept mesh and its namespaces are called (default: ztdemo)
"""

NAME_CHARACTERS = 20
OUT_OF_TIME_SECONDS = 60.0
CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13, "CAP_SYS_ADMIN": 21}
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MESH_FILE = Path(str(files("ztunnel.devmesh").joinpath("demo.yaml")))


def run_demo(words: Sequence[str]) -> int:
    """Run the command; 0 only if every expectation held."""
    if {"-h", "--help"} & set(words):
        sys.stdout.write(USAGE)
        return 0
    parser = argparse.ArgumentParser(prog="ztunnel demo", add_help=False, usage=USAGE[7:])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--keep", action="store_true")
    which.add_argument("--down", action="store_true")
    parser.add_argument("--name", default=kept.DEFAULT_PREFIX, type=mesh_name)
    parser.add_argument(kept.BACKGROUND, action="store_true", dest="background")
    options = parser.parse_args(words)
    if os.geteuid() != 0:
        sys.stderr.write("ztunnel demo: needs root, to make network namespaces: try sudo\n")
        return 1
    if lacking := lacking_capabilities():
        sys.stderr.write(
            f"ztunnel demo: lacks {', '.join(lacking)}, to make network namespaces and see what "
            "is on their wires; in a container: run it with --privileged\n"
        )
        return 1
    return build_or_remove(options)


def lacking_capabilities() -> list[str]:
    """Name what we would need and may not do (capabilities(7))."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    return [name for name, bit in CAPABILITIES.items() if not effective >> bit & 1]


def mesh_name(text: str) -> str:
    """Check a name, which becomes part of file names.

    Raises:
        argparse.ArgumentTypeError: it is too long, or holds other than letters and digits.
    """
    if not (text.isascii() and text.isalnum() and len(text) <= NAME_CHARACTERS):
        raise argparse.ArgumentTypeError(
            f"{text!r}: up to {NAME_CHARACTERS} letters and digits, please"
        )
    return text


def build_or_remove(options: argparse.Namespace) -> int:
    """Do what valid options ask for."""
    structlog.configure(processors=[drop])
    try:
        if options.down:
            return kept.take_down(options.name, say=print)
        if options.keep and not options.background:
            return kept.start(options.name, say=print)
        return trio.run(tour, options.name, options.keep)
    except ZtunnelError as error:
        sys.stderr.write(f"ztunnel demo: {error}\n")
        return 1


def drop(*_: object) -> str:
    """Swallow what the node agent's part logs: the tour speaks for itself."""
    raise structlog.DropEvent


def fail(error: BaseException) -> int:
    """Say why the demo could not run."""
    for line in str(error).splitlines():
        sys.stderr.write(f"ztunnel demo: {line}\n")
    print("verdict: FAILED, the mesh could not be built; everything was removed", flush=True)
    return 1


async def tour(prefix: str, keep: bool) -> int:  # noqa: FBT001 - trio.run passes them so
    """Build the mesh, take the tour, give the exit status; a signal ends it early and cleanly."""
    status = 1
    failure: BaseException | None = None
    # Signals are caught before anything is made, so that none can end us half-way.
    with trio.open_signal_receiver(*ENDING) as signals, trio.CancelScope() as everything:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(obey, signals, everything)
                with trio.fail_after(math.inf if keep else OUT_OF_TIME_SECONDS):
                    status = await run_steps(prefix, keep=keep)
                nursery.cancel_scope.cancel(reason="the demo is over")
        except* (ZtunnelError, OSError, trio.TooSlowError) as group:
            failure = first(group)
    if failure is not None:
        return fail(failure)
    if everything.cancelled_caught:
        print("verdict: interrupted; everything was removed", flush=True)
        return 130
    return status


async def obey(signals: AsyncIterator[int], everything: trio.CancelScope) -> None:
    """End the demo in good order on Ctrl-C, a kill, or a closed terminal."""
    async for _ in signals:
        everything.cancel(reason="interrupted")


async def run_steps(prefix: str, *, keep: bool) -> int:
    """Do what the tour is about."""
    started = time.perf_counter()
    print("Building two nodes and four pods from network namespaces ...", flush=True)

    async def conclude(results: list[bool]) -> None:
        held, total = sum(results), len(results)
        verdict = (
            f"all {total} expectations held" if held == total else f"FAILED, {held} of {total} held"
        )
        print(f"\nverdict: {verdict}, in {seconds_since(started)}", flush=True)
        if keep:
            await kept.stay(prefix, mesh, status=exit_status(results))

    with kept.holding(prefix) if keep else contextlib.nullcontext():
        async with kube_mesh(MESH_FILE, prefix=prefix, keep=keep) as (mesh, _):
            print(f"The mesh is up after {seconds_since(started)}: {described(mesh)}\n", flush=True)
            results = await take_tour(mesh, say=say, good=green, bad=red, then=conclude)
    return exit_status(results)


def exit_status(results: list[bool]) -> int:
    """Return 0 only if every expectation held."""
    return 0 if all(results) else 1


def described(mesh: DevMesh) -> str:
    """List nodes and pods."""
    return "; ".join(
        f"{name} with " + ", ".join(pod.name for pod in mesh.pods.values() if pod.node is node)
        for name, node in mesh.nodes.items()
    )


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def green(text: str) -> str:
    """Colour on a terminal only."""
    return f"\x1b[32m{text}\x1b[0m" if colours() else text


def red(text: str) -> str:
    """Colour on a terminal only."""
    return f"\x1b[31m{text}\x1b[0m" if colours() else text


def colours() -> bool:
    """Whether whoever reads this wants colours."""
    wanted = "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    return wanted and sys.stdout.isatty()

"""Profile ours under one shape: `python -m perf.profile SHAPE [--end client|server]`.

The process at that end runs under `cProfile`, which counts every call and makes Python about twice
as slow: read shares and counts, not times. With `--native` it is `perf record` instead, which shows
kernel, libcrypto and the interpreter, and disturbs little.
"""

from __future__ import annotations

import argparse
import logging
import os
import pstats
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import structlog
import trio

from perf.load import Load, build
from perf.mesh_file import NODES
from perf.node_proxies import OURS, ROOT, NodeProxies
from perf.rounds import lanes
from perf.shapes import SHAPES

NATIVE_SORT = "dso,symbol"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.profile", description=__doc__)
    parser.add_argument("shape", choices=[shape.name for shape in SHAPES])
    parser.add_argument("--end", choices=("client", "server"), default="server")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--lines", type=int, default=40)
    parser.add_argument("--sort", default="tottime", help="as pstats: tottime, cumulative, ...")
    parser.add_argument("--native", action="store_true", help="use `perf record`")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to profile")
    options = parser.parse_args()
    quiet = structlog.make_filtering_bound_logger(logging.ERROR)
    structlog.configure(wrapper_class=quiet)
    with tempfile.TemporaryDirectory(prefix="perf-") as name:
        trio.run(run, options, Path(name))


async def run(options: argparse.Namespace, folder: Path) -> None:
    """Run the shape once, then show the profile."""
    shape = next(shape for shape in SHAPES if shape.name == options.shape)
    profile = folder / "profile"
    node = NODES[("client", "server").index(options.end)]
    under = (OURS[0], "-m", "cProfile", "-o", str(profile), *OURS[1:])
    profiled = {} if options.native else {node: under}
    ours = NodeProxies("ours", profiled=profiled, tree=options.tree.resolve())
    load = Load(build(folder))
    async with lanes([ours], shape.wish, load, folder) as (lane,):
        assert lane.running is not None
        pid = (lane.running.client, lane.running.server)[NODES.index(node)].pid
        recorder = native_recorder(pid, profile) if options.native else None
        command = shape.command(lane.track, options.seconds)
        print(shape.values(await load.run(lane.track.client, command, lane.running.ends)))
        if recorder is not None:
            recorder.terminate()
            recorder.wait()
            show_native(profile, options.lines)
    if not options.native:
        stats = pstats.Stats(str(profile), stream=sys.stdout)
        stats.strip_dirs().sort_stats(options.sort).print_stats(options.lines)


def native_recorder(pid: int, profile: Path) -> subprocess.Popen[bytes]:
    """Begin to sample a process.

    Raises:
        FileNotFoundError: `perf` is not installed (Debian: linux-perf).
    """
    program = shutil.which("perf")
    if program is None:
        raise FileNotFoundError("--native needs perf (Debian: apt-get install linux-perf)")
    words = (program, "record", "-q", "-F", "1999", "-p", str(pid), "-o", str(profile))
    return subprocess.Popen(words, stderr=subprocess.DEVNULL)


def show_native(profile: Path, lines: int) -> None:
    """Print the shares by library, then by symbol."""
    for sort, limit in (("dso", 12), (NATIVE_SORT, lines)):
        words = ("perf", "report", "--stdio", "-q", "-i", str(profile), "--sort", sort)
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ)
        shown = [line for line in done.stdout.splitlines() if line.strip()]
        print("\n".join(shown[:limit]), end="\n\n")


if __name__ == "__main__":
    main()

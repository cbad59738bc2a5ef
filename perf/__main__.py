"""Run benchmarks: `python -m perf [NAME ...]`. Needs root, a C compiler, and Envoy for ratios."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

import structlog
import trio

from perf.contender import Contender, ContenderError, Direct
from perf.curves import curves
from perf.documents import keep, write_documents
from perf.envoy import Envoy, find_envoy
from perf.growth import growth
from perf.load import Load, LoadError, build
from perf.node_proxies import ROOT, NodeProxies
from perf.questions import QUESTIONS, answer
from perf.report import about, table, verdict
from perf.results import Results, machine
from perf.rounds import measure
from perf.shapes import QUICK, SHAPES, Question, Shape
from perf.units import in_a_process
from ztunnel.errors import first

EVERYTHING: tuple[Question, ...] = (*SHAPES, *QUESTIONS)


def main() -> int:
    options = arguments().parse_args()
    if options.list:
        for question in EVERYTHING:
            print(f"{question.name:28} {question.title}, {question.metric.unit}")
        return 0
    if os.geteuid() != 0:
        print("perf: needs root: it builds network namespaces", file=sys.stderr)
        return 2
    quiet = structlog.make_filtering_bound_logger(logging.ERROR)
    structlog.configure(wrapper_class=quiet)
    if options.redraw:
        write_documents(EVERYTHING)
        return 0
    results = None
    try:
        results = trio.run(run_until_told, options)
    except* (ContenderError, LoadError, ValueError) as group:
        print(f"perf: {first(group)}", file=sys.stderr)
    if results is None:
        return 1
    print(about(results), table(results, EVERYTHING), verdict(results, EVERYTHING), sep="\n\n")
    if options.json:
        results.write(options.json)
    if options.docs:
        keep(results)
        write_documents(EVERYTHING)
    return 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m perf", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to measure; beginnings do")
    parser.add_argument("--list", action="store_true", help="show the names and stop")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--only", metavar="NAMES", help="contenders, separated by commas")
    parser.add_argument(
        "--peer", type=Path, metavar="PATH", help="measure this proxy too (reference environment)"
    )
    parser.add_argument(
        "--against", type=Path, metavar="TREE", help="measure our code of another checkout too"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="measure ours with N data-path processes too"
    )
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout that is ours")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results")
    parser.add_argument("--docs", action="store_true", help="rewrite docs/performance.md")
    parser.add_argument("--curves", action="store_true", help="cost curves too, as --docs does")
    parser.add_argument("--redraw", action="store_true", help="the same, from what was kept")
    return parser


async def run_until_told(options: argparse.Namespace) -> Results | None:
    """Run; None when a signal ended it, and then the contenders have ended as well."""
    results = None
    async with trio.open_nursery() as nursery:

        async def obey() -> None:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for _ in signals:
                    nursery.cancel_scope.cancel(reason="told to end")

        nursery.start_soon(obey)
        results = await run(options)
        nursery.cancel_scope.cancel(reason="all is measured")
    return results


async def run(options: argparse.Namespace) -> Results:
    """Measure what was asked for.

    Raises:
        ContenderError: one does not start.
        LoadError: the load generator cannot be built.
        ValueError: a name means nothing.
    """
    questions = chosen([*options.names, *(QUICK if options.quick else ())])
    contenders = list(contenders_of(options))
    load_before = os.getloadavg()[0]
    results = Results([one.name for one in contenders], options.rounds, options.seconds)
    with tempfile.TemporaryDirectory(prefix="perf-") as name:
        folder = Path(name)
        load = Load(build(folder))
        shapes = [question for question in questions if isinstance(question, Shape)]
        if shapes:
            results.samples += await measure(
                shapes, contenders, load, folder, rounds=options.rounds, seconds=options.seconds
            )
        for question in questions:
            if not isinstance(question, Shape):
                results.samples += await answer(question, contenders, load, folder, options.rounds)
        if options.docs or options.curves:
            results.curves = await trio.to_thread.run_sync(curves)
            results.units = await trio.to_thread.run_sync(in_a_process)
            ours = NodeProxies("ours", tree=options.tree.resolve())
            results.growth = await growth(ours, load, folder / "growth")
    results.machine = machine(load_before)
    return results


def contenders_of(options: argparse.Namespace) -> list[Contender]:
    known: list[Contender] = [Direct()]
    wanted = options.only.split(",") if options.only else None
    if wanted is None or "envoy" in wanted:
        known.append(Envoy(find_envoy()))
    known.append(NodeProxies("ours", tree=options.tree.resolve()))
    if options.workers is not None:
        known.append(with_workers(options.workers, options.tree.resolve()))
    if options.peer is not None:
        known.append(NodeProxies("peer", (str(options.peer.resolve()),)))
    if options.against is not None:
        known.append(NodeProxies("before", tree=options.against.resolve()))
    return [one for one in known if wanted is None or one.name in wanted]


def with_workers(count: int, tree: Path) -> NodeProxies:
    settings = {"ZTUNNEL_WORKER_THREADS": str(count)}
    return NodeProxies(f"{count} workers", settings=settings, tree=tree)


def chosen(names: list[str]) -> list[Question]:
    """Find questions by the beginning of their names; none means all."""
    for name in names:
        if not any(question.name.startswith(name) for question in EVERYTHING):
            raise ValueError(f"nothing is called {name}; see --list")
    return [one for one in EVERYTHING if not names or one.name.startswith(tuple(names))]


if __name__ == "__main__":
    sys.exit(main())

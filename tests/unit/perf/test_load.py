"""The load generator: what it reports, and that a failure does not look like a result."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perf.load import build
from tests.support.ports import claimed_port

pytestmark = pytest.mark.requires_program("cc")

HERE = "127.0.0.1"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("load"))


@pytest.fixture(scope="module")
def port(program: Path) -> Iterator[int]:
    with claimed_port() as chosen:
        server = subprocess.Popen([program, "serve", str(chosen)])
        try:
            while not listens(chosen):
                assert server.poll() is None
            yield chosen
        finally:
            server.kill()
            server.wait()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HERE, port)) == 0


def run(program: Path, *words: object) -> dict[str, Any]:
    done = subprocess.run(
        [program, *map(str, words)], capture_output=True, text=True, check=True, timeout=20
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("way", ["up", "down"])
def test_bulk_counts_bytes(program: Path, port: int, way: str) -> None:
    found = run(program, "bulk", HERE, port, 2, way, 0.1)
    assert found["bytes"] > 0
    assert found["seconds"] == pytest.approx(0.1, rel=1)


def test_echo_counts_round_trips_and_their_times(program: Path, port: int) -> None:
    found = run(program, "echo", HERE, port, 4, 1000, 0.1)
    assert found["count"] > 0
    assert 0 < found["p50_us"] <= found["p99_us"] <= found["worst_us"]


def test_connect_opens_connections_from_ever_new_addresses(program: Path, port: int) -> None:
    found = run(program, "connect", HERE, port, 4, "127.1.0.1", 0.1)
    assert found["count"] > 0
    assert found["failures"] == 0
    assert found["sources"] >= found["count"] + 4  # those of the warm-up too


def test_cpu_of_a_process_is_read_at_both_ends_of_the_window(program: Path, port: int) -> None:
    busy = subprocess.Popen(["sh", "-c", "while :; do :; done"])
    try:
        (seconds,) = run(program, "echo", HERE, port, 1, 64, 0.2, busy.pid)["cpu"]
    finally:
        busy.kill()
        busy.wait()
    assert 0 < seconds < 1


def test_hold_keeps_connections_until_its_input_ends(program: Path, port: int) -> None:
    words = [str(program), "hold", HERE, str(port), "10", "-"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert json.loads(holder.stdout.readline())["held"] == 10
        assert holder.poll() is None
        holder.stdin.close()
        assert holder.wait(timeout=10) == 0


def test_nobody_at_the_far_end_is_a_failure_and_no_result(program: Path) -> None:
    with claimed_port() as nobodys:
        words = [str(program), "echo", HERE, str(nobodys), "1", "64", "0.1"]
        done = subprocess.run(words, capture_output=True, check=False, timeout=20)
    assert done.returncode == 1
    assert done.stdout == b""

"""The plugin as the runtime starts it, on a host that has nothing: no Python, no libc, no shell."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cni.install.bundle import LAUNCHER, VERSIONS, Site, install_bundle, version_of
from cni.install.donor import inspect_donor
from tests.support.empty_host import BIN, PREVIOUS, RUN_DIR, EmptyHost, config
from tests.support.namespaces import needs_root
from tests.support.plugin_agent import StandInAgent

pytestmark = [pytest.mark.netns, pytest.mark.requires_program("chroot", "unshare"), needs_root]

PYTHON = Path(getattr(sys, "_base_executable", sys.executable))
# The plugin takes 2.6 times as much of a processor as its interpreter alone, idle or beside other
# work. With http.client or logging it would be 5 times and more.
RATIO_MAX = 3.8
ROUNDS = 9


@pytest.fixture(scope="module")
def host() -> Iterator[EmptyHost]:
    root = Path(tempfile.mkdtemp(prefix="host"))
    run_dir = root / RUN_DIR.lstrip("/")
    run_dir.mkdir(parents=True)
    (root / BIN.lstrip("/")).mkdir(parents=True)
    donor, site = inspect_donor(PYTHON), Site(root / BIN.lstrip("/"), BIN)
    install_bundle(donor, site, version_of(donor, site))
    with StandInAgent(run_dir) as agent:
        yield EmptyHost(root, agent)
    shutil.rmtree(root)


def test_there_is_nothing_else_on_this_host(host: EmptyHost) -> None:
    assert {path.name for path in host.root.iterdir()} == {"opt", "var"}
    assert {path.name for path in host.bin.iterdir()} == {LAUNCHER, VERSIONS}


@pytest.mark.parametrize("read_only", [False, True])
def test_a_pod_is_announced_and_its_result_passed_on(host: EmptyHost, *, read_only: bool) -> None:
    host.agent.requests.clear()
    run = host.runs("ADD", config(), read_only=read_only)
    assert (run.returncode, run.stdout.decode()) == (0, PREVIOUS + "\n"), run.stderr
    assert [body["PodName"] for body in host.agent.bodies] == ["cart-0"]


def test_nothing_is_written_but_the_log(host: EmptyHost) -> None:
    def files() -> set[Path]:
        return {path for path in host.root.rglob("*") if path.name != "istio-cni.log"}

    before = files()
    host.runs("ADD", config())
    assert files() == before
    log = (host.root / "var/run/istio-cni/istio-cni.log").read_text().splitlines()
    assert json.loads(log[-1])["pod"] == "shop/cart-0"


def test_a_pod_that_the_agent_refuses_fails_with_its_words(host: EmptyHost) -> None:
    run = host.is_refused(500, "no proxy is connected")
    assert run.returncode == 1
    assert json.loads(run.stdout) == {
        "cniVersion": "1.0.0",
        "code": 100,
        "msg": "node agent answers 500",
        "details": "no proxy is connected",
    }


def test_an_excluded_namespace_needs_no_agent(host: EmptyHost) -> None:
    run = host.runs("ADD", config(cni_agent_run_dir="/nowhere"), namespace="kube-system")
    assert (run.returncode, run.stdout.decode()) == (0, PREVIOUS + "\n")


# From which version of the specification on there is a command.
SINCE = {"ADD": "0.1.0", "DEL": "0.1.0", "CHECK": "0.4.0", "STATUS": "1.1.0", "GC": "1.1.0"}


@pytest.mark.parametrize("spec", ["0.3.1", "0.4.0", "1.0.0", "1.1.0"])
@pytest.mark.parametrize("command", SINCE)
def test_each_command_in_each_version_of_the_specification(
    host: EmptyHost, command: str, spec: str
) -> None:
    previous = f'{{"cniVersion": "{spec}", "ips": [], "dns": {{}}}}'
    run = host.runs(command, config(previous if command == "ADD" else None, cniVersion=spec))
    if spec < SINCE[command]:
        assert (run.returncode, json.loads(run.stdout)["code"]) == (1, 1)
        assert json.loads(run.stdout)["cniVersion"] == spec
    else:
        assert run.returncode == 0, run.stdout
        assert run.stdout.decode() == (f"{previous}\n" if command == "ADD" else "")


def test_it_tells_the_versions_it_knows(host: EmptyHost) -> None:
    run = host.runs("VERSION", '{"cniVersion": "1.1.0"}')
    assert run.returncode == 0
    assert {"0.3.1", "0.4.0", "1.0.0", "1.1.0"} <= set(json.loads(run.stdout)["supportedVersions"])


@pytest.mark.parametrize("command", ["DEL", "CHECK"])
def test_what_has_nothing_to_do_says_nothing(host: EmptyHost, command: str) -> None:
    run = host.runs(command, config(None, cni_agent_run_dir="/nowhere"))
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")


def cpu_seconds_of(call: Callable[[], object]) -> float:
    """Measure what the programs that `call` runs take of a processor, waiting not included."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    call()
    return used() - before


def test_it_starts_fast_enough_for_every_pod(host: EmptyHost) -> None:
    """Compare with its interpreter that does nothing, because no two machines are equally fast."""
    (version,) = (host.bin / VERSIONS).iterdir()
    python = f"{BIN}/{VERSIONS}/{version.name}/bin/python"
    nothing = ["chroot", str(host.root), python, "-ISXutf8", "-c", "pass"]
    plugin = min(cpu_seconds_of(lambda: host.runs("ADD", config())) for _ in range(ROUNDS))
    bare = min(cpu_seconds_of(lambda: subprocess.run(nothing, check=True)) for _ in range(ROUNDS))
    assert plugin / bare < RATIO_MAX, f"{plugin * 1e3:.1f} ms against {bare * 1e3:.1f} ms"

"""The plugin on an empty host for arm64: laid down by Debian 13's own Python, and run there.

Of the processor everything is emulated, of the system nothing: the kernel is this machine's.
"""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cni.install.bundle import LAUNCHER, VERSIONS
from cni.install.elf import read_parts
from tests.support.arm64 import IS_NATIVE, MACHINE, PYTHON, ROOT, Way, the_kernels_way
from tests.support.empty_host import BIN, PREVIOUS, RUN_DIR, EmptyHost, config
from tests.support.namespaces import needs_root
from tests.support.plugin_agent import StandInAgent

pytestmark = [
    pytest.mark.netns,
    pytest.mark.requires_program("chroot", "unshare", f"{ROOT}{PYTHON}"),
    pytest.mark.timeout(180),  # as long as arm64.py waits, and more
    needs_root,
]

LOADER = "ld-linux-aarch64.so.1"
PROJECT = Path(__file__).parents[2]
BY_THE_KERNEL = pytest.param(None, id="started by the kernel", marks=pytest.mark.newer_kernel)
BY_QEMU = pytest.param(Way.QEMU, id="started by qemu")
# What the installer does, with a plugin that has one module more, then with ours, then again.
INSTALL = f"""
import os, sys
sys.path.insert(0, "/tree")
from dataclasses import replace
from pathlib import Path
from cni.install.bundle import Site, install_bundle, version_of
from cni.install.donor import inspect_donor
donor, site = inspect_donor(Path(sys.executable)), Site(Path("/host{BIN}"), "{BIN}")
added = (donor.dynload.parent / "added.py", Path(os.__file__))
for donor in (replace(donor, modules=(*donor.modules, added)), donor, donor):
    version = version_of(donor, site)
    print(version, install_bundle(donor, site, version))
"""


@pytest.fixture(scope="module", params=[BY_THE_KERNEL] if IS_NATIVE else [BY_THE_KERNEL, BY_QEMU])
def way(request: pytest.FixtureRequest) -> Way:
    found = request.param or the_kernels_way()
    if isinstance(found, str):
        pytest.skip(f"not given: {found}")
    return found


@pytest.fixture(scope="module")
def installed(way: Way) -> Iterator[tuple[EmptyHost, list[str]]]:
    """Give the host, and what the installer has said."""
    root = Path(tempfile.mkdtemp(prefix="host"))
    tree = Path(tempfile.mkdtemp(prefix="tree"))
    try:
        for folder in (RUN_DIR, BIN):
            (root / folder.lstrip("/")).mkdir(parents=True)
        # Copies, because Python leaves what it has compiled beside them.
        for name in ("cni", "ztunnel"):
            shutil.copytree(
                PROJECT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        said = way.run_python(INSTALL, tree=tree, host=root).splitlines()
        with StandInAgent(root / RUN_DIR.lstrip("/")) as agent:
            yield EmptyHost(root, agent, way.command), said
    finally:
        shutil.rmtree(root)
        shutil.rmtree(tree)


@pytest.fixture
def host(installed: tuple[EmptyHost, list[str]]) -> EmptyHost:
    return installed[0]


def machine_of(program: bytes) -> int:
    return int(struct.unpack_from("<H", program, 18)[0])


def test_a_version_follows_another_and_is_laid_down_once(
    installed: tuple[EmptyHost, list[str]],
) -> None:
    host, said = installed
    (older, first), (newer, second), (same, third) = (line.split() for line in said)
    assert (first, second, third) == ("True", "True", "False")
    assert older != newer == same
    assert {path.name for path in host.root.iterdir()} == {"opt", "var"}
    assert {path.name for path in host.bin.iterdir()} == {LAUNCHER, VERSIONS}
    assert {path.name for path in (host.bin / VERSIONS).iterdir()} == {older, newer}
    first_line = (host.bin / LAUNCHER).read_text().partition("\n")[0]
    assert first_line.startswith(f"#!{BIN}/{VERSIONS}/{newer}/bin/python ")


def test_each_part_is_for_arm64_and_finds_its_loader(host: EmptyHost) -> None:
    for version in (host.bin / VERSIONS).iterdir():
        program = (version / "bin/python").read_bytes()
        assert read_parts(program).loader == f"{BIN}/{VERSIONS}/{version.name}/lib/{LOADER}"
        names = {path.name for path in (version / "lib").iterdir()}
        assert {LOADER, "libc.so.6", *read_parts(program).needed} <= names
        files = [path.read_bytes() for path in version.rglob("*") if path.is_file()]
        assert {machine_of(data) for data in files if data.startswith(b"\x7fELF")} == {MACHINE}


def test_it_tells_the_versions_it_knows(host: EmptyHost) -> None:
    run = host.runs("VERSION", '{"cniVersion": "1.1.0"}')
    assert run.returncode == 0, run.stderr
    assert {"0.3.1", "0.4.0", "1.0.0", "1.1.0"} <= set(json.loads(run.stdout)["supportedVersions"])


@pytest.mark.parametrize("read_only", [False, True])
def test_a_pod_is_announced_and_its_result_passed_on(host: EmptyHost, *, read_only: bool) -> None:
    host.agent.requests.clear()
    run = host.runs("ADD", config(), read_only=read_only)
    assert (run.returncode, run.stdout.decode()) == (0, PREVIOUS + "\n"), run.stderr
    [body] = host.agent.bodies
    assert (body["PodNamespace"], body["PodName"]) == ("shop", "cart-0")
    assert body["Netns"] == "/var/run/netns/cni-1"


def test_a_pod_that_the_agent_refuses_fails_with_its_words(host: EmptyHost) -> None:
    run = host.is_refused(500, "no proxy is connected")
    assert run.returncode == 1, run.stderr
    assert json.loads(run.stdout)["details"] == "no proxy is connected"


def test_a_deletion_needs_no_agent_and_says_nothing(host: EmptyHost) -> None:
    run = host.runs("DEL", config(None, cni_agent_run_dir="/nowhere"))
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")

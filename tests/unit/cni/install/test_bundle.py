from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cni.install.bundle import (
    LAUNCHER,
    VERSIONS,
    Site,
    install_bundle,
    launcher_text,
    remove_bundle,
    version_of,
)
from cni.install.donor import Donor, inspect_donor
from cni.install.errors import BundleError

PYTHON = Path(getattr(sys, "_base_executable", sys.executable))


@pytest.fixture(scope="module")
def donor() -> Donor:
    return inspect_donor(PYTHON)


@pytest.fixture
def site() -> Iterator[Site]:
    folder = Path(tempfile.mkdtemp(prefix="cni"))  # a first line has room for a short path only
    yield Site(folder, str(folder))
    shutil.rmtree(folder)


def newer(donor: Donor, folder: Path, text: str) -> Donor:
    """Give a donor with another module, as a new version of the plugin has."""
    added = folder / "added.py"
    added.write_text(text)
    target = donor.dynload.parent / "added.py"
    return replace(donor, modules=(*donor.modules, (target, added)))


def install(donor: Donor, site: Site) -> bool:
    return install_bundle(donor, site, version_of(donor, site))


def versions(site: Site) -> set[str]:
    return {path.name for path in site.versions().iterdir()}


def launched(site: Site) -> str:
    first = (site.folder / LAUNCHER).read_text().partition("\n")[0]
    return first.partition(f"/{VERSIONS}/")[2].partition("/")[0]


def answer(site: Site) -> object:
    run = subprocess.run(
        [site.folder / LAUNCHER], env={"CNI_COMMAND": "VERSION"}, capture_output=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, b"")
    return json.loads(run.stdout)["cniVersion"]


def test_it_runs_from_its_own_files(donor: Donor, site: Site) -> None:
    assert install(donor, site)
    assert answer(site) == "1.1.0"
    python = site.versions() / launched(site) / "bin" / "python"
    probe = (
        "print(*(line.split()[-1] for line in open('/proc/self/maps') if '.so' in line), sep='\\n')"
    )
    run = subprocess.run([python, "-ISc", probe], capture_output=True, text=True, check=True)
    mapped = set(run.stdout.split())
    assert mapped
    assert {path for path in mapped if not path.startswith(str(site.folder))} == set()


def test_a_second_pass_has_nothing_to_do(donor: Donor, site: Site) -> None:
    install(donor, site)
    assert not install(donor, site)


def test_everything_is_compiled(donor: Donor, site: Site) -> None:
    install(donor, site)
    library = site.versions() / launched(site) / donor.dynload.parent
    sources = list(library.rglob("*.py"))
    assert len(sources) == len(list(library.rglob("*.pyc"))) == len(donor.modules)


def test_an_upgrade_switches_and_keeps_what_may_be_running(
    donor: Donor, site: Site, tmp_path: Path
) -> None:
    names = []
    for text in ("one = 1", "two = 2", "three = 3"):
        install(newer(donor, tmp_path, text), site)
        names.append(launched(site))
    assert versions(site) == set(names[1:])
    assert answer(site) == "1.1.0"


def test_an_upgrade_does_not_disturb_who_runs(donor: Donor, site: Site, tmp_path: Path) -> None:
    install(donor, site)
    env = {"CNI_COMMAND": "STATUS", "CNI_PATH": "/x"}
    pipe = subprocess.PIPE
    with subprocess.Popen([site.folder / LAUNCHER], env=env, stdin=pipe, stdout=pipe) as running:
        install(newer(donor, tmp_path, "one = 1"), site)
        out, _ = running.communicate(b'{"name": "n", "cniVersion": "1.1.0"}', timeout=30)
    assert (running.returncode, out) == (0, b"")


@pytest.mark.parametrize("damage", ["removed", "cut short"])
def test_damage_is_repaired(donor: Donor, site: Site, damage: str) -> None:
    install(donor, site)
    victim = site.versions() / launched(site) / "bin" / "python"
    if damage == "removed":
        victim.unlink()
    else:
        victim.write_bytes(b"")
    assert install(donor, site)
    assert answer(site) == "1.1.0"


@pytest.mark.parametrize("other", [b"\x7fELF the reference's plugin", b"", b"#!/bin/sh\n"])
def test_another_plugin_of_our_name_is_replaced(donor: Donor, site: Site, other: bytes) -> None:
    (site.folder / LAUNCHER).write_bytes(other)
    assert install(donor, site)
    assert answer(site) == "1.1.0"


def test_a_killed_installation_leaves_nothing_after_the_next(donor: Donor, site: Site) -> None:
    (site.folder / f"{LAUNCHER}.tmp.12345678").touch()
    (site.versions() / "abc.new.1").mkdir(parents=True)
    install(donor, site)
    assert versions(site) == {launched(site)}
    assert sorted(path.name for path in site.folder.iterdir()) == [VERSIONS, LAUNCHER]


def test_removal_leaves_the_folder_as_it_was(donor: Donor, site: Site) -> None:
    (site.folder / "bridge").touch()
    install(donor, site)
    remove_bundle(site)
    remove_bundle(site)
    assert [path.name for path in site.folder.iterdir()] == ["bridge"]
    remove_bundle(Site(site.folder / "missing", ""))


def test_a_place_that_cannot_be_written_to_is_an_error(donor: Donor, tmp_path: Path) -> None:
    (tmp_path / "bin").touch()
    with pytest.raises(BundleError, match="cannot install"):
        install(donor, Site(tmp_path / "bin", "/opt/cni/bin"))
    assert (tmp_path / "bin").read_bytes() == b""


@pytest.mark.parametrize(
    ("field", "content", "why"),
    [
        ("modules", b"def :", "does not compile"),
        ("libraries", b"not a library", "cannot be moved"),
        ("libraries", None, "cannot install"),
    ],
)
def test_what_cannot_be_laid_down_leaves_what_was_there(
    donor: Donor, site: Site, tmp_path: Path, field: str, content: bytes | None, why: str
) -> None:
    install(donor, site)
    before = versions(site)
    part = tmp_path / "part"
    if content is not None:
        part.write_bytes(content)
    broken = replace(donor, **{field: ((donor.dynload.parent / "part.py", part),)})
    with pytest.raises(BundleError, match=why):
        install(broken, site)
    assert versions(site) == before
    assert answer(site) == "1.1.0"


def test_a_path_too_long_for_a_first_line_is_an_error_and_changes_nothing(
    donor: Donor, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="too long"):
        install(donor, Site(tmp_path, "/" + "x" * 100))
    assert list(tmp_path.iterdir()) == []


def test_the_first_line_has_one_argument() -> None:
    text = launcher_text(Site(Path("/host/opt/cni/bin"), "/opt/cni/bin/"), "0123").decode()
    assert text.startswith("#!/opt/cni/bin/.istio-cni/0123/bin/python -ISXutf8\n")

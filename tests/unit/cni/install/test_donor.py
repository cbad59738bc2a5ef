from __future__ import annotations

import os
import struct
import sys
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest

from cni.install.donor import Donor, inspect_donor
from cni.install.elf import read_parts
from cni.install.errors import BundleError

PYTHON = Path(getattr(sys, "_base_executable", sys.executable))
OF_NOBODY = 0x7FFE  # no processor has this number
HOME = PurePosixPath(sys.platlibdir, f"python{sys.version_info[0]}.{sys.version_info[1]}")


@pytest.fixture(scope="module")
def donor() -> Donor:
    return inspect_donor(PYTHON)


def test_the_plugin_and_what_it_imports_are_taken_along(donor: Donor) -> None:
    targets = {target for target, _ in donor.modules}
    assert HOME / "cni/plugin/__main__.py" in targets
    assert HOME / "cni/__init__.py" in targets
    assert HOME / "json/decoder.py" in targets
    assert HOME / "os.py" in targets
    assert HOME / "encodings/utf_8.py" in targets


def test_nothing_else_is(donor: Donor) -> None:
    targets = {str(target) for target, _ in donor.modules}
    assert not [target for target in targets if "site-packages" in target or "install" in target]
    assert len(targets) < 80


def test_every_library_that_a_part_asks_for_is_taken_along(donor: Donor) -> None:
    names = {target.name for target, _ in donor.libraries} | {donor.loader_name}
    parts = [donor.executable, *(source for _, source in (*donor.libraries, *donor.extensions))]
    for part in parts:
        assert set(read_parts(part.read_bytes()).needed) <= names, part


def test_the_loader_goes_by_the_name_that_programs_know(donor: Donor) -> None:
    loader = read_parts(donor.executable.read_bytes()).loader
    assert loader is not None
    assert donor.loader_name == Path(loader).name
    assert donor.loader.samefile(loader)


def test_the_digest_changes_with_content_and_place(donor: Donor, tmp_path: Path) -> None:
    edited = tmp_path / "edited.py"
    edited.write_text("pass")
    (target, _), *others = donor.modules
    changed = replace(donor, modules=((target, edited), *others))
    assert donor.digest("/a") == donor.digest("/a")
    assert len({donor.digest("/a"), donor.digest("/b"), changed.digest("/a")}) == 3


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("#!/bin/sh\nexit 3\n", "cannot run the plugin"),
        ("not a program", r"does not run: .*'\)$"),
    ],
)
def test_what_is_no_python_is_refused(tmp_path: Path, script: str, why: str) -> None:
    program = tmp_path / "python"
    program.write_text(script)
    program.chmod(0o755)
    with pytest.raises(BundleError, match=why):
        inspect_donor(program)


def test_a_python_for_another_processor_is_refused_by_its_name(tmp_path: Path) -> None:
    own = PYTHON.resolve().read_bytes()
    program = tmp_path / "python"
    program.write_bytes(own[:18] + struct.pack("<H", OF_NOBODY) + own[20:])
    program.chmod(0o755)
    why = f"does not run: .*it is for processor {OF_NOBODY}, and this node is {os.uname().machine}"
    with pytest.raises(BundleError, match=why):
        inspect_donor(program)

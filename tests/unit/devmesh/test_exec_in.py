from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.namespaces import needs_root
from ztunnel.devmesh import exec_in
from ztunnel.devmesh.cluster import new_namespace


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-S", exec_in.__file__, *words],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.netns
@needs_root
def test_the_program_runs_inside_with_its_arguments_and_status() -> None:
    with new_namespace() as space:
        path = f"/proc/{os.getpid()}/fd/{space.fileno()}"
        done = run(path, "sh", "-c", 'readlink /proc/self/ns/net; echo "$1"; exit 7', "sh", "a b")
    assert done.stdout == f"net:[{space.id.inode}]\na b\n"
    assert done.returncode == 7


@pytest.mark.netns
@needs_root
def test_a_missing_program_is_reported() -> None:
    done = run("/proc/self/ns/net", "no-such-program")
    assert (done.returncode, done.stderr) == (
        126,
        "exec_in: no-such-program: No such file or directory\n",
    )


def test_too_few_words_show_the_usage() -> None:
    done = run("/proc/self/ns/net")
    assert done.returncode == 126
    assert done.stderr.startswith("usage:")


def test_a_missing_namespace_is_reported(tmp_path: Path) -> None:
    done = run(str(tmp_path / "missing"), "true")
    assert done.returncode == 126
    assert "No such file" in done.stderr


def test_what_is_no_namespace_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run(str(tmp_path / "file"), "true")
    assert done.returncode == 126
    assert "setns" in done.stderr

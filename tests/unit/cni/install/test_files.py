from __future__ import annotations

import os
from pathlib import Path

import pytest

from cni.install.errors import ConflistError
from cni.install.files import (
    CONF_BYTES_MAX,
    delete_file,
    delete_leftovers,
    mode_of,
    move_file,
    read_confs,
    sync_folder,
    write_file,
)

SAVED = ".saved"


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "10-x.conflist"
    target.write_bytes(b"old")
    with target.open("rb") as reader:
        write_file(target, b"new", mode=0o640)
        assert reader.read() == b"old"
    assert target.read_bytes() == b"new"
    assert mode_of(target) == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["10-x.conflist"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "10-x.conflist"
    target.mkdir()
    (target / "inside").touch()
    with pytest.raises(OSError, match="directory"):
        write_file(target, b"new", mode=0o600)
    assert [path.name for path in tmp_path.iterdir()] == ["10-x.conflist"]


def test_a_symbolic_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"old")
    (tmp_path / "link").symlink_to(victim)
    write_file(tmp_path / "link", b"new", mode=0o600)
    assert victim.read_bytes() == b"old"
    assert (tmp_path / "link").read_bytes() == b"new"


def test_files_are_moved_over_others_and_deleted_twice(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    move_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"a"
    delete_file(tmp_path / "b")
    delete_file(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []
    assert mode_of(tmp_path / "b") is None


def test_a_folder_that_is_none_cannot_be_synced(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "missing")


def test_only_what_a_runtime_reads_and_what_was_put_aside_is_read(tmp_path: Path) -> None:
    for name in ("b.conf", "a.conflist", "c.json", "d.conf.saved", "e.conf.tmp.12", "f"):
        (tmp_path / name).write_text(name)
    (tmp_path / "g.conf").mkdir()
    (tmp_path / "dangling.conf").symlink_to("nowhere")
    os.truncate(tmp_path / "c.json", CONF_BYTES_MAX + 1)
    (tmp_path / "long.conf").touch()
    os.truncate(tmp_path / "long.conf", CONF_BYTES_MAX + 1)
    found = read_confs(tmp_path, saved_ending=SAVED)
    assert found == {name: name.encode() for name in ("a.conflist", "b.conf", "d.conf.saved")}


def test_a_folder_that_is_not_there_yet_is_empty(tmp_path: Path) -> None:
    assert read_confs(tmp_path / "net.d", saved_ending=SAVED) == {}


def test_a_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "net.d").touch()
    with pytest.raises(ConflistError):
        read_confs(tmp_path / "net.d", saved_ending=SAVED)


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    for name in ("x.tmp.0a1b2c3d", "x.tmp.", "xx.tmp.1", "x"):
        (tmp_path / name).touch()
    delete_leftovers(tmp_path, "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "xx.tmp.1"]

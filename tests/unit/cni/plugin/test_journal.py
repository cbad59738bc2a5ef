from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cni.plugin.journal import BACKUP_NAME, FILE_NAME, SOCKET_NAME, Journal, append_line
from tests.support.plugin_agent import StandInAgent


def lines_of(chunks: list[bytes]) -> list[dict[str, str]]:
    return [json.loads(chunk) for chunk in chunks]


def a_journal(run_dir: Path, level: str = "info") -> tuple[Journal, list[bytes]]:
    written: list[bytes] = []
    journal = Journal(written.append, now=lambda: 0.0)
    journal.configure(run_dir=str(run_dir), level=level)
    return journal, written


def test_a_line_has_what_the_agent_needs_to_show_it(tmp_path: Path) -> None:
    journal, written = a_journal(tmp_path)
    journal.bind(command="ADD", pod="n/p")
    journal.info("pod passed by", reason="namespace is excluded")
    line = {
        "level": "info",
        "time": "1970-01-01T00:00:00Z",
        "msg": "pod passed by",
        "command": "ADD",
        "pod": "n/p",
        "reason": "namespace is excluded",
    }
    assert lines_of(written) == [line]
    assert json.loads((tmp_path / FILE_NAME).read_text()) == line


@pytest.mark.parametrize(
    ("level", "on_stderr"),
    [
        ("debug", ["debug", "info", "error"]),
        ("info", ["info", "error"]),
        ("warn", ["error"]),
        ("none", []),
    ],
)
def test_the_level_counts_on_stderr_and_the_file_has_info_and_up(
    tmp_path: Path, level: str, on_stderr: list[str]
) -> None:
    journal, written = a_journal(tmp_path, level)
    journal.debug("a")
    journal.info("b")
    journal.error("c")
    assert [line["level"] for line in lines_of(written)] == on_stderr
    in_file = (tmp_path / FILE_NAME).read_bytes().splitlines()
    assert [line["level"] for line in lines_of(in_file)] == ["info", "error"]


def test_the_agent_gets_all_lines_at_the_end() -> None:
    with StandInAgent(socket_name=SOCKET_NAME) as agent:
        journal, written = a_journal(agent.run_dir)
        journal.info("a")
        journal.info("b")
        assert agent.requests == []
        journal.close()
        assert agent.requests[0].startswith(b"POST /log HTTP/1.1\r\n")
        posted = json.loads(agent.requests[0].partition(b"\r\n\r\n")[2])
    assert [json.loads(line) for line in posted] == lines_of(written)


def test_a_deaf_agent_and_a_missing_folder_fail_nothing(tmp_path: Path) -> None:
    (tmp_path / SOCKET_NAME).touch()
    for folder in (tmp_path, tmp_path / "missing"):
        journal, written = a_journal(folder)
        journal.error("a")
        journal.close()
        assert len(written) == 1
    assert not (tmp_path / "missing").exists()


def test_a_full_file_becomes_the_backup_and_there_are_never_more(tmp_path: Path) -> None:
    for number in range(7):
        append_line(str(tmp_path), b"%d\n" % number, bytes_max=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE_NAME, BACKUP_NAME]
    assert (tmp_path / BACKUP_NAME).read_bytes() == b"4\n5\n"
    assert (tmp_path / FILE_NAME).read_bytes() == b"6\n"


def test_nobody_can_make_root_write_elsewhere(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.touch()
    (tmp_path / FILE_NAME).symlink_to(victim)
    append_line(str(tmp_path), b"x\n")
    assert victim.read_bytes() == b""


def test_a_pipe_in_place_of_the_file_stops_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE_NAME)
    append_line(str(tmp_path), b"x\n")
    assert not (tmp_path / BACKUP_NAME).exists()

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from cni.agent.errors import SocketPathError
from cni.agent.zds_socket import listening_socket, unlisten


@pytest.fixture
def folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())  # shorter than tmp_path: socket paths have 107 bytes
    yield folder
    shutil.rmtree(folder)


async def test_a_proxy_can_connect_and_the_file_is_removed_at_the_end(folder: Path) -> None:
    path = str(folder / "new" / "zds.sock")
    listener = listening_socket(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(path)
    unlisten(listener, path)
    assert not await trio.Path(path).exists()
    unlisten(listener, path)


async def test_what_a_killed_agent_left_is_replaced(folder: Path) -> None:
    path = str(folder / "zds.sock")
    listening_socket(path).close()
    assert await trio.Path(path).is_socket()
    unlisten(listening_socket(path), path)


async def test_another_agents_socket_is_not_taken_away(folder: Path) -> None:
    path = str(folder / "zds.sock")
    with listening_socket(path):
        with pytest.raises(SocketPathError, match="another node agent"):
            listening_socket(path)
        assert await trio.Path(path).is_socket()


async def test_another_kind_of_socket_is_not_taken_away(folder: Path) -> None:
    path = str(folder / "zds.sock")
    with socket.socket(socket.AF_UNIX) as stream:
        stream.bind(path)
        stream.listen()
        with pytest.raises(SocketPathError, match="in use"):
            listening_socket(path)


async def test_a_file_is_not_taken_away(folder: Path) -> None:
    (folder / "file").touch()
    with pytest.raises(SocketPathError, match="no socket"):
        listening_socket(str(folder / "file"))


async def test_a_file_for_a_folder_is_an_error(folder: Path) -> None:
    (folder / "file").touch()
    with pytest.raises(SocketPathError, match="Not a directory"):
        listening_socket(str(folder / "file" / "zds.sock"))


async def test_a_long_path_is_an_error_that_says_so(folder: Path) -> None:
    with pytest.raises(SocketPathError, match="longer than 107 bytes"):
        listening_socket(str(folder / ("x" * 107)))


async def test_a_path_that_cannot_be_made_is_an_error() -> None:
    with pytest.raises(SocketPathError, match="cannot listen"):
        listening_socket("/proc/nowhere/zds.sock")

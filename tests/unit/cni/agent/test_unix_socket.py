from __future__ import annotations

import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cni.agent.errors import SocketPathError
from cni.agent.unix_socket import UnixListener, listen_unix


@pytest.fixture
def folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())  # shorter than tmp_path: socket paths have 107 bytes
    yield folder
    shutil.rmtree(folder)


def listen_for_proxies(path: Path) -> UnixListener:
    return listen_unix(path, kind=socket.SOCK_SEQPACKET)


@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_STREAM])
async def test_others_can_connect_and_the_file_is_removed_at_the_end(
    folder: Path, kind: int
) -> None:
    path = folder / "new" / "a.sock"
    with listen_unix(path, kind=kind), socket.socket(socket.AF_UNIX, kind) as client:
        client.connect(str(path))
    assert not path.exists()


async def test_closing_twice_is_fine(folder: Path) -> None:
    listener = listen_for_proxies(folder / "zds.sock")
    listener.close()
    listener.close()


async def test_what_somebody_else_has_put_in_its_place_stays(folder: Path) -> None:
    path = folder / "zds.sock"
    with listen_for_proxies(path):
        # As the reference does, whoever listens.
        path.unlink()
        other = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        other.bind(str(path))
    with other:
        assert path.is_socket()


async def test_what_a_killed_agent_left_is_replaced(folder: Path) -> None:
    path = folder / "zds.sock"
    listen_for_proxies(path).sock.close()
    assert path.is_socket()
    listen_for_proxies(path).close()


async def test_who_may_connect_can_be_said(folder: Path) -> None:
    path = folder / "run/s"
    for mode in (0o600, 0o666):
        with listen_unix(path, mode=mode):
            assert stat.S_IMODE(path.stat().st_mode) == mode
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o750


async def test_another_agents_socket_is_not_taken_away(folder: Path) -> None:
    path = folder / "zds.sock"
    with listen_for_proxies(path):
        with pytest.raises(SocketPathError, match="another node agent"):
            listen_for_proxies(path)
        assert path.is_socket()


async def test_another_kind_of_socket_is_not_taken_away(folder: Path) -> None:
    path = folder / "zds.sock"
    with listen_unix(path), pytest.raises(SocketPathError, match="in use"):
        listen_for_proxies(path)


async def test_a_file_is_not_taken_away(folder: Path) -> None:
    (folder / "file").touch()
    with pytest.raises(SocketPathError, match="no socket"):
        listen_unix(folder / "file")


async def test_a_file_for_a_folder_is_an_error(folder: Path) -> None:
    (folder / "file").touch()
    with pytest.raises(SocketPathError, match="Not a directory"):
        listen_unix(folder / "file" / "zds.sock")


async def test_a_long_path_is_an_error_that_says_so(folder: Path) -> None:
    with pytest.raises(SocketPathError, match="longer than 107 bytes"):
        listen_unix(folder / ("x" * 107))


async def test_a_path_that_cannot_be_made_is_an_error() -> None:
    with pytest.raises(SocketPathError, match="cannot listen"):
        listen_unix(Path("/proc/nowhere/zds.sock"))

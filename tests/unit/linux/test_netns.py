from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.namespaces import needs_root
from ztunnel.devmesh.cluster import new_namespace
from ztunnel.linux import netns
from ztunnel.linux.netns import PodNetns

HERE = "/proc/self/ns/net"
SIOCGSKNS = 0x894C  # linux/sockios.h: opens the namespace of a socket


def home_of(sock: socket.socket) -> netns.NetnsId:
    """Tell which network namespace a socket lives in."""
    space = fcntl.ioctl(sock, SIOCGSKNS)
    try:
        return netns.identify(space)
    finally:
        os.close(space)


def test_two_descriptors_on_one_namespace_have_one_identity() -> None:
    with PodNetns.open(HERE) as first, PodNetns.open(HERE) as second:
        assert first.fileno() != second.fileno()
        assert first.id == second.id == netns.current()


def test_a_duplicate_outlives_the_original() -> None:
    with PodNetns.open(HERE) as first:
        second = first.duplicate()
    with second:
        assert second.id == netns.identify(second.fileno())


def test_a_closed_one_says_so_and_may_be_closed_again() -> None:
    space = PodNetns.open(HERE)
    space.close()
    space.close()
    with pytest.raises(ValueError, match="closed"):
        space.call(os.getpid)


def test_its_representation_names_the_inode() -> None:
    with PodNetns.open(HERE) as space:
        assert str(space.id.inode) in repr(space)


def test_what_is_no_namespace_cannot_be_entered(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with PodNetns.open(tmp_path / "file") as space, pytest.raises(OSError, match="setns"):
        space.call(os.getpid)


def test_a_missing_file_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        PodNetns.open(tmp_path / "missing")


@pytest.mark.netns
@needs_root
def test_a_socket_is_born_in_the_pod_and_we_come_home() -> None:
    home = netns.current()
    with (
        new_namespace() as pod,
        pod.call(socket.socket) as inside,
        socket.socket() as outside,
    ):
        assert home_of(inside) == pod.id != home
        assert home_of(outside) == netns.current() == home


@pytest.mark.netns
@needs_root
def test_we_come_home_after_an_error() -> None:
    home = netns.current()

    def fail() -> None:
        raise LookupError(netns.current())

    with new_namespace() as pod:
        with pytest.raises(LookupError) as failure:
            pod.call(fail)
        assert failure.value.args == (pod.id,)
    assert netns.current() == home


@pytest.mark.netns
@needs_root
def test_a_process_that_cannot_come_home_ends_at_once() -> None:
    lost = """
import os
from ztunnel.linux import netns
netns._home = lambda: os.open("/dev/null", os.O_RDONLY)
netns.PodNetns.open("/proc/self/ns/net").call(os.getpid)
print("still here")
"""
    done = subprocess.run([sys.executable, "-c", lost], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGABRT, b"")


@pytest.mark.netns
@needs_root
def test_a_pinned_namespace_outlives_its_holders(tmp_path: Path) -> None:
    path = tmp_path / "pinned"
    with new_namespace() as pod:
        identity = pod.id
        netns.pin(pod.fileno(), path)
    try:
        with PodNetns.open(path) as again:
            assert again.id == identity
        with pytest.raises(FileExistsError), PodNetns.open(path) as again:
            netns.pin(again.fileno(), path)
    finally:
        netns.unpin(path)
    assert not path.exists()
    netns.unpin(path)


@pytest.mark.netns
@needs_root
def test_what_cannot_be_pinned_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="mount"):
        netns.pin(-1, tmp_path / "pinned")
    assert not (tmp_path / "pinned").exists()

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog.testing
import trio

from tests.support.certs import AUTHORITY, a_certificate
from ztunnel.identity.crl_watch import CrlWatch
from ztunnel.linux.file_watch import FileWatch
from ztunnel.tls.certificate import parse_bundle
from ztunnel.tls.crl import Revocations

VICTIM = a_certificate()


class Lists(Revocations):
    """Revocations that a test can wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.attempts: list[bool] = []
        self._more = trio.Event()

    def on_load(self, is_loaded: bool) -> None:
        self.attempts.append(is_loaded)
        self._more.set()

    async def attempted(self, number: int) -> None:
        with trio.fail_after(5):
            while len(self.attempts) < number:
                self._more = trio.Event()
                await self._more.wait()

    @property
    def revokes_victim(self) -> bool:
        chain = [*parse_bundle(VICTIM.chain_pem)[0], *parse_bundle(VICTIM.roots_pem)[0]]
        return self.revoked(self.links(chain)) is not None


def a_watch(path: Path, lists: Lists) -> CrlWatch:
    watch = FileWatch(path, look_seconds=0.005, settle_seconds=0.01)
    return CrlWatch(watch, lists, on_load=lists.on_load)


@asynccontextmanager
async def watching(path: Path) -> AsyncIterator[Lists]:
    lists = Lists()
    watch = a_watch(path, lists)
    watch.load()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        yield lists
        nursery.cancel_scope.cancel()


async def test_a_changed_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "ca.crl"
    path.write_bytes(AUTHORITY.revoke(VICTIM.serial))
    async with watching(path) as lists:
        assert lists.revokes_victim
        path.write_bytes(AUTHORITY.revoke(1, 2, 3))
        await lists.attempted(2)
        assert not lists.revokes_victim


@pytest.mark.parametrize("content", [None, b"not a list"], ids=["missing", "invalid"])
async def test_a_bad_start_does_not_switch_checking_off(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "ca.crl"
    if content is not None:
        path.write_bytes(content)
    async with watching(path) as lists:
        assert lists.attempts == [False]
        path.write_bytes(AUTHORITY.revoke(VICTIM.serial))
        await lists.attempted(2)
        assert lists.revokes_victim


async def test_an_invalid_file_leaves_the_lists_in_force(tmp_path: Path) -> None:
    path = tmp_path / "ca.crl"
    path.write_bytes(AUTHORITY.revoke(VICTIM.serial))
    async with watching(path) as lists:
        path.write_bytes(b"half a li")
        await lists.attempted(2)
        assert lists.attempts == [True, False]
        assert lists.revokes_victim
        path.unlink()
        await lists.attempted(3)
        assert lists.revokes_victim


async def test_the_exchange_of_a_symbolic_link_is_seen(tmp_path: Path) -> None:
    for version, serial in (("one", 1), ("two", VICTIM.serial)):
        (tmp_path / version).mkdir()
        # Of one length: the exchange must be seen all the same.
        (tmp_path / version / "ca.crl").write_bytes(AUTHORITY.revoke(serial).ljust(4096, b"\n"))
    (tmp_path / "..data").symlink_to("one")
    (tmp_path / "ca.crl").symlink_to("..data/ca.crl")
    async with watching(tmp_path / "ca.crl") as lists:
        assert not lists.revokes_victim
        (tmp_path / "new").symlink_to("two")
        os.replace(tmp_path / "new", tmp_path / "..data")  # noqa: PTH105  # as the kubelet does
        await lists.attempted(2)
        assert lists.revokes_victim


def test_what_was_loaded_or_not_is_logged(tmp_path: Path) -> None:
    path, lists = tmp_path / "ca.crl", Lists()
    with structlog.testing.capture_logs() as logs:
        assert not a_watch(path, lists).load()
        path.write_bytes(b"nonsense")
        assert not a_watch(path, lists).load()
        path.write_bytes(AUTHORITY.revoke(1, 2))
        assert a_watch(path, lists).load()
    assert [(line["event"], line["log_level"]) for line in logs] == [
        ("revocation list not there yet", "warning"),
        ("revocation list not usable", "warning"),
        ("revocation list loaded", "info"),
    ]
    assert logs[-1]["revoked"] == 2


def test_a_file_without_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        assert not a_watch(Path("/dev/zero"), Lists()).load()
    assert "longer than" in logs[0]["error"]

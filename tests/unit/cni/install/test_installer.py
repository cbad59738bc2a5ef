from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from cni.install.bundle import LAUNCHER
from cni.install.errors import BundleError, ConflistError, KubeconfigError
from cni.install.installer import Installer, InstallResult, NodeFiles
from cni.install.kubeconfig import FILE_NAME, Credentials
from cni.install.settings import InstallSettings

CHAIN = b'{"name": "pods", "cniVersion": "1.0.0", "plugins": [{"type": "ptp"}]}\n'
SOON = 20.0


class Node:
    """The folders of a node, and what is in them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.confs = root / "net.d"
        self.plugins = root / "bin"
        self.run_dir = root / "run"
        for folder in (self.confs, self.plugins, self.run_dir):
            folder.mkdir()
        (self.plugins / "ptp").write_bytes(b"ELF")

    def settings(self, **env: str) -> InstallSettings:
        return InstallSettings.from_env(
            {
                "MOUNTED_CNI_NET_DIR": str(self.confs),
                "MOUNTED_CNI_BIN_DIR": str(self.plugins),
                "CNI_BIN_DIR": str(self.plugins),
                "CNI_AGENT_RUN_DIR": str(self.run_dir),
                "AMBIENT_ENABLED": "true",
                **env,
            }
        )

    def files(self) -> dict[str, tuple[int, bytes]]:
        return {
            str(path.relative_to(self.root)): (path.stat().st_mode, path.read_bytes())
            for path in self.root.rglob("*")
            if path.is_file()
        }

    def chain(self, name: str = "10-pods.conflist") -> list[str]:
        return [
            plugin["type"] for plugin in json.loads((self.confs / name).read_bytes())["plugins"]
        ]


@pytest.fixture
def node() -> Iterator[Node]:
    folder = Path(tempfile.mkdtemp(prefix="node"))  # a first line has room for a short path only
    yield Node(folder)
    shutil.rmtree(folder)


@pytest.fixture
def primary(node: Node) -> Path:
    path = node.confs / "10-pods.conflist"
    path.write_bytes(CHAIN)
    path.chmod(0o644)
    return path


def test_the_node_is_as_it_was_after_removal(node: Node, primary: Path) -> None:
    before = node.files()
    files = NodeFiles(node.settings())
    done = files.install()
    assert done.changed == ("plugin", "10-pods.conflist")
    assert node.chain() == ["ptp", "istio-cni"]
    assert primary.stat().st_mode & 0o777 == 0o644
    files.uninstall()
    assert node.files() == before
    assert sorted(path.name for path in node.plugins.iterdir()) == ["ptp"]


def test_the_runtime_could_start_what_the_chain_names(node: Node, primary: Path) -> None:
    NodeFiles(node.settings()).install()
    program = node.plugins / node.chain()[-1]
    run = subprocess.run(
        [program], env={"CNI_COMMAND": "VERSION"}, check=False, capture_output=True
    )
    assert run.returncode == 0


def test_a_second_pass_changes_nothing(node: Node, primary: Path) -> None:
    files = NodeFiles(node.settings())
    files.install()
    assert files.install().changed == ()


def test_the_plugin_is_there_before_the_chain_is(node: Node) -> None:
    done = NodeFiles(node.settings()).install()
    assert done.waiting_for != ""
    assert done.changed == ("plugin",)
    assert (node.plugins / LAUNCHER).exists()


def test_no_chain_names_a_plugin_that_cannot_be_laid_down(node: Node, primary: Path) -> None:
    settings = replace(node.settings(), bin_folder=primary)
    with pytest.raises(BundleError):
        NodeFiles(settings).install()
    assert primary.read_bytes() == CHAIN


def test_the_plugin_stays_as_long_as_a_chain_names_it(node: Node, primary: Path) -> None:
    files = NodeFiles(node.settings())
    files.install()
    inside = primary.read_bytes()
    primary.unlink()
    shutil.rmtree(node.confs)
    node.confs.write_bytes(b"")
    with pytest.raises(ConflistError):
        files.uninstall()
    assert (node.plugins / LAUNCHER).exists()
    assert b"istio-cni" in inside


def test_without_being_told_the_host_s_path_must_be_findable(node: Node, primary: Path) -> None:
    settings = replace(node.settings(), host_bin_folder="")
    with pytest.raises(BundleError):
        NodeFiles(settings).install()
    assert primary.read_bytes() == CHAIN


def test_a_kubeconfig_is_written_where_it_is_wanted_and_follows_the_token(
    node: Node, primary: Path
) -> None:
    tokens = ["one", "one", "two"]

    def credentials() -> Credentials:
        return Credentials(
            host="10.96.0.1", port="443", protocol="https", authority=None, token=tokens.pop(0)
        )

    files = NodeFiles(node.settings(), credentials=credentials)
    path = node.run_dir / FILE_NAME
    assert "kubeconfig" in files.install().changed
    assert path.stat().st_mode & 0o777 == 0o600
    assert files.install().changed == ()
    assert files.install().changed == ("kubeconfig",)
    assert b'"two"' in path.read_bytes()
    files.uninstall()
    assert not path.exists()


def test_a_kubeconfig_that_cannot_be_written_is_an_error(node: Node, primary: Path) -> None:
    def credentials() -> Credentials:
        raise FileNotFoundError("token")

    with pytest.raises(KubeconfigError, match="token"):
        NodeFiles(node.settings(), credentials=credentials).install()
    assert primary.read_bytes() == CHAIN


def test_a_kubeconfig_that_cannot_be_removed_is_an_error_and_a_missing_one_is_none(
    node: Node, primary: Path
) -> None:
    files = NodeFiles(node.settings())
    files.install()
    (node.run_dir / FILE_NAME).mkdir()
    with pytest.raises(KubeconfigError):
        files.uninstall()
    shutil.rmtree(node.run_dir)
    files.uninstall()
    assert primary.read_bytes() == CHAIN
    assert not (node.plugins / LAUNCHER).exists()


def test_a_single_plugin_s_file_comes_back(node: Node) -> None:
    single = node.confs / "10-pods.conf"
    single.write_bytes(b'{"name": "pods", "type": "ptp"}\n')
    single.chmod(0o604)
    before = node.files()
    files = NodeFiles(node.settings())
    files.install()
    assert node.chain() == ["ptp", "istio-cni"]
    assert (node.confs / "10-pods.conflist").stat().st_mode & 0o777 == 0o604
    files.uninstall()
    assert node.files() == before


@pytest.mark.parametrize(("group", "mode"), [("false", 0o600), ("true", 0o640)])
def test_a_file_of_our_own_has_the_permissions_that_were_chosen(
    node: Node, group: str, mode: int
) -> None:
    settings = node.settings(CHAINED_CNI_PLUGIN="false", CNI_CONF_GROUP_READ=group)
    NodeFiles(settings).install()
    assert (node.confs / "YYY-istio-cni.conf").stat().st_mode & 0o777 == mode


class Heard:
    """Hears what the installer says, and lets tests wait for it."""

    def __init__(self) -> None:
        self.ready: list[bool] = []
        self.results: list[InstallResult] = []
        self._changed = trio.Event()

    def set_ready(self, is_ready: bool) -> None:
        self.ready.append(is_ready)
        self._wake()

    def count(self, result: InstallResult) -> None:
        self.results.append(result)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, *, ready: list[bool] | None = None, passes: int = 0) -> None:
        with trio.fail_after(SOON):
            while (ready is not None and self.ready != ready) or len(self.results) < passes:
                await self._changed.wait()


@asynccontextmanager
async def running(node: Node, **env: str) -> AsyncIterator[Heard]:
    heard = Heard()
    installer = Installer(
        NodeFiles(node.settings(**env)), set_ready=heard.set_ready, count=heard.count
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(installer.run)
        yield heard
        nursery.cancel_scope.cancel()


async def test_a_primary_that_comes_late_is_joined(node: Node) -> None:
    async with running(node) as heard:
        await heard.until(passes=1)
        assert heard.ready == []
        (node.confs / "10-pods.conflist").write_bytes(CHAIN)
        await heard.until(ready=[True])
        assert node.chain() == ["ptp", "istio-cni"]


async def test_somebody_who_writes_over_us_is_repaired_and_we_stay_ready(
    node: Node, primary: Path
) -> None:
    async with running(node) as heard:
        await heard.until(ready=[True])
        other = node.confs / "new"
        other.write_bytes(CHAIN.replace(b"ptp", b"bridge"))
        other.rename(primary)
        await heard.until(passes=2)
        assert node.chain() == ["bridge", "istio-cni"]
        assert heard.ready == [True]
        assert set(heard.results) == {InstallResult.SUCCESS}


async def test_a_plugin_that_somebody_removes_comes_back(node: Node, primary: Path) -> None:
    async with running(node) as heard:
        await heard.until(ready=[True])
        (node.plugins / LAUNCHER).unlink()
        await heard.until(passes=2)
        assert (node.plugins / LAUNCHER).exists()


async def test_a_pass_that_fails_says_so_and_is_tried_again(node: Node) -> None:
    foreign = node.confs / "istio.conf"
    foreign.write_bytes(b'{"type": "ptp"}')
    env = {"CHAINED_CNI_PLUGIN": "false", "CNI_CONF_NAME": "istio.conf"}
    async with running(node, **env) as heard:
        await heard.until(passes=1)
        assert heard.results == [InstallResult.CREATE_CNI_CONFIG_FAILURE]
        assert heard.ready == []
        foreign.unlink()
        await heard.until(ready=[True])


async def test_a_plugin_that_cannot_be_laid_down_is_counted_as_such(
    node: Node, primary: Path
) -> None:
    async with running(node, CNI_BIN_DIR="/" + "x" * 200) as heard:
        await heard.until(passes=1)
        assert heard.results == [InstallResult.COPY_BINARIES_FAILURE]
        assert primary.read_bytes() == CHAIN


async def test_readiness_ends_with_the_installation(node: Node, primary: Path) -> None:
    heard = Heard()
    installer = Installer(NodeFiles(node.settings()), set_ready=heard.set_ready, count=heard.count)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(installer.run)
        await heard.until(ready=[True])
        nursery.cancel_scope.cancel()
    await installer.uninstall()
    assert heard.ready == [True, False]
    assert primary.read_bytes() == CHAIN

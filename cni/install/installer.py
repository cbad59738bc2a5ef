"""The installation kept as it should be, from the agent's start to its end (cni.md 2.2 to 2.5).

The order matters: into the chain last and out of it first, so that no chain ever names a plugin
that is not there. A pass changes nothing if all is well, so it runs after each change of the
folders and now and then, and whether it was asked for by us or by somebody who wrote over our
work makes no difference.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import structlog
import trio

from cni.install.bundle import Site, install_bundle, remove_bundle, version_of
from cni.install.donor import Donor, inspect_donor
from cni.install.errors import BundleError, ConflistError, InstallError, KubeconfigError
from cni.install.files import (
    delete_file,
    delete_leftovers,
    mode_of,
    move_file,
    read_confs,
    write_file,
)
from cni.install.hostpath import host_path_of
from cni.install.kubeconfig import FILE_NAME, Credentials, kubeconfig
from cni.install.pace import RepairPace, suspect
from cni.install.placement import (
    SAVED_ENDING,
    Action,
    Delete,
    Move,
    Plan,
    Write,
    plan_install,
    plan_removal,
)
from cni.install.settings import InstallSettings
from cni.install.watch import LOOK_SECONDS, Watch

log = structlog.get_logger()

RETRY_SECONDS = 2.0  # after a failed pass
OWN_MOUNTS = Path("/proc/self/mountinfo")
HOST_MOUNTS = Path("/host/proc/1/mountinfo")
_OWNER_MODE, _GROUP_MODE = 0o600, 0o640


class InstallResult(StrEnum):
    """How a pass ended, in the words of the metric `istio_cni_installs_total`."""

    SUCCESS = "SUCCESS"
    COPY_BINARIES_FAILURE = "COPY_BINARIES_FAILURE"
    CREATE_KUBECONFIG_FAILURE = "CREATE_KUBECONFIG_FAILURE"
    CREATE_CNI_CONFIG_FAILURE = "CREATE_CNI_CONFIG_FAILURE"


_RESULT_OF: dict[type[InstallError], InstallResult] = {
    BundleError: InstallResult.COPY_BINARIES_FAILURE,
    KubeconfigError: InstallResult.CREATE_KUBECONFIG_FAILURE,
    ConflistError: InstallResult.CREATE_CNI_CONFIG_FAILURE,
}


@dataclass(frozen=True, slots=True)
class Done:
    """What a pass did."""

    changed: tuple[str, ...]  # what was not as it should be
    waiting_for: str  # empty if we are in the chain
    warnings: tuple[str, ...]
    conf_names: tuple[str, ...]


class NodeFiles:
    """Everything the installer does to the node. Plain functions that block: call them in a thread.

    `credentials` gives what to write for a plugin that asks Kubernetes; None if that is not wanted.
    """

    def __init__(
        self,
        settings: InstallSettings,
        *,
        executable: Path | None = None,
        credentials: Callable[[], Credentials] | None = None,
    ) -> None:
        self._settings = settings
        # Of a virtual environment, the interpreter below it: the former is a link and no more.
        self._executable = executable or Path(getattr(sys, "_base_executable", sys.executable))
        self._credentials = credentials
        # Found out once: it takes a while, and does not change under a running agent.
        self._bundle: tuple[Donor, Site, str] | None = None

    def folders(self) -> list[Path]:
        """Name the folders in which changes matter."""
        return [self._settings.conf_folder, self._settings.bin_folder]

    def install(self) -> Done:
        """Make everything as it should be.

        Raises:
            InstallError: something could not be done; nothing that came after it was tried.
        """
        changed = ["plugin"] if install_bundle(*self._prepare()) else []
        if self._install_kubeconfig():
            changed.append("kubeconfig")
        confs = self._read()
        plan = plan_install(confs, self._settings.placement, self._settings.entry())
        self._carry_out(plan)
        changed += [action.name for action in plan.actions]
        return Done(tuple(changed), plan.waiting_for, plan.warnings, tuple(confs))

    def uninstall(self) -> None:
        """Make the node as it was before.

        Raises:
            InstallError: something could not be undone; in particular, the plugin stays as long as
                a chain may still name it.
        """
        self._carry_out(plan_removal(self._read(), self._settings.placement))
        try:
            delete_file(self._kubeconfig_path())
        except FileNotFoundError:
            pass  # Its folder is gone, too.
        except OSError as exc:
            raise KubeconfigError(f"cannot remove the kubeconfig: {exc}") from exc
        remove_bundle(Site(self._settings.bin_folder, ""))

    def _prepare(self) -> tuple[Donor, Site, str]:
        if self._bundle is None:
            donor, site = inspect_donor(self._executable), self._site()
            self._bundle = donor, site, version_of(donor, site)
        return self._bundle

    def _site(self) -> Site:
        folder, host = self._settings.bin_folder, self._settings.host_bin_folder
        if not host:
            try:
                own_table, host_table = OWN_MOUNTS.read_text(), HOST_MOUNTS.read_text()
            except OSError as exc:
                raise BundleError(
                    f"cannot find the host's path of {folder} (CNI_BIN_DIR may say it): {exc}"
                ) from exc
            host = host_path_of(str(folder), own=own_table, host=host_table)
        return Site(folder, host)

    def _kubeconfig_path(self) -> Path:
        return Path(self._settings.run_dir, FILE_NAME)

    def _install_kubeconfig(self) -> bool:
        if self._credentials is None:
            return False
        path = self._kubeconfig_path()
        try:
            data = kubeconfig(self._credentials())
            if path.is_file() and path.read_bytes() == data:
                return False
            write_file(path, data, mode=self._settings.kubeconfig_mode)
        except OSError as exc:
            raise KubeconfigError(f"cannot write {path}: {exc}") from exc
        return True

    def _read(self) -> dict[str, bytes]:
        return read_confs(self._settings.conf_folder, saved_ending=SAVED_ENDING)

    def _carry_out(self, plan: Plan) -> None:
        try:
            for action in plan.actions:
                self._act(action)
        except OSError as exc:
            raise ConflistError(f"cannot change the CNI configuration: {exc}") from exc

    def _act(self, action: Action) -> None:
        folder = self._settings.conf_folder
        match action:
            case Write(name, data, like):
                own = _GROUP_MODE if self._settings.group_may_read else _OWNER_MODE
                mode = mode_of(folder / like)
                delete_leftovers(folder, name)
                write_file(folder / name, data, mode=own if mode is None else mode)
            case Move(name, target):
                move_file(folder / name, folder / target)
            case Delete(name):
                delete_file(folder / name)


class Installer:
    """Runs passes until it is cancelled.

    `set_ready` hears whether the plugin is in the chain, and only when that changes. `count` hears
    how each pass ended that changed or failed something.
    """

    def __init__(
        self,
        node: NodeFiles,
        *,
        set_ready: Callable[[bool], object],
        count: Callable[[InstallResult], object],
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        self._node = node
        self._set_ready = set_ready
        self._count = count
        self._look_seconds = look_seconds
        self._is_ready = False
        self._pace = RepairPace()
        self._said: tuple[str, ...] = ()

    async def run(self) -> None:
        """Install, then watch and repair."""
        with Watch() as watch:
            while True:
                # Before the pass, so that no change falls between looking and watching.
                watch.cover(self._node.folders())
                await self._pass(watch)

    async def uninstall(self) -> None:
        """Make the node as it was before.

        Raises:
            InstallError: something could not be undone.
        """
        await trio.to_thread.run_sync(self._node.uninstall)
        self._ready(is_ready=False)
        log.info("plugin removed from the node")

    async def _pass(self, watch: Watch) -> None:
        """Run one pass and wait until there is reason for the next."""
        try:
            done = await trio.to_thread.run_sync(self._node.install)
        except InstallError as exc:
            self._ready(is_ready=False)
            self._count(_result_of(exc))
            log.warning("installation failed, trying again", error=str(exc))
            await watch.changed(at_most_seconds=RETRY_SECONDS)
            return
        self._report(done)
        self._ready(is_ready=not done.waiting_for)
        if done.changed:
            self._count(InstallResult.SUCCESS)
            await self._slow_down(done)
        await watch.changed(at_most_seconds=self._look_seconds)

    def _report(self, done: Done) -> None:
        """Say what was done, and once what is amiss."""
        if done.changed:
            log.info("installation brought up to date", changed=list(done.changed))
        complaints = done.warnings
        if done.waiting_for:
            complaints = (*complaints, f"waiting for {done.waiting_for}")
        for complaint in complaints:
            if complaint not in self._said:
                log.warning("installation is not as it should be", reason=complaint)
        self._said = complaints

    async def _slow_down(self, done: Done) -> None:
        seconds = self._pace.repaired(trio.current_time())
        if self._pace.is_fight:
            log.warning("somebody keeps undoing the installation", hint=suspect([*done.conf_names]))
        await trio.sleep(seconds)

    def _ready(self, *, is_ready: bool) -> None:
        if is_ready != self._is_ready:
            self._is_ready = is_ready
            self._set_ready(is_ready)


def _result_of(error: InstallError) -> InstallResult:
    kinds = (result for kind, result in _RESULT_OF.items() if isinstance(error, kind))
    return next(kinds, InstallResult.CREATE_CNI_CONFIG_FAILURE)

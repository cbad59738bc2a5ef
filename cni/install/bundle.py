"""The plugin and a private interpreter, laid down on a host that may have no Python and no libc.

In the runtime's folder of plugins there is one small text file, `istio-cni`, whose first line names
the interpreter of one version; each version is a folder of its own, named by what is in it:

    istio-cni                       #!<host's folder>/.istio-cni/<version>/bin/python -ISXutf8
    .istio-cni/<version>/bin/python
    .istio-cni/<version>/lib/*.so*          with the loader, whose name differs by machine
    .istio-cni/<version>/lib/python3.x/     the few modules the plugin imports, and the plugin
    .istio-cni/<version>/MANIFEST           each file and its length

A version is filled under another name, synced, and renamed when it is complete; it is never written
again. Then the text file is replaced by renaming, which is the switch. What ran before goes on
running in its own version, which stays until the next one but one comes. All paths are the host's
and absolute, for `$ORIGIN` needs a mounted /proc, and a first line has room for one argument only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cni.install.donor import Donor
from cni.install.elf import relocate
from cni.install.errors import BundleError, ElfError
from cni.install.files import delete_file, delete_leftovers, sync_folder, write_file

LAUNCHER = "istio-cni"
VERSIONS = ".istio-cni"
MANIFEST = "MANIFEST"
_UNFINISHED = ".new."
_FIRST_LINE_BYTES_MAX = 127  # Linux before 5.1; later ones take 255
_SECONDS = 60.0
_EXECUTABLE, _READABLE = 0o755, 0o644


@dataclass(frozen=True, slots=True)
class Site:
    """The runtime's folder of plugins: where we see it, and where the host has it."""

    folder: Path
    host_folder: str

    def versions(self) -> Path:
        """Give the folder that the versions are in."""
        return self.folder / VERSIONS

    def host_version(self, version: str) -> str:
        """Give the host's path of one version."""
        return f"{self.host_folder.rstrip('/')}/{VERSIONS}/{version}"


def version_of(donor: Donor, site: Site) -> str:
    """Give the name of the version that a donor makes at a site. It reads all of the donor's files.

    Raises:
        BundleError: one of them cannot be read.
    """
    try:
        return donor.digest(f"{site.host_folder.rstrip('/')}/{VERSIONS}")
    except OSError as exc:
        raise BundleError(_explain(exc, site)) from exc


def install_bundle(donor: Donor, site: Site, version: str) -> bool:
    """Make a version the current one, complete; return whether anything had to be done.

    Raises:
        BundleError: it cannot be laid down; what was there before still works.
    """
    try:
        text = launcher_text(site, version)
        previous = _current_version(site)
        target = site.versions() / version
        is_complete = _is_complete(target)
        if not is_complete:
            _lay_down(donor, site, version)
        launcher = site.folder / LAUNCHER
        is_launched = launcher.is_file() and launcher.read_bytes() == text
        if not is_launched:
            delete_leftovers(site.folder, LAUNCHER)
            write_file(launcher, text, mode=_EXECUTABLE)
            _delete_other_versions(site, keep={version, previous})
    except OSError as exc:
        raise BundleError(_explain(exc, site)) from exc
    return not (is_complete and is_launched)


def remove_bundle(site: Site) -> None:
    """Take the plugin away. What runs at this moment has read all it needs.

    Raises:
        BundleError: it could not be removed.
    """
    try:
        delete_file(site.folder / LAUNCHER)
        delete_leftovers(site.folder, LAUNCHER)
        if site.versions().exists():
            shutil.rmtree(site.versions())
            sync_folder(site.folder)
    except FileNotFoundError:
        return  # Not even the folder is there.
    except OSError as exc:
        raise BundleError(_explain(exc, site)) from exc


def launcher_text(site: Site, version: str) -> bytes:
    """Give the file that the runtime starts.

    Raises:
        BundleError: the host's path is too long for a first line.
    """
    # Isolated, for the runtime hands its whole environment on; and UTF-8 in any locale.
    first = f"#!{site.host_version(version)}/bin/python -ISXutf8"
    if len(first.encode()) > _FIRST_LINE_BYTES_MAX:
        raise BundleError(f"the path is too long to start an interpreter from: {first}")
    return f"{first}\nfrom cni.plugin.__main__ import main\n\nmain()\n".encode()


def _current_version(site: Site) -> str:
    """Give the version that the runtime starts at the moment; empty if it is none of ours."""
    try:
        first = (site.folder / LAUNCHER).read_bytes()[: _FIRST_LINE_BYTES_MAX + 1]
    except FileNotFoundError:
        return ""
    mark = f"/{VERSIONS}/".encode()
    return first.partition(mark)[2].partition(b"/")[0].decode(errors="replace")


def _lay_down(donor: Donor, site: Site, version: str) -> None:
    """Fill a folder under another name and rename it."""
    site.versions().mkdir(mode=_EXECUTABLE, exist_ok=True)
    for leftover in site.versions().glob(f"*{_UNFINISHED}*"):
        shutil.rmtree(leftover)
    unfinished = site.versions() / f"{version}{_UNFINISHED}{os.getpid()}"
    unfinished.mkdir(mode=_EXECUTABLE)
    try:
        _fill(unfinished, donor, site.host_version(version))
        target = site.versions() / version
        damaged = site.versions() / f"{version}{_UNFINISHED}damaged"
        if target.exists():
            target.rename(damaged)
        unfinished.rename(target)
        # Who runs in it keeps what is open.
        shutil.rmtree(damaged, ignore_errors=True)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    sync_folder(site.versions())


def _fill(folder: Path, donor: Donor, prefix: str) -> None:
    library_path = f"{prefix}/lib"
    loader = PurePosixPath("lib", donor.loader_name)
    for target, source in [*donor.libraries, *donor.extensions]:
        _put(folder / target, _moved(source, library_path), _EXECUTABLE)
    _put(folder / loader, donor.loader.read_bytes(), _EXECUTABLE)
    program = _moved(donor.executable, library_path, loader=f"{prefix}/{loader}")
    _put(folder / "bin" / "python", program, _EXECUTABLE)
    for target, source in donor.modules:
        _put(folder / target, source.read_bytes(), _READABLE)
    (folder / donor.dynload).mkdir(parents=True, exist_ok=True)
    _compile(donor.executable, folder / donor.dynload.parent, f"{prefix}/{donor.dynload.parent}")
    _put(folder / MANIFEST, _manifest(folder).encode(), _READABLE)
    _sync(folder)


def _moved(source: Path, library_path: str, *, loader: str | None = None) -> bytes:
    try:
        return relocate(source.read_bytes(), library_path=library_path, loader=loader)
    except ElfError as exc:
        raise BundleError(f"{source} cannot be moved: {exc}") from exc


def _put(path: Path, data: bytes, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)


def _compile(program: Path, folder: Path, host_folder: str) -> None:
    """Compile the modules, by the interpreter that will read them, never to look at times."""
    options = ("-q", "--invalidation-mode", "unchecked-hash", "-s", folder, "-p", host_folder)
    try:
        subprocess.run(  # noqa: S603, it runs what it is made of
            [program, "-ISm", "compileall", *options, folder],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=True,
        )
    except subprocess.CalledProcessError as exc:
        raise BundleError(f"the plugin does not compile: {exc.stdout}{exc.stderr}") from exc
    except subprocess.TimeoutExpired as exc:
        raise BundleError("the plugin does not compile in time") from exc


def _manifest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return "".join(f"{path.stat().st_size} {path.relative_to(folder)}\n" for path in files)


def _is_complete(folder: Path) -> bool:
    """Whether a version has every file of its manifest, as long as it was."""
    try:
        lines = (folder / MANIFEST).read_text().splitlines()
        pairs = [line.split(" ", 1) for line in lines]
        return bool(pairs) and all((folder / p).stat().st_size == int(n) for n, p in pairs)
    except (OSError, ValueError):
        return False


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECTORY if path.is_dir() else 0)
        fd = os.open(path, flags)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    sync_folder(folder)


def _delete_other_versions(site: Site, *, keep: set[str]) -> None:
    for path in site.versions().iterdir():
        if path.name not in keep:
            # What cannot be removed costs space and nothing else.
            with contextlib.suppress(OSError):
                shutil.rmtree(path)


def _explain(exc: OSError, site: Site) -> str:
    read_only = "; the platform may want its plugins elsewhere (cniBinDir)"
    hint = read_only if "Read-only" in str(exc) else ""
    return f"cannot install the plugin to {site.folder}: {exc}{hint}"

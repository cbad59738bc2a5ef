"""The interpreter we take along: which files a Python needs to run the plugin and nothing else.

The donor is asked itself: it runs, imports the plugin, and says which modules it has read and which
libraries the kernel has mapped. So the answer is right for any build of Python, on any machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cni.install.elf import Parts, machine_of, read_parts
from cni.install.errors import BundleError

PACKAGE = "cni"
LAYOUT = 1  # goes up when the same files are laid down in another way
_PACKAGE_ROOT = Path(__file__).parents[1]
_SECONDS = 30.0  # it takes 50 ms; a node that starts all its pods at once is slow
# Besides what an import finds: encodings that the start of Python wants in some locales.
_QUESTION = """
import sys
sys.path.append(sys.argv[1])
import cni.plugin.__main__, encodings.ascii, encodings.latin_1, encodings.utf_8
import json, os
print(json.dumps({
    "home": os.path.dirname(os.__file__),
    "lib": sys.platlibdir,
    "name": "python%d.%d" % sys.version_info[:2],
    "modules": [m.__file__ for m in list(sys.modules.values()) if getattr(m, "__file__", None)],
    "mapped": [line.split(None, 5)[5].strip() for line in open("/proc/self/maps") if "/" in line],
}))
"""


@dataclass(frozen=True, slots=True)
class Donor:
    """What to take from a Python: each file and where it goes, below the interpreter's new home."""

    executable: Path
    loader: Path
    loader_name: str  # as programs call it; differs by machine
    libraries: tuple[tuple[PurePosixPath, Path], ...]  # shared ones, all go to `lib`
    extensions: tuple[tuple[PurePosixPath, Path], ...]  # modules that are libraries
    modules: tuple[tuple[PurePosixPath, Path], ...]  # modules that are text
    dynload: PurePosixPath  # a folder Python wants to see, even empty

    def digest(self, prefix: str) -> str:
        """Give a name for what these files become when they are moved to `prefix`."""
        summed = hashlib.sha256(f"{LAYOUT}\0{prefix}".encode())
        singles = [(PurePosixPath("python"), self.executable), (PurePosixPath("ld"), self.loader)]
        for target, source in sorted([*singles, *self.libraries, *self.extensions, *self.modules]):
            content = hashlib.sha256(source.read_bytes()).hexdigest()
            summed.update(f"\0{target}\0{content}".encode())
        return summed.hexdigest()[:16]


def inspect_donor(executable: Path) -> Donor:
    """Ask a Python what it needs to run the plugin.

    Raises:
        BundleError: it does not run, or is not of the kind that can be moved.
    """
    program = executable.resolve()
    answer = _ask(program)
    home = Path(answer["home"][0])
    library_home = PurePosixPath(answer["lib"][0], answer["name"][0])
    mapped = {Path(name) for name in answer["mapped"]}
    libraries: dict[PurePosixPath, Path] = {}
    extensions: dict[PurePosixPath, Path] = {}
    loader_name, loader = PurePosixPath(_read(program).loader or "").name, None
    for source in sorted(mapped):
        if source.is_relative_to(home):
            extensions[library_home / source.relative_to(home)] = source
        elif source != program and _is_library(source):
            name = _read(source).soname or source.name
            libraries[PurePosixPath("lib", name)] = source
            if name == loader_name:
                loader = source
    if loader is None:
        raise BundleError(f"{executable}: its loader is not among what it maps; is it static?")
    return Donor(
        executable=program,
        loader=loader,
        loader_name=loader_name,
        libraries=tuple(item for item in libraries.items() if item[1] != loader),
        extensions=tuple(extensions.items()),
        modules=tuple(sorted(_modules(answer["modules"], home, library_home).items())),
        dynload=library_home / "lib-dynload",
    )


def _modules(
    files: list[str], home: Path, library_home: PurePosixPath
) -> dict[PurePosixPath, Path]:
    """Say where the text of each module goes; ours become part of the standard library."""
    found: dict[PurePosixPath, Path] = {}
    for file in map(Path, files):
        if file.suffix != ".py":
            continue
        if file.is_relative_to(_PACKAGE_ROOT):
            found[library_home / PACKAGE / file.relative_to(_PACKAGE_ROOT)] = file
        elif file.is_relative_to(home):
            found[library_home / file.relative_to(home)] = file
    # Python recognizes its library by this file, which is built in and need not be imported.
    found[library_home / "os.py"] = home / "os.py"
    return found


def _ask(program: Path) -> dict[str, list[str]]:
    try:
        run = subprocess.run(  # noqa: S603, it runs what it is made of
            [program, "-IS", "-c", _QUESTION, _PACKAGE_ROOT.parent],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise BundleError(f"{program} does not run: {exc}{_other_machine(program)}") from exc
    if run.returncode != 0:
        raise BundleError(f"{program} cannot run the plugin: {run.stderr.strip()}")
    answer: dict[str, object] = json.loads(run.stdout)
    return {
        key: value if isinstance(value, list) else [str(value)] for key, value in answer.items()
    }


def _other_machine(program: Path) -> str:
    """If a program is for another processor than ours, say so."""
    try:
        machine = machine_of(program.read_bytes())
    except OSError:
        return ""
    own = os.uname().machine
    return f" (it is for {machine}, and this node is {own})" if machine not in (None, own) else ""


def _is_library(path: Path) -> bool:
    """Whether a mapped file is a shared library and not, say, a locale's data."""
    return ".so" in path.name and path.is_file()


def _read(path: Path) -> Parts:
    try:
        return read_parts(path.read_bytes())
    except OSError as exc:
        raise BundleError(f"{path} cannot be read: {exc}") from exc

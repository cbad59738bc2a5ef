"""Programs for arm64, run on whatever machine this is.

`.ci/prepare.sh` unpacks Debian's Python for arm64 and, on another machine, qemu's emulator of its
processor. Who starts a program that is not for this processor is the kernel's to say: by a rule of
binfmt_misc it starts the emulator instead. Since Linux 6.7 each user namespace may have rules of
its own, so that this machine's are left alone. With an older kernel, the emulator is called for
each program, which is nearly the same: the first line of a script is then read by us.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from enum import Enum
from pathlib import Path

from tests.support.empty_host import changed_root
from tests.support.programs import INSTALLED

ROOT = INSTALLED / "arm64"
PYTHON = "/usr/bin/python3.13"
QEMU = "/usr/bin/qemu-aarch64"
MACHINE = 183  # EM_AARCH64, as the header of its programs has it
IS_NATIVE = platform.machine() == "aarch64"
_SECONDS = 120  # it takes 4 s of an idle processor

_RULES = ROOT / "binfmt"
# Programs and libraries of 64 bits, little endian, for any system: as qemu's own package has it.
_MAGIC = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
_MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
# F: the emulator is opened here and now, so that no root it is wanted in needs to have it.
_RULE = f":arm64:M::{_MAGIC}:{_MASK}:{ROOT}{QEMU}:F"
_OWN_RULES = ["unshare", "--user", "--map-root-user", "--mount"]
_MOUNT_RULES = f'mount -t binfmt_misc none "{_RULES}"'
_WITH_RULE = f'{_MOUNT_RULES} && printf %s \'{_RULE}\' >"{_RULES}/register" && exec "$@"'
# The emulator is opened before the root changes, for the new one does not have it.
_WITH_QEMU = """
import os, sys
qemu, root, *words = sys.argv[1:]
opened = os.open(qemu, os.O_RDONLY | os.O_CLOEXEC)
os.chroot(root)
os.chdir("/")
os.execve(opened, [qemu, *words], os.environ)
"""
_IN_ROOT = 'mount --rbind /proc "$1/proc"; mount --bind "$2" "$1/tree"; mount --bind "$3" "$1/host"'
# What starts programs from within needs the emulator, too.
_CALL_QEMU = f"""
import subprocess
run = subprocess.run
subprocess.run = lambda words, **options: run(["{QEMU}", *words], **options)
"""


class Way(Enum):
    """How this machine runs programs for arm64."""

    DIRECT = "they are for this machine, or it has a rule for them"
    RULE = "the kernel starts the emulator, by a rule in a user namespace"
    QEMU = "the emulator is called for each"

    def command(self, root: Path, program: str, *arguments: str) -> list[str]:
        """Give the words that run a program of a folder as if the folder were everything."""
        inside = [*changed_root(root, program), *arguments]
        match self:
            case Way.DIRECT:
                return inside
            case Way.RULE:
                return [*_OWN_RULES, "sh", "-c", _WITH_RULE, "sh", *inside]
            case Way.QEMU:
                words = [*_first_line(root, program), program, *arguments]
                return [sys.executable, "-ISc", _WITH_QEMU, f"{ROOT}{QEMU}", str(root), *words]

    def run_python(self, code: str, *, tree: Path, host: Path) -> str:
        """Run code by Debian's Python, which finds folders of ours at /tree and /host.

        Returns what it says.

        Raises:
            AssertionError: it failed; the text has its last words.
        """
        text = f"{_CALL_QEMU}{code}" if self is Way.QEMU else code
        inside = self.command(ROOT, PYTHON, "-ISc", text)
        script, folders = f'{_IN_ROOT}; shift 3; exec "$@"', map(str, (ROOT, tree, host))
        run = subprocess.run(
            ["unshare", "--mount", "sh", "-ec", script, "sh", *folders, *inside],
            capture_output=True, text=True, check=False, timeout=_SECONDS,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout


def the_kernels_way() -> Way | str:
    """Say how this kernel starts programs for arm64 by itself; if it cannot, why."""
    if IS_NATIVE or _works(*changed_root(ROOT, PYTHON), "-ISc", "pass") is None:
        return Way.DIRECT
    why = _works(*_OWN_RULES, "sh", "-c", _MOUNT_RULES)
    return Way.RULE if why is None else f"binfmt_misc per user namespace (Linux 6.7): {why}"


def _works(*words: str) -> str | None:
    """Try a command; say why it fails if it does."""
    run = subprocess.run(words, capture_output=True, text=True, check=False, timeout=_SECONDS)
    return (run.stderr.strip() or "failed").splitlines()[0] if run.returncode else None


def _first_line(root: Path, program: str) -> list[str]:
    """Give what the first line of a script asks for, as the kernel does: a program, an argument."""
    with (root / program.lstrip("/")).open("rb") as file:
        line = file.readline()
    if not line.startswith(b"#!"):
        return []
    return line[2:].decode().strip().split(maxsplit=1)

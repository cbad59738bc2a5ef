"""What the kernel must let us do; without it no pod could be enrolled (daemonset.md 3)."""

from __future__ import annotations

from pathlib import Path

from ztunnel.errors import PrivilegeError

# By number, as in linux/capability.h. The chart's DAC_OVERRIDE is not among them: it is needed only
# where the host's folders are not root's, and the error then names the folder.
NEEDED = {
    12: "CAP_NET_ADMIN (to write rules and routes)",
    13: "CAP_NET_RAW (to read what iptables wrote)",
    19: "CAP_SYS_PTRACE (to find the namespaces of other processes)",
    21: "CAP_SYS_ADMIN (to enter the namespaces of pods)",
}
_STATUS = Path("/proc/self/status")
_EFFECTIVE = "CapEff:"


def held_capabilities(status: Path = _STATUS) -> int:
    """Read this process's effective capabilities: a bit for each (proc(5)).

    Raises:
        PrivilegeError: the kernel does not say.
    """
    try:
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1], 16) for line in lines if line.startswith(_EFFECTIVE))
    except (OSError, StopIteration, IndexError, ValueError) as exc:
        raise PrivilegeError(f"cannot read our capabilities from {status}: {exc}") from exc


def require_capabilities(held: int) -> None:
    """Make sure that we may do all that we have to.

    Raises:
        PrivilegeError: something is missing; all of it is named.
    """
    missing = [text for number, text in NEEDED.items() if not held >> number & 1]
    if missing:
        raise PrivilegeError(
            f"the node agent lacks {', '.join(missing)}: run it as root with these capabilities"
        )

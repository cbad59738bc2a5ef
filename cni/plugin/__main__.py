"""Where the container runtime comes in: environment and stdin to stdout and exit status."""

from __future__ import annotations

import os
import sys

from cni.plugin.commands import run
from cni.plugin.environment import parse_environment
from cni.plugin.errors import Code, PluginError
from cni.plugin.event import BUDGET_SECONDS
from cni.plugin.journal import Journal
from cni.plugin.netconf import DEFAULT_VERSION, SUPPORTED_VERSIONS, parse_netconf
from cni.plugin.result import error_result, version_result

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import NoReturn

_ABOUT = "istio-cni: tells the node agent about new pods; a CNI plugin, started by the runtime"
_CONFIG_BYTES_MAX = 8 * 1024 * 1024  # some thousand times what a configuration with a result takes
_READ_BYTES = 65536


class Outcome:
    """What the process ends with."""

    __slots__ = ("status", "stdout")

    def __init__(self, status: int, stdout: str) -> None:
        self.status = status
        self.stdout = stdout


def execute(
    env: Mapping[str, str],
    read: Callable[[], bytes],
    journal: Journal,
    *,
    seconds: float = BUDGET_SECONDS,
) -> Outcome:
    """Carry out one call of the runtime; `read` gives what is on stdin."""
    version = DEFAULT_VERSION
    try:
        call = parse_environment(env)
        if call.command == "VERSION":
            return Outcome(0, version_result())
        journal.bind(
            command=call.command,
            pod=f"{call.pod.namespace}/{call.pod.name}",
            container=call.container_id,
            netns=call.netns,
        )
        conf = parse_netconf(read())
        version = conf.version
        journal.configure(run_dir=conf.run_dir, level=conf.log_level)
        return Outcome(0, run(call, conf, journal, seconds=seconds))
    except PluginError as exc:
        failure = exc
    except Exception as exc:  # noqa: BLE001, the runtime must get an answer it can read
        failure = PluginError(Code.INTERNAL, "the plugin failed", f"{type(exc).__name__}: {exc}")
    journal.error("command failed", error=failure.message, details=failure.details)
    return Outcome(1, error_result(failure, version))


def read_stdin(fd: int = 0) -> bytes:
    """Read all of stdin.

    Raises:
        PluginError: it cannot be read, or is too long.
    """
    data = bytearray()
    try:
        while piece := os.read(fd, _READ_BYTES):
            data += piece
            if len(data) > _CONFIG_BYTES_MAX:
                raise PluginError(Code.IO_FAILURE, "network config is too long")
    except OSError as exc:
        raise PluginError(Code.IO_FAILURE, "error reading from stdin", str(exc)) from exc
    return bytes(data)


def main() -> NoReturn:
    """Serve the one call that this process was started for."""
    if "CNI_COMMAND" not in os.environ:
        sys.stderr.write(f"{_ABOUT}\nCNI spec versions: {', '.join(SUPPORTED_VERSIONS)}\n")
        sys.exit(0)
    journal = Journal(_write_stderr)
    outcome = execute(os.environ, read_stdin, journal)
    if outcome.stdout:
        _write_all(1, outcome.stdout.encode() + b"\n")
    journal.close()
    sys.exit(outcome.status)


def _write_stderr(line: bytes) -> None:
    try:
        _write_all(2, line)
    except OSError:
        return  # Nobody listens; a pod's start does not depend on it.


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


if __name__ == "__main__":
    main()

"""A host that has nothing but the plugin: no Python, no libc, no shell."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cni.install.bundle import LAUNCHER
from tests.support.plugin_agent import StandInAgent

BIN = "/opt/cni/bin"
RUN_DIR = "/var/run/istio-cni"
PREVIOUS = '{"cniVersion": "1.0.0",  "ips": [{"address": "10.1.2.3/24", "interface": 1}]}'
CONFIG = {
    "name": "pods",
    "cniVersion": "1.0.0",
    "ambient_enabled": True,
    "agent_decides": True,
    "exclude_namespaces": ["kube-system"],
}
_SECONDS = 30


def changed_root(root: Path, program: str) -> list[str]:
    """Give the words that run a program of a folder as if the folder were everything."""
    return ["chroot", str(root), program]


@dataclass(frozen=True)
class EmptyHost:
    """A folder to be somebody's root, in which there is the plugin and an agent's socket.

    `command` gives the words that run one of the folder's programs there.
    """

    root: Path
    agent: StandInAgent
    command: Callable[[Path, str], list[str]] = changed_root

    @property
    def bin(self) -> Path:
        """The runtime's folder of plugins, as we see it."""
        return self.root / BIN.lstrip("/")

    def runs(
        self, command: str, stdin: str = "", *, namespace: str = "shop", read_only: bool = False
    ) -> subprocess.CompletedProcess[bytes]:
        """Call the plugin as a runtime does; `read_only`: on a root that nobody can write to."""
        env = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": "c0ffee",
            "CNI_NETNS": "/var/run/netns/cni-1",
            "CNI_IFNAME": "eth0",
            "CNI_PATH": BIN,
            "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME=cart-0",
            # A runtime hands on its whole environment: none of this may matter.
            "PYTHONHOME": "/nowhere",
            "PYTHONSTARTUP": "/nowhere",
            "LD_LIBRARY_PATH": "/nowhere",
            "LC_ALL": "de_DE.ISO-8859-1",
        }
        inside = self.command(self.root, f"{BIN}/{LAUNCHER}")
        if read_only:
            remount = f'mount --bind -r "{self.root}" "{self.root}" && exec "$@"'
            inside = ["unshare", "--mount", "sh", "-c", remount, "sh", *inside]
        return subprocess.run(
            inside, env={**env, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, input=stdin.encode(),
            capture_output=True, check=False, timeout=_SECONDS,
        )  # fmt: skip

    def is_refused(self, status: int, reason: str) -> subprocess.CompletedProcess[bytes]:
        """Announce a pod to an agent that does not want it."""
        before = self.agent.answer
        self.agent.refuse(status, reason)
        try:
            return self.runs("ADD", config())
        finally:
            self.agent.answer = before


def config(previous: str | None = PREVIOUS, **keys: object) -> str:
    """Give what the plugin reads: its part of the chain, with what came out of the chain so far."""
    text = json.dumps({**CONFIG, **keys})
    return f'{text[:-1]}, "prevResult": {previous}}}' if previous else text

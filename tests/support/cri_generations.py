"""The container runtimes that tests run on: the machine's own, and a later one that was fetched."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.programs import INSTALLED

_FETCHED = INSTALLED / "runtime/usr"


@dataclass(frozen=True, slots=True)
class Generation:
    """A containerd with CNI plugins of its time.

    `programs`: where it lies, unless it is the one in PATH. `major`: its version, if that matters.
    `spec`: the version of the CNI specification in its chains; `primary`: the plugin that joins
    pods to the node. Whichever it is, containers are run by the machine's own runc.
    """

    name: str
    plugins: Path
    spec: str
    primary: str
    major: int | None = None
    programs: Path | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Give what its programs, which start each other, are to be run with."""
        path = os.environ["PATH"]
        return {**os.environ, "PATH": f"{self.programs}:{path}" if self.programs else path}


OWN = Generation("own containerd", Path("/usr/lib/cni"), "1.0.0", "ptp")
LATER = Generation("containerd 2", _FETCHED / "lib/cni", "1.1.0", "bridge", 2, _FETCHED / "bin")

GENERATIONS = [
    pytest.param(OWN, id=OWN.name),
    pytest.param(
        LATER,
        id=LATER.name,
        marks=pytest.mark.requires_program(str(_FETCHED / "bin/containerd")),
    ),
]

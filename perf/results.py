"""A run's results: kept as JSON, so that tables and plots can be made again without measuring."""

from __future__ import annotations

import json
import os
import platform
import ssl
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from perf.curves import Point
from perf.rounds import Sample
from perf.shapes import Question, Values

BUDGET = Path(__file__).with_name("budget.toml")
LIBRARIES = ("trio", "cryptography", "hpack")


@dataclass(slots=True)
class Results:
    """What was measured, with what, on what."""

    contenders: list[str]
    rounds: int
    seconds: float
    samples: list[Sample] = field(default_factory=list)
    curves: dict[int, Point] = field(default_factory=dict)  # size -> what one more costs
    growth: dict[str, dict[int, Point]] = field(default_factory=dict)  # of what -> size -> values
    units: dict[str, dict[int, float]] = field(default_factory=dict)  # step -> size -> us
    machine: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Keep them."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            [one.shape, one.contender, one.number, _rounded(one.values)] for one in self.samples
        ]
        head = {key: value for key, value in asdict(self).items() if key != "samples"}
        lines = ",\n".join(json.dumps(row) for row in rows)
        text = json.dumps({**head, "samples": "@"}, indent=1)
        path.write_text(text.replace('"@"', f"[\n{lines}\n]") + "\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read what `write` kept."""
        raw = json.loads(path.read_text())
        raw["samples"] = [Sample(*row) for row in raw["samples"]]
        raw["curves"] = _by_size(raw["curves"])
        for name in ("growth", "units"):
            raw[name] = {what: _by_size(found) for what, found in raw.get(name, {}).items()}
        return cls(**raw)

    def measured(self, questions: Iterable[Question]) -> list[Question]:
        """Choose the questions that have an answer here."""
        known = {sample.shape for sample in self.samples}
        return [question for question in questions if question.name in known]


def _by_size(found: dict[str, Any]) -> dict[int, Any]:
    """Give back what JSON took: its keys are texts."""
    return {int(size): value for size, value in found.items()}


def machine(load_before: float) -> dict[str, Any]:
    """Describe this machine; `load_before` is its load average when the run began."""
    return {
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "kernel": platform.release(),
        "system": _system(),
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
        "libraries": {name: version(name) for name in LIBRARIES},
        "load_average_before": round(load_before, 2),
    }


def goals() -> dict[str, dict[str, dict[str, float]]]:
    """Read the budget: shape -> metric -> goal and floor."""
    found: dict[str, dict[str, dict[str, float]]] = tomllib.loads(BUDGET.read_text())
    return found


def _rounded(values: Values) -> Values:
    return {key: float(f"{value:.6g}") for key, value in values.items()}


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _system() -> str:
    return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")

"""What every test may rely on.

A test says what it needs: `@pytest.mark.netns` (root), `@pytest.mark.requires_program("nft")`, or
the `envoy_program` fixture. Where that is missing, a developer sees it skipped with the reason.
Under `make test` and in CI the same reason fails it, and so does any other skip: a missing install
step must not look like success. Two marks may say "not given" there: `reference`, because no
registry has the programs it runs, and `newer_kernel`, because no step installs a kernel.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.envoy import EnvoyError, find_envoy

STRICT = os.environ.get("CI") == "true" or os.environ.get("ZTUNNEL_TESTS_STRICT") == "1"

# Two cores run everything in parallel: how long one example takes says nothing about our code.
settings.register_profile(
    "shared-machine",
    deadline=None,
    print_blob=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("shared-machine")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose needs this machine does not meet; strict runs turn that into a failure."""
    if item.get_closest_marker("netns") and os.geteuid() != 0:
        pytest.skip("needs root to build network namespaces")
    for mark in item.iter_markers("requires_program"):
        for name in mark.args:
            if shutil.which(name) is None:
                pytest.skip(f"needs the program {name}")
    for mark in item.iter_markers("reference"):
        for name in mark.args:
            if not os.access(os.environ.get(name, ""), os.X_OK):
                pytest.skip(f"not given: set {name} to the path of the reference's program")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In a strict run, fail what was skipped."""
    report = yield
    if STRICT and report.skipped and not (hasattr(report, "wasxfail") or _may_lack(item, report)):
        report.outcome = "failed"
        report.longrepr = f"may not be skipped here: {_reason(report.longrepr)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """In a strict run, fail a whole file that was skipped, too."""
    report = yield
    if STRICT and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"may not be skipped here: {_reason(report.longrepr)}"
    return report


def _may_lack(item: pytest.Item, report: pytest.TestReport) -> bool:
    """Whether what a test says it was not given is what nobody could have installed."""
    is_marked = any(item.get_closest_marker(name) for name in ("reference", "newer_kernel"))
    return is_marked and "not given: " in _reason(report.longrepr)


def _reason(longrepr: object) -> str:
    """Give the text of a skip, which pytest keeps as (file, line, text)."""
    return str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)


@pytest.fixture(scope="session")
def envoy_program() -> Path:
    """Give the Envoy to run as a peer."""
    try:
        return find_envoy()
    except EnvoyError as exc:
        pytest.skip(str(exc))

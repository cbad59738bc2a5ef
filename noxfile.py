"""Every check that CI runs, by name.

`nox` runs what needs no privileges; `nox -s netns` needs root. The sessions make no environments of
their own but use `.venv` (`.ci/prepare.sh test lint` makes it), so they start at once.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.default_venv_backend = "none"
nox.options.tags = ["check", "unprivileged"]

BIN = Path(".venv/bin")
PYTHON_TREES = ("ztunnel", "cni", "tests", "perf", "noxfile.py")
# In tests these speak of style and checkpoints that matter in the data path only.
ASYNC_RULES_NOT_FOR_TESTS = ",".join(
    f"ASYNC{rule}" for rule in (100, 110, 113, 114, 124, 128, 910, 911, 912, 913)
)


def run(session: nox.Session, program: str, *arguments: str) -> None:
    """Run a program of our environment."""
    session.run(str(BIN / program), *arguments, external=True)


def python_trees() -> list[str]:
    """List the trees that exist: `perf` need not be there."""
    return [tree for tree in PYTHON_TREES if Path(tree).exists()]


def python_files(*trees: str) -> list[str]:
    """List the files of trees, without generated ones; flake8-async takes no folders."""
    files = (file for tree in trees for file in Path(tree).rglob("*.py"))
    return sorted(str(file) for file in files if "wire/pb" not in str(file))


@nox.session(tags=["check"])
def lint(session: nox.Session) -> None:
    """Style and format."""
    run(session, "ruff", "check", "--quiet", *python_trees())
    run(session, "ruff", "format", "--check", *python_trees())


@nox.session(tags=["check"])
def concurrency(session: nox.Session) -> None:
    """The async rules that ruff lacks."""
    startable = "--startable-in-context-manager=run,_serve_pod,forward"
    run(session, "flake8-async", "--enable=ASYNC", startable, *python_files("ztunnel", "cni"))
    run(
        session,
        "flake8-async",
        "--enable=ASYNC",
        f"--disable={ASYNC_RULES_NOT_FOR_TESTS}",
        *python_files("tests"),
    )


@nox.session(tags=["check"])
def spelling(session: nox.Session) -> None:
    """Spelling, in code and documents."""
    run(session, "codespell", *python_trees(), "docs", "Makefile", ".ci")


@nox.session(tags=["check"])
def types(session: nox.Session) -> None:
    """Strict types: the programs, and what tests share."""
    run(session, "mypy")
    run(session, "mypy", "tests/support", "noxfile.py")


@nox.session(tags=["check"])
def contracts(session: nox.Session) -> None:
    """Imports point down the house."""
    run(session, "lint-imports")


@nox.session(tags=["check"])
def protos(session: nox.Session) -> None:
    """Generated code is current with the .proto files."""
    session.run(".ci/protos.sh", "check", external=True)


@nox.session(tags=["unprivileged"])
def unit(session: nox.Session) -> None:
    """Run the tests that need no privileges."""
    run(session, "pytest", "-n", "logical", "-m", "not netns and not interop", *session.posargs)


@nox.session
def netns(session: nox.Session) -> None:
    """Run the tests with namespaces and real peers; needs root."""
    run(session, "pytest", "-n", "logical", "-m", "netns or interop", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run everything that `make test` runs; needs root."""
    session.run(".ci/test.sh", external=True)

"""The house rules that linters cannot check.

The two lists at the top only shrink: an entry that is no longer needed fails its test.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Source files without a unit test of their own, and the test that covers them instead.
TESTED_ELSEWHERE: dict[str, str] = {
    "ztunnel/__main__.py": "tests/netns/test_demo.py",
    "ztunnel/app.py": "tests/netns/test_startup.py",
    "ztunnel/cli/demo.py": "tests/netns/test_demo.py",
    "ztunnel/cli/proxy.py": "tests/netns/test_startup.py",
    "ztunnel/devmesh/demo.py": "tests/netns/test_demo.py",
    "ztunnel/devmesh/kept.py": "tests/netns/test_demo.py",
    "ztunnel/devmesh/kube_mesh.py": "tests/netns/test_demo.py",
    "ztunnel/devmesh/mesh.py": "tests/netns/test_proxy.py",
    "ztunnel/preflight.py": "tests/netns/test_startup.py",
    "ztunnel/proxy/captured.py": "tests/unit/proxy/test_plaintext.py",
    "ztunnel/proxy/dialling.py": "tests/unit/proxy/test_opening.py",
    "ztunnel/proxy/double.py": "tests/flow/test_double.py",
    "ztunnel/proxy/greeting.py": "tests/unit/proxy/test_inbound.py",
    "ztunnel/proxy/judgement.py": "tests/flow/test_policy.py",
    "ztunnel/proxy/socks.py": "tests/flow/test_socks.py",
    "ztunnel/proxy/supervision.py": "tests/flow/test_waiting.py",
    "ztunnel/transport/attempt.py": "tests/unit/transport/test_pool.py",
    "ztunnel/transport/facts.py": "tests/unit/transport/test_secure_dial.py",  # data only
    "ztunnel/transport/grpc_stream.py": "tests/unit/transport/test_grpc.py",
    "ztunnel/transport/owners.py": "tests/unit/transport/test_tunnel.py",  # protocols only
}
# Files that were over the limit when it was introduced, and how long each may be.
LONG_FILES: dict[str, int] = {
    "ztunnel/config.py": 425,  # one line and more for each of some seventy settings
}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# Written so that this file does not contain what it looks for.
MACHINE_PATHS = re.compile(r"/wor[k]/|/roo[t]/|/home/(?!kubernetes/)\w+/|\.pyen[v]")
UNFINISHED = re.compile(r"\b(TOD[O]|FIXM[E])\b")
REGISTRY_HOSTS = re.compile(
    r"pypi\.or[g]|pythonhosted\.or[g]|(deb|security)\.debian\.or[g]|registry\.npmjs\.or[g]|crates\.i[o]\b"
)
TEXT_SUFFIXES = {".cfg", ".json", ".md", ".proto", ".py", ".pyi", ".sh", ".toml", ".yaml", ".yml"}
SKIPPED_FOLDERS = {"build", "dist", "__pycache__"}


def files(*suffixes: str, under: str = ".") -> Iterator[str]:
    """Walk what belongs to the project: nothing hidden but `.ci`, nothing built or generated."""
    for folder, names, found in os.walk(ROOT / under):
        names[:] = [
            name
            for name in names
            if name == ".ci"
            or not (name.startswith(".") or name in SKIPPED_FOLDERS or name.endswith(".egg-info"))
        ]
        for name in found:
            path = (Path(folder) / name).relative_to(ROOT)
            if path.suffix in suffixes and not path.match("ztunnel/wire/pb/*_pb2.py*"):
                yield str(path)


def sources() -> list[str]:
    return sorted(path for tree in ("ztunnel", "cni") for path in files(".py", under=tree))


def python_files() -> list[str]:
    return sorted(files(".py"))


def texts() -> list[str]:
    named = {"Makefile", ".ci/run"}
    return sorted({*files(*TEXT_SUFFIXES), *(name for name in named if (ROOT / name).exists())})


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def assert_none(complaints: list[str]) -> None:
    """Fail with all complaints, one a line, and nothing else."""
    if complaints:
        pytest.fail(f"{len(complaints)} complaints:\n" + "\n".join(complaints), pytrace=False)


def unit_test_of(source: str) -> str:
    """Name the test file that a source file must have."""
    path = Path(source)
    inside = path.relative_to("ztunnel") if path.parts[0] == "ztunnel" else path
    return str(Path("tests/unit") / inside.with_name(f"test_{inside.stem.strip('_')}.py"))


def test_there_is_something_to_check() -> None:
    assert "ztunnel/errors.py" in sources()
    assert "tests/unit/test_tidy.py" in python_files()
    assert {"Makefile", ".ci/run", ".ci/test.sh", "pyproject.toml"} <= set(texts())


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("ztunnel/errors.py", "tests/unit/test_errors.py"),
        ("ztunnel/wire/hbone/frames.py", "tests/unit/wire/hbone/test_frames.py"),
        ("ztunnel/__main__.py", "tests/unit/test_main.py"),
        ("cni/redirect/plan.py", "tests/unit/cni/redirect/test_plan.py"),
    ],
)
def test_where_the_unit_test_of_a_file_lies(source: str, wanted: str) -> None:
    assert unit_test_of(source) == wanted


def test_each_source_file_has_its_unit_test() -> None:
    without = [
        source
        for source in sources()
        if not source.endswith("__init__.py")
        and source not in TESTED_ELSEWHERE
        and not (ROOT / unit_test_of(source)).exists()
    ]
    assert_none(without)


def test_what_is_tested_elsewhere_is_and_needs_to_be() -> None:
    for source, elsewhere in TESTED_ELSEWHERE.items():
        assert (ROOT / source).exists(), f"{source} is gone: take it off the list"
        assert (ROOT / elsewhere).exists(), f"{source}: {elsewhere} does not exist"
        assert not (ROOT / unit_test_of(source)).exists(), f"{source}: take it off the list"


def test_no_file_is_too_long() -> None:
    lengths = {path: len(read(path).splitlines()) for path in python_files()}
    limits = {path: LONG_FILES.get(path, MAX_FILE_LINES) for path in lengths}
    assert_none([f"{path}: {n} lines" for path, n in lengths.items() if n > limits[path]])
    needless = [path for path in LONG_FILES if lengths.get(path, 0) <= MAX_FILE_LINES]
    assert_none([f"{path}: take it off the list" for path in needless])


def functions(path: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_no_function_is_too_long() -> None:
    long = [
        f"{path}:{function.lineno} {function.name}"
        for path in python_files()
        for function in functions(path)
        if (function.end_lineno or 0) - function.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert_none(long)


def test_each_package_file_holds_a_docstring_and_nothing_else() -> None:
    wrong = []
    for path in sources():
        if path.endswith("__init__.py"):
            body = ast.parse(read(path)).body
            if len(body) != 1 or ast.get_docstring(ast.parse(read(path))) is None:
                wrong.append(path)
    assert_none(wrong)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        pytest.param(MACHINE_PATHS, "a path of one machine", id="machine paths"),
        pytest.param(UNFINISHED, "an issue belongs in the tracker", id="unfinished work"),
        pytest.param(REGISTRY_HOSTS, "registries are reached by package name", id="registries"),
    ],
)
def test_no_file_contains(pattern: re.Pattern[str], why: str) -> None:
    found = [
        f"{path}:{number}: {why}: {line.strip()}"
        for path in texts()
        for number, line in enumerate(read(path).splitlines(), start=1)
        if pattern.search(line)
    ]
    assert_none(found)


@pytest.mark.requires_program("bash", "diff")
def test_generated_code_is_current() -> None:
    """Compare with a new run of protoc (`make protos` mends it)."""
    check = subprocess.run(
        [".ci/protos.sh", "check"],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode == 0, check.stdout + check.stderr


@pytest.mark.parametrize(
    ("strict", "closing"), [("0", "1 passed, 2 skipped"), ("1", "1 passed, 2 errors")]
)
def test_what_cannot_run_is_skipped_by_hand_and_fails_a_strict_run(
    strict: str, closing: str, tmp_path: Path
) -> None:
    (tmp_path / "test_runs.py").write_text(
        "import pytest\n"
        "@pytest.mark.requires_program('no-such-program')\n"
        "def test_lacks_a_program(): ...\n"
        "def test_runs(): ...\n"
    )
    (tmp_path / "test_lacks_a_module.py").write_text(
        "import pytest\npytest.importorskip('no_such_module')\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-n0", "-p", "no:cacheprovider",
         "--continue-on-collection-errors", "--rootdir", ROOT, "-c", "pyproject.toml", tmp_path],
        cwd=ROOT,
        env={**os.environ, "CI": "", "ZTUNNEL_TESTS_STRICT": strict},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert closing in run.stdout.splitlines()[-1]
    assert run.returncode == int(strict)


def commands_in(text: str) -> list[str]:
    """List the command lines in the fenced blocks of a Markdown text, without prompts."""
    blocks = re.findall(r"^```(?:sh|bash|shell|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = (
        line.strip().removeprefix("$ ").removeprefix("# ")
        for b in blocks
        for line in b.splitlines()
    )
    return [line.removeprefix("sudo ") for line in lines if line]


def known_commands() -> dict[str, set[str]]:
    """Give, for the programs that are ours, the first words they understand."""
    usage = subprocess.run(
        [sys.executable, "-m", "ztunnel", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "make": set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE)),
        "nox": set(re.findall(r"^@nox\.session.*\ndef (\w+)", read("noxfile.py"), re.MULTILINE)),
        "ztunnel": set(re.findall(r"[a-z][a-z-]+", usage.stdout)),
    }


def test_commands_are_found_in_markdown() -> None:
    text = "Run:\n```sh\n$ sudo make demo\nls\n```\nand\n```yaml\nmake: no\n```\n"
    assert commands_in(text) == ["make demo", "ls"]


@pytest.mark.parametrize("document", ["README.md", "docs/development.md"])
def test_commands_in_the_documents_exist(document: str) -> None:
    known = known_commands()
    commands = commands_in(read(document))
    assert {"make demo", "make test"} <= {command.split("#")[0].strip() for command in commands}
    strange = []
    for line in commands:
        program, *words = line.split("#")[0].split()
        wanted = [word for word in words if not word.startswith("-") and "=" not in word][:1]
        known_words = known.get(Path(program).name)
        if known_words is not None and not known_words.issuperset(wanted):
            strange.append(line)
    assert_none(strange)

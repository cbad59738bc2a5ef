from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from cni.install.errors import BundleError
from cni.install.hostpath import host_path_of

FOLDER = "/host/opt/cni/bin"


def line(device: str, root: str, point: str, options: str = "rw,relatime") -> str:
    return f"36 35 {device} {root} {point} {options} master:1 - ext4 /dev/sda1 rw\n"


HOST_ROOT = line("8:1", "/", "/")


@pytest.mark.parametrize(
    ("own", "host", "path"),
    [
        pytest.param(
            line("8:1", "/opt/cni/bin", FOLDER), HOST_ROOT, "/opt/cni/bin", id="on the root"
        ),
        pytest.param(
            line("8:2", "/cni/bin", FOLDER),
            HOST_ROOT + line("8:2", "/", "/opt"),
            "/opt/cni/bin",
            id="on a file system of its own",
        ),
        pytest.param(
            line("8:2", "/kubernetes/bin", FOLDER),
            HOST_ROOT
            + line("8:2", "/", "/home", "rw,noexec")
            + line("8:2", "/kubernetes/bin", "/home/kubernetes/bin"),
            "/home/kubernetes/bin",
            id="bound where programs may run",
        ),
        pytest.param(
            line("8:1", "/ostree/var/lib/cni/bin", FOLDER),
            line("8:1", "/ostree/deploy", "/") + line("8:1", "/ostree/var", "/var"),
            "/var/lib/cni/bin",
            id="a part of a file system",
        ),
        pytest.param(
            line("8:1", "/my\\040cni", FOLDER), HOST_ROOT, "/my cni", id="a name with a space"
        ),
        pytest.param(
            line("8:1", "/wrong", FOLDER) + line("8:1", "/right", FOLDER),
            HOST_ROOT,
            "/right",
            id="the last mount hides the others",
        ),
    ],
)
def test_where_the_host_has_it(own: str, host: str, path: str) -> None:
    assert host_path_of(FOLDER, own=own, host=host) == path
    assert host_path_of(FOLDER + "/", own=own, host=host) == path


@pytest.mark.parametrize(
    ("own", "host"),
    [
        pytest.param(line("8:1", "/", "/"), HOST_ROOT, id="not a mount"),
        pytest.param(line("8:1", "/opt", FOLDER), "", id="the host has nothing"),
        pytest.param(line("8:2", "/x", FOLDER), HOST_ROOT, id="another file system"),
        pytest.param(
            line("8:1", "/optional/x", FOLDER), line("8:1", "/opt", "/opt"), id="another part"
        ),
        pytest.param(
            line("8:1", "/x", FOLDER), line("8:1", "/", "/", "rw,noexec"), id="nothing may run"
        ),
    ],
)
def test_a_place_that_cannot_be_found_is_an_error_and_never_a_guess(own: str, host: str) -> None:
    with pytest.raises(BundleError):
        host_path_of(FOLDER, own=own, host=host)


@given(st.text(), st.text())
def test_any_table_is_read_or_refused(own: str, host: str) -> None:
    with pytest.raises(BundleError):
        host_path_of(FOLDER, own=own, host=host)


def test_the_kernel_s_own_tables_are_understood() -> None:
    table = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    assert host_path_of("/proc", own=table, host=table) == "/proc"

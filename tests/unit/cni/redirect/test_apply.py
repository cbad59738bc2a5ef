from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from cni.redirect.apply import apply_redirect, remove_redirect
from cni.redirect.errors import RedirectError
from cni.redirect.plan import RedirectPlan
from tests.support.namespaces import needs_root, open_descriptors
from ztunnel.devmesh.cluster import new_namespace
from ztunnel.linux.netns import PodNetns

T = TypeVar("T")


class Gone:
    """A namespace that cannot be entered."""

    def call(self, action: Callable[[], T]) -> T:
        raise OSError("setns: Invalid argument")


def test_a_namespace_that_cannot_be_entered_is_reported() -> None:
    with pytest.raises(RedirectError, match="cannot enter the pod's namespace: setns"):
        apply_redirect(Gone(), RedirectPlan())
    with pytest.raises(RedirectError, match="cannot enter"):
        remove_redirect(Gone())


def test_what_is_no_namespace_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with PodNetns.open(tmp_path / "file") as space, pytest.raises(RedirectError, match="setns"):
        apply_redirect(space, RedirectPlan())


@pytest.mark.netns
@needs_root
def test_a_pod_whose_loopback_is_down_is_reported_and_nothing_leaks() -> None:
    with new_namespace() as space:
        before = open_descriptors()
        with pytest.raises(RedirectError, match="lo interface down"):
            apply_redirect(space, RedirectPlan())
        remove_redirect(space)
        assert open_descriptors() == before

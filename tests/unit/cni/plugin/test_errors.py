from __future__ import annotations

from cni.plugin.errors import Code, PluginError


def test_an_error_carries_what_the_runtime_shows() -> None:
    error = PluginError(Code.BAD_NETNS, "same netns", "in CNI_NETNS")
    assert (error.code, error.message, error.details) == (8, "same netns", "in CNI_NETNS")
    assert str(error) == "same netns"


def test_our_own_codes_leave_the_specifications_alone() -> None:
    assert [code for code in Code if 12 <= code < 100] == []

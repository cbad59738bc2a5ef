from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given, strategies as st

from ztunnel.errors import PeerError
from ztunnel.wire import cri
from ztunnel.wire.pb import cri_pb2


def a_status(info: object) -> bytes:
    text = info if isinstance(info, str) else json.dumps(info)
    return cri_pb2.PodSandboxStatusResponse(info={"info": text}).SerializeToString()


def with_namespaces(*namespaces: dict[str, str]) -> dict[str, object]:
    return {"pid": 7, "runtimeSpec": {"linux": {"namespaces": namespaces}}}


def test_only_what_runs_is_asked_for_which_an_empty_value_says() -> None:
    assert cri.encode_list() == b"\x0a\x02\x12\x00"


def test_a_status_is_asked_for_with_its_verbose_part() -> None:
    assert cri.encode_status("c1") == b"\x0a\x02c1\x10\x01"


def test_what_does_not_run_or_is_no_pods_is_left_out() -> None:
    pod = cri_pb2.PodSandboxMetadata(name="a", uid="u", namespace="n")
    items = [
        cri_pb2.PodSandbox(id="runs", metadata=pod, created_at=5),
        cri_pb2.PodSandbox(id="over", metadata=pod, state=cri_pb2.SANDBOX_NOTREADY),
        cri_pb2.PodSandbox(id="nobody's"),
        cri_pb2.PodSandbox(metadata=pod),
    ]
    data = cri_pb2.ListPodSandboxResponse(items=items).SerializeToString()
    assert cri.decode_list(data) == [cri.Sandbox("runs", "u", 5)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("namespaces", "wanted"),
    [
        ([{"type": "pid"}, {"type": "network", "path": "/run/netns/a"}], "/run/netns/a"),
        ([{"type": "network"}], None),
        ([{"type": "pid", "path": "/proc/1/ns/pid"}], None),
        ([], None),
    ],
)
def test_the_namespace_is_found_in_the_process_s_specification(
    namespaces: list[dict[str, str]], wanted: str | None
) -> None:
    assert cri.decode_netns(a_status(with_namespaces(*namespaces))) == wanted


@pytest.mark.parametrize("info", ["", "{", '{"runtimeSpec": 5}', {"runtimeSpec": {"linux": []}}])
def test_another_verbose_part_is_refused(info: object) -> None:
    with pytest.raises(PeerError, match="container runtime: not a sandbox's status"):
        cri.decode_netns(a_status(info))


def test_a_runtime_without_that_part_is_refused() -> None:
    with pytest.raises(PeerError, match="not a sandbox's status"):
        cri.decode_netns(b"")


@given(st.binary())
def test_other_bytes_never_do_more_than_be_refused(data: bytes) -> None:
    for decode in (cri.decode_list, cri.decode_netns):
        with contextlib.suppress(PeerError):
            decode(data)

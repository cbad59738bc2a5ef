from __future__ import annotations

import json

import pytest
from hypothesis import given, strategies as st

from cni.agent.errors import KubeError
from cni.agent.objects import decode_namespace, decode_pod
from tests.support.kube import a_namespace, a_pod
from ztunnel.model.network import parse_ip


def test_a_pod_is_read() -> None:
    raw = a_pod(
        ip="10.1.0.1", ipv6="fd00::1", labels={"a": "b"}, account="shop", hostIP="192.0.2.1"
    )
    raw["metadata"] |= {"resourceVersion": "7", "managedFields": [{}]}
    pod = decode_pod(json.dumps(raw).encode())
    assert (pod.uid, pod.full_name, pod.service_account) == ("uid-shop-a", "shop/a", "shop")
    assert pod.ips == (parse_ip("10.1.0.1"), parse_ip("fd00::1"))
    assert pod.host_ips == (parse_ip("192.0.2.1"),)
    assert (pod.version, pod.labels, pod.status) == ("7", {"a": "b"}, None)
    assert not pod.host_network
    assert not pod.is_over


@pytest.mark.parametrize(
    ("phase", "over"),
    [("Running", False), ("Pending", False), ("Succeeded", True), ("Failed", True)],
)
def test_a_pod_is_over_in_its_terminal_phases(phase: str, over: bool) -> None:
    assert decode_pod(json.dumps(a_pod(phase=phase)).encode()).is_over is over


def test_what_is_absent_has_its_default() -> None:
    pod = decode_pod(b'{"metadata": {"name": "a", "uid": "u", "labels": null}}')
    assert (pod.ips, pod.labels, pod.annotations, pod.service_account) == ((), {}, {}, "default")


def test_a_single_address_is_enough_and_mapped_ones_are_ipv4() -> None:
    raw = b'{"metadata": {"name": "a", "uid": "u"}, "status": {"podIP": "::ffff:10.0.0.1"}}'
    assert decode_pod(raw).ips == (parse_ip("10.0.0.1"),)


def test_the_annotation_is_the_status() -> None:
    raw = a_pod(annotations={"ambient.istio.io/redirection": "enabled"})
    assert decode_pod(json.dumps(raw).encode()).status == "enabled"


def test_a_namespace_is_read() -> None:
    namespace = decode_namespace(json.dumps(a_namespace(mode="ambient")).encode())
    assert (namespace.name, namespace.uid) == ("shop", "uid-shop")
    assert namespace.labels == {"istio.io/dataplane-mode": "ambient"}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"{}",
        b'{"metadata": {"name": 1, "uid": "u"}}',
        b'{"metadata": {"name": "a", "uid": "u"}, "status": {"podIP": "nonsense"}}',
    ],
)
def test_what_is_no_pod_is_refused(raw: bytes) -> None:
    with pytest.raises(KubeError, match="not a pod"):
        decode_pod(raw)


@given(st.binary(max_size=200))
def test_bytes_raise_nothing_else(raw: bytes) -> None:
    for decode in (decode_pod, decode_namespace):
        with pytest.raises(KubeError):
            decode(raw)

from __future__ import annotations

from dataclasses import replace

import pytest

from cni.agent.eligibility import Decision, Eligibility, Reason
from cni.agent.objects import KubePod
from tests.support.node_world import a_kube_pod

MODE = "istio.io/dataplane-mode"
AMBIENT, NONE = {MODE: "ambient"}, {MODE: "none"}
RULES = Eligibility(excluded_namespaces=frozenset({"kube-system"}))


@pytest.mark.parametrize(
    ("pod", "namespace", "reason"),
    [
        pytest.param({}, {}, Reason.NOT_SELECTED, id="no label anywhere"),
        pytest.param({}, AMBIENT, Reason.SELECTED, id="the namespace's label"),
        pytest.param({}, NONE, Reason.NOT_SELECTED, id="a namespace that says none"),
        pytest.param({"labels": AMBIENT}, {}, Reason.SELECTED, id="the pod's own label"),
        pytest.param({"labels": AMBIENT}, NONE, Reason.SELECTED, id="the pod's label wins"),
        pytest.param({"labels": NONE}, AMBIENT, Reason.NOT_SELECTED, id="the pod opts out"),
        pytest.param({"labels": {MODE: "other"}}, AMBIENT, Reason.SELECTED, id="another value"),
        pytest.param(
            {"labels": {MODE: "other"}}, {}, Reason.NOT_SELECTED, id="another value alone"
        ),
        pytest.param({"host_network": True}, AMBIENT, Reason.HOST_NETWORK, id="host network"),
        pytest.param(
            {"host_network": True, "labels": AMBIENT}, {}, Reason.HOST_NETWORK, id="both of them"
        ),
        pytest.param(
            {"annotations": {"sidecar.istio.io/status": ""}}, AMBIENT, Reason.SIDECAR, id="sidecar"
        ),
        pytest.param({"is_over": True}, AMBIENT, Reason.OVER, id="terminal"),
        pytest.param({"namespace": "kube-system"}, AMBIENT, Reason.EXCLUDED, id="excluded"),
        pytest.param(
            {"namespace": "istio-system", "labels": {"app": "ztunnel"}},
            AMBIENT,
            Reason.PROXY,
            id="a node proxy",
        ),
        pytest.param(
            {"labels": {"app": "ztunnel"}}, AMBIENT, Reason.SELECTED, id="only named like one"
        ),
        pytest.param({}, None, Reason.NAMESPACE_UNKNOWN, id="a namespace not known yet"),
        pytest.param(
            {"labels": AMBIENT}, None, Reason.NAMESPACE_UNKNOWN, id="labelled, namespace not known"
        ),
        pytest.param({"host_network": True}, None, Reason.HOST_NETWORK, id="out, wherever it is"),
    ],
)
def test_who_is_in_the_mesh(
    pod: dict[str, object], namespace: dict[str, str] | None, reason: Reason
) -> None:
    verdict = RULES.judge(a_kube_pod(**pod), namespace)
    assert verdict.reason is reason
    wanted = {Reason.SELECTED: Decision.IN, Reason.NAMESPACE_UNKNOWN: Decision.UNKNOWN}
    assert verdict.decision is wanted.get(reason, Decision.OUT)


def test_without_selectors_nobody_is_in() -> None:
    pod: KubePod = a_kube_pod(labels=AMBIENT)
    nobody = replace(RULES, enablements=())
    assert nobody.judge(pod, AMBIENT).reason is Reason.NOT_SELECTED

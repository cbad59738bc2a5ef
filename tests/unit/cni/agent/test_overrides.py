from __future__ import annotations

from ipaddress import ip_network

import pytest
from hypothesis import given, strategies as st

from cni.agent import overrides
from cni.agent.overrides import ProbeStrategy, Redirecting, parse_bool, with_addresses
from cni.redirect.plan import Exclusion, RedirectPlan
from tests.support.node_world import a_kube_pod
from ztunnel.model.network import parse_ip

NET = ip_network("10.0.0.0/8")


@pytest.mark.parametrize(
    ("annotation", "value", "plan"),
    [
        (overrides.BYPASS_INBOUND, "true", RedirectPlan(ingress_mode=True)),
        (overrides.BYPASS_INBOUND, "T", RedirectPlan(ingress_mode=True)),
        (overrides.BYPASS_INBOUND, "0", RedirectPlan()),
        (overrides.DNS_CAPTURE, "1", RedirectPlan(dns=True)),
        (overrides.DNS_CAPTURE, "False", RedirectPlan()),
        (
            overrides.VIRTUAL_INTERFACES,
            " tap0, tap1,,tap0",
            RedirectPlan(virtual_interfaces=("tap0", "tap1")),
        ),
        (
            overrides.EXCLUDE_INBOUND_PORTS,
            "22, 9090",
            RedirectPlan(inbound_exclusion=Exclusion(ports=(22, 9090))),
        ),
        (
            overrides.EXCLUDE_OUTBOUND_PORTS,
            "25",
            RedirectPlan(outbound_exclusion=Exclusion(ports=(25,))),
        ),
        (
            overrides.EXCLUDE_INBOUND_CIDRS,
            "10.0.0.0/8",
            RedirectPlan(inbound_exclusion=Exclusion(networks=(NET,))),
        ),
        (
            overrides.EXCLUDE_OUTBOUND_CIDRS,
            "10.0.0.0/8",
            RedirectPlan(outbound_exclusion=Exclusion(networks=(NET,))),
        ),
    ],
)
def test_an_annotation_changes_the_plan(annotation: str, value: str, plan: RedirectPlan) -> None:
    pod = a_kube_pod(annotations={annotation: value})
    assert Redirecting().plan_for(pod) == (plan, [])


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (overrides.BYPASS_INBOUND, "yes"),
        (overrides.BYPASS_INBOUND, "TrUe"),
        (overrides.DNS_CAPTURE, ""),
        (overrides.VIRTUAL_INTERFACES, "eth0,x; accept"),
        (overrides.EXCLUDE_INBOUND_PORTS, "22,http"),
        (overrides.EXCLUDE_INBOUND_PORTS, "0"),
        (overrides.EXCLUDE_OUTBOUND_PORTS, "70000"),
        (overrides.EXCLUDE_OUTBOUND_CIDRS, "10.0.0.1/8"),
        (overrides.EXCLUDE_INBOUND_PORTS, ",".join(map(str, range(1, 100)))),
    ],
)
def test_one_that_cannot_be_read_is_ignored_and_told(annotation: str, value: str) -> None:
    plan, warnings = Redirecting().plan_for(a_kube_pod(annotations={annotation: value}))
    assert plan == RedirectPlan()
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{annotation}: ")


def test_a_pod_overrides_what_the_operator_chose() -> None:
    chosen = Redirecting(dns=True, ipv6=False, syn_only=True)
    plan, _ = chosen.plan_for(a_kube_pod())
    assert plan == RedirectPlan(dns=True, ipv6=False, syn_only=True)
    plan, _ = chosen.plan_for(a_kube_pod(annotations={overrides.DNS_CAPTURE: "f"}))
    assert not plan.dns


def test_probes_may_come_from_the_nodes_addresses() -> None:
    node, router = parse_ip("192.0.2.1"), parse_ip("10.1.0.254")
    chosen = Redirecting(probes=ProbeStrategy.NODE_ADDRESS, node_addresses=(router, node))
    plan, _ = chosen.plan_for(a_kube_pod(host_ips=(node,)))
    assert plan.probe_sources == (node, router)
    plan, _ = Redirecting(probes=ProbeStrategy.NONE).plan_for(a_kube_pod(host_ips=(node,)))
    assert plan.probe_sources == ()


def test_the_plugins_addresses_count_until_kubernetes_has_them() -> None:
    told = (parse_ip("10.9.9.9"),)
    assert with_addresses(a_kube_pod(ips=()), told).ips == told
    assert with_addresses(a_kube_pod(), told).ips == a_kube_pod().ips


NAMES = st.sampled_from(
    [
        overrides.DNS_CAPTURE,
        overrides.EXCLUDE_INBOUND_CIDRS,
        overrides.VIRTUAL_INTERFACES,
        overrides.EXCLUDE_OUTBOUND_PORTS,
    ]
)


@given(st.dictionaries(NAMES, st.text(max_size=40)))
def test_no_annotation_is_an_error(annotations: dict[str, str]) -> None:
    Redirecting().plan_for(a_kube_pod(annotations=annotations))


def test_booleans_are_those_of_go() -> None:
    assert [parse_bool(text) for text in ("1", "t", "T", "TRUE", "true", "True")] == [True] * 6
    assert [parse_bool(text) for text in ("0", "f", "F", "FALSE", "false", "False")] == [False] * 6

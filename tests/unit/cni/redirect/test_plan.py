from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from cni.redirect.plan import EXCLUSIONS_MAX, Exclusion, RedirectPlan
from cni.redirect.rules import Chain

# The lists of cni.md 4.2 in the form of 4.3; "M" is the proxy's mark.
IS_M = "meta mark & 0x00000fff == 0x00000539"
NOT_M = "meta mark & 0x00000fff != 0x00000539"
PROBE4, PROBE6 = "169.254.7.127", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"

MARK_CONNECTION = f"{IS_M} counter ct mark set ct mark & 0xfffff000 | 0x00000111"
RESTORE_MARK = "ct mark & 0x00000fff == 0x00000111 counter meta mark set ct mark"
IN_PROBE4 = f"meta l4proto tcp ip saddr {PROBE4} counter accept"
IN_PROBE6 = f"meta l4proto tcp ip6 saddr {PROBE6} counter accept"
# "local": ours, the reference captures whatever reaches the pod.
LOCAL = "fib daddr type local"
IN_4 = f"ip daddr != 127.0.0.1 tcp dport != 15008 {LOCAL} {NOT_M} counter redirect to :15006"
IN_6 = f"ip6 daddr != ::1 tcp dport != 15008 {LOCAL} {NOT_M} counter redirect to :15006"
OUT_PROBE4 = f"meta l4proto tcp ip daddr {PROBE4} counter accept"
OUT_PROBE6 = f"meta l4proto tcp ip6 daddr {PROBE6} counter accept"
OUT_LINK = "ip6 daddr fe80::/10 counter accept"
DNS_UDP = f'oifname != "lo" {NOT_M} udp dport 53 counter redirect to :15053'
DNS_TCP4 = f"ip daddr != 127.0.0.1 tcp dport 53 {NOT_M} counter redirect to :15053"
DNS_TCP6 = f"ip6 daddr != ::1 tcp dport 53 {NOT_M} counter redirect to :15053"
OUT_MARKED = "meta l4proto tcp meta mark & 0x00000fff == 0x00000111 counter accept"
OUT_SELF4 = 'oifname "lo" ip daddr != 127.0.0.1 counter accept'
OUT_SELF6 = 'oifname "lo" ip6 daddr != ::1 counter accept'
OUT_4 = f"meta l4proto tcp ip daddr != 127.0.0.1 {NOT_M} counter redirect to :15001"
OUT_6 = f"meta l4proto tcp ip6 daddr != ::1 {NOT_M} counter redirect to :15001"
ZONE_OUT = f"udp dport 53 {IS_M} counter ct zone set 1"
ZONE_IN = f"udp sport 53 {NOT_M} counter ct zone set 1"


def chains(plan: RedirectPlan) -> dict[str, Chain]:
    return {
        f"{table.name.removeprefix('istio-ambient-')}/{chain.name}": chain
        for table in plan.tables
        for chain in table.chains
    }


def rules(plan: RedirectPlan, chain: str) -> list[str]:
    return [str(rule) for rule in chains(plan)[chain].rules]


def test_the_base_chains_are_those_of_the_reference_and_only_jump() -> None:
    found = {
        name: (str(chain.base), [str(rule) for rule in chain.rules])
        for name, chain in chains(RedirectPlan(dns=True)).items()
        if chain.base
    }
    into_prerouting, into_output = ["jump istio-prerouting"], ["jump istio-output"]
    assert found == {
        "nat/prerouting": (base("nat", "prerouting", -100), into_prerouting),
        "nat/output": (base("nat", "output", -100), into_output),
        "mangle/prerouting": (base("filter", "prerouting", -150), into_prerouting),
        "mangle/output": (base("route", "output", -150), into_output),
        "raw/prerouting": (base("filter", "prerouting", -300), into_prerouting),
        "raw/output": (base("filter", "output", -300), into_output),
    }


def base(kind: str, hook: str, priority: int) -> str:
    return f"type {kind} hook {hook} priority {priority}; policy accept;"


def test_tables_are_written_in_the_order_of_the_reference() -> None:
    names = [table.name for table in RedirectPlan(dns=True).tables]
    assert names == ["istio-ambient-nat", "istio-ambient-mangle", "istio-ambient-raw"]
    assert [table.name for table in RedirectPlan().tables] == names[:2]


@pytest.mark.parametrize(
    ("plan", "chain", "wanted"),
    [
        pytest.param(RedirectPlan(), "mangle/istio-prerouting", [MARK_CONNECTION], id="1"),
        pytest.param(RedirectPlan(), "mangle/istio-output", [RESTORE_MARK], id="2"),
        pytest.param(
            RedirectPlan(),
            "nat/istio-prerouting",
            [IN_PROBE4, IN_PROBE6, IN_4, IN_6],
            id="what comes in",
        ),
        pytest.param(
            RedirectPlan(ipv6=False),
            "nat/istio-prerouting",
            [IN_PROBE4, IN_4],
            id="what comes in by ipv4",
        ),
        pytest.param(
            RedirectPlan(ingress_mode=True),
            "nat/istio-prerouting",
            [],
            id="what comes in, in ingress mode",
        ),
        pytest.param(
            RedirectPlan(ingress_mode=True, virtual_interfaces=("tap0", "tap1")),
            "nat/istio-prerouting",
            [
                'iifname "tap0" meta l4proto tcp counter redirect to :15001',
                'iifname "tap0" meta l4proto tcp counter return',
                'iifname "tap1" meta l4proto tcp counter redirect to :15001',
                'iifname "tap1" meta l4proto tcp counter return',
            ],
            id="what comes in by virtual interfaces",
        ),
        pytest.param(
            RedirectPlan(),
            "nat/istio-output",
            [OUT_PROBE4, OUT_PROBE6, OUT_LINK, OUT_MARKED, OUT_SELF4, OUT_SELF6, OUT_4, OUT_6],
            id="what goes out",
        ),
        pytest.param(
            RedirectPlan(dns=True),
            "nat/istio-output",
            [
                OUT_PROBE4,
                OUT_PROBE6,
                OUT_LINK,
                DNS_UDP,
                DNS_TCP4,
                DNS_TCP6,
                OUT_MARKED,
                OUT_SELF4,
                OUT_SELF6,
                OUT_4,
                OUT_6,
            ],
            id="what goes out with dns",
        ),
        pytest.param(
            RedirectPlan(dns=True, ipv6=False),
            "nat/istio-output",
            [OUT_PROBE4, OUT_LINK, DNS_UDP, DNS_TCP4, OUT_MARKED, OUT_SELF4, OUT_4],
            id="what goes out by ipv4 with dns",
        ),
        pytest.param(
            RedirectPlan(ipv6=False),
            "nat/istio-output",
            [OUT_PROBE4, OUT_MARKED, OUT_SELF4, OUT_4],
            id="what goes out by ipv4",
        ),
        pytest.param(RedirectPlan(dns=True), "raw/istio-output", [ZONE_OUT], id="13"),
        pytest.param(RedirectPlan(dns=True), "raw/istio-prerouting", [ZONE_IN], id="14"),
    ],
)
def test_rules_are_those_of_the_reference_in_its_order_and_one_of_ours(
    plan: RedirectPlan, chain: str, wanted: list[str]
) -> None:
    assert rules(plan, chain) == wanted


EXCLUSION = Exclusion(ports=(22, 9090), networks=(ip_network("10.0.0.0/8"), ip_network("fd00::/8")))
PORTS = ["tcp dport 22 counter accept", "tcp dport 9090 counter accept"]


def test_what_is_excluded_comes_in_directly() -> None:
    plan = RedirectPlan(inbound_exclusion=EXCLUSION)
    assert rules(plan, "nat/istio-prerouting") == [
        IN_PROBE4,
        IN_PROBE6,
        *PORTS,
        "meta l4proto tcp ip saddr 10.0.0.0/8 counter accept",
        "meta l4proto tcp ip6 saddr fd00::/8 counter accept",
        IN_4,
        IN_6,
    ]
    assert rules(plan, "nat/istio-output") == rules(RedirectPlan(), "nat/istio-output")


def test_what_is_excluded_goes_out_directly_but_for_dns() -> None:
    plan = RedirectPlan(outbound_exclusion=EXCLUSION, dns=True, ipv6=False)
    assert rules(plan, "nat/istio-output") == [
        OUT_PROBE4,
        OUT_LINK,
        DNS_UDP,
        DNS_TCP4,
        OUT_MARKED,
        OUT_SELF4,
        *PORTS,
        "meta l4proto tcp ip daddr 10.0.0.0/8 counter accept",
        OUT_4,
    ]


@pytest.mark.parametrize(
    "excess",
    [
        {"ports": tuple(range(1, EXCLUSIONS_MAX + 2))},
        {"networks": tuple(ip_network(number) for number in range(EXCLUSIONS_MAX + 1))},
    ],
)
def test_too_many_exclusions_make_no_plan(excess: dict[str, tuple[object, ...]]) -> None:
    with pytest.raises(ValueError, match="more than 64"):
        Exclusion(**excess)  # type: ignore[arg-type]


def test_probes_may_come_from_elsewhere() -> None:
    node = ip_address("192.0.2.1")
    plan = RedirectPlan(probe_sources=(node,))
    assert rules(plan, "nat/istio-prerouting")[0] == (
        "meta l4proto tcp ip saddr 192.0.2.1 counter accept"
    )
    assert rules(RedirectPlan(probe_sources=()), "nat/istio-prerouting") == [IN_4, IN_6]


@pytest.mark.parametrize("chain", ["nat/istio-prerouting", "nat/istio-output"])
def test_first_segments_only_adds_one_condition_to_the_capture_of_tcp(chain: str) -> None:
    condition = "tcp flags & (fin | syn | rst | ack) == syn "
    with_it = rules(RedirectPlan(syn_only=True), chain)
    assert [rule.replace(condition, "") for rule in with_it] == rules(RedirectPlan(), chain)
    assert [condition in rule for rule in with_it] == ["redirect to" in rule for rule in with_it]


def test_a_plan_prints_its_tables() -> None:
    plan = RedirectPlan()
    assert str(plan) == "".join(str(table) for table in plan.tables)
    assert IN_4 in str(plan)


def test_a_name_that_is_none_makes_no_plan() -> None:
    with pytest.raises(ValueError, match="not an interface name"):
        RedirectPlan(virtual_interfaces=("eth0", "x; drop"))

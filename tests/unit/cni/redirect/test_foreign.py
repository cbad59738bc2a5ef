from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from cni.redirect.apply import apply_redirect, inspect_redirect, read_stamp, remove_redirect
from cni.redirect.plan import RedirectPlan
from tests.support.namespaces import accept, connect, echoed, listen, needs_root, output_of
from ztunnel.devmesh.cluster import Cluster, Pod

pytestmark = [
    pytest.mark.netns,
    needs_root,
    pytest.mark.skipif(shutil.which("iptables-nft-restore") is None, reason="needs iptables"),
]

# The reference's form (cni.md 4.2), with a rule of somebody else.
REFERENCE = """\
*nat
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -p tcp --dport 99 -j ACCEPT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_PRERT ! -d {loopback} -p tcp ! --dport 15008 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15006
-A ISTIO_OUTPUT ! -d {loopback} -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001
COMMIT
*mangle
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_PRERT -m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff
-A ISTIO_OUTPUT -m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff
COMMIT
"""  # noqa: E501 - as iptables-save prints it
PROGRAMS = {"iptables": "127.0.0.1/32", "ip6tables": "::1/128"}
VARIANTS = pytest.mark.parametrize("variant", ["nft", "legacy"])


@pytest.fixture
def pods() -> Iterator[tuple[Pod, Pod]]:
    with Cluster() as cluster:
        node = cluster.add_node("node")
        yield (
            cluster.add_pod(node, "pod", "10.1.0.1", "fd00::1"),
            cluster.add_pod(node, "other", "10.1.0.2", "fd00::2"),
        )


def write_reference_rules(pod: Pod, variant: str) -> None:
    for program, loopback in PROGRAMS.items():
        words = (f"{program}-{variant}-restore", "--noflush")
        output_of(pod, *words, stdin=REFERENCE.format(loopback=loopback))


def saved(pod: Pod, variant: str) -> str:
    return "".join(output_of(pod, f"{program}-{variant}-save") for program in PROGRAMS)


@VARIANTS
def test_the_references_rules_are_found(pods: tuple[Pod, Pod], variant: str) -> None:
    pod, other = pods
    write_reference_rules(pod, variant)
    problems = inspect_redirect(pod.netns, RedirectPlan())
    assert "IPv4 iptables chain nat ISTIO_PRERT is left over" in problems
    assert "IPv6 iptables chain mangle ISTIO_OUTPUT is left over" in problems
    assert read_stamp(pod.netns) == ""
    assert read_stamp(other.netns) is None


@VARIANTS
def test_taking_over_a_pod_replaces_them_and_keeps_those_of_others(
    pods: tuple[Pod, Pod], variant: str
) -> None:
    pod, _ = pods
    write_reference_rules(pod, variant)
    apply_redirect(pod.netns, RedirectPlan(), "pod x")
    assert inspect_redirect(pod.netns, RedirectPlan()) == []
    left = saved(pod, variant)
    assert "ISTIO" not in left
    assert left.count("-A OUTPUT -p tcp -m tcp --dport 99 -j ACCEPT") == 2
    apply_redirect(pod.netns, RedirectPlan(), "pod x")


@VARIANTS
def test_removal_frees_the_pod_of_them(pods: tuple[Pod, Pod], variant: str) -> None:
    pod, other = pods
    write_reference_rules(pod, variant)
    with listen(other.netns, 80) as app, pytest.raises(ConnectionRefusedError):
        connect(pod.netns, "10.1.0.2", 80)
    remove_redirect(pod.netns)
    assert read_stamp(pod.netns) is None
    with (
        listen(other.netns, 80) as app,
        connect(pod.netns, "10.1.0.2", 80) as client,
        accept(app) as served,
    ):
        assert echoed(client, served)


def test_what_we_wrote_the_reference_replaces_in_its_nftables_form(pods: tuple[Pod, Pod]) -> None:
    pod, _ = pods
    apply_redirect(pod.netns, RedirectPlan(dns=True), "pod x")
    rules = "flush table inet istio-ambient-nat\n" + str(RedirectPlan())
    for name in ("mangle", "raw"):
        rules = f"delete table inet istio-ambient-{name}\n{rules}"
    output_of(pod, "nft", "-f", "-", stdin=rules)
    assert inspect_redirect(pod.netns, RedirectPlan()) == []

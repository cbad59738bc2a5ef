from __future__ import annotations

from hypothesis import given, strategies as st

from tests.support.builders import a_workload
from ztunnel.decide.pod_names import LABEL_CHARS_MAX, PodNames, label_of
from ztunnel.model.network import Network, parse_ip
from ztunnel.model.workload import Health, Workload, WorkloadUid

IPS = ["10.1.0.1", "10.1.0.2", "2001:db8::a", "2001:db8::"]
LABELS = ["web-0", "web-1", "10-1-0-1", "10-1-0-2", "2001-db8--a", "2001-db8--0"]
HERE = Network("")


def test_a_pod_is_known_by_its_name_and_by_its_address_if_that_is_no_label() -> None:
    assert label_of(a_workload("Web-0", ips=["10.1.0.1"])) == "web-0"
    assert label_of(a_workload("a.b", ips=["10.1.0.1"])) == "10-1-0-1"
    assert label_of(a_workload("a" * (LABEL_CHARS_MAX + 1), ips=["2001:db8::"])) == "2001-db8--0"
    assert label_of(a_workload("", ips=[])) == ""


def test_an_address_has_one_spelling() -> None:
    pods = PodNames(HERE, [a_workload(ips=["2001:db8::a", "10.1.0.2"])], takes_all=False)
    assert pods.get("2001-db8--a") is not None
    for label in ("2001-0db8--a", "2001-db8-0--a", "10-1-0-02", "2001:db8::a", "10.1.0.2", ""):
        assert pods.get(label) is None, label


def named(*pods: Workload) -> dict[WorkloadUid, Workload]:
    return {pod.uid: pod for pod in pods}


pods = st.builds(
    a_workload,
    st.sampled_from(["web-0", "WEB-1", "web.2", "10-1-0-1"]),
    uid=st.sampled_from("abcd"),
    ips=st.lists(st.sampled_from(IPS), max_size=2),
    network=st.sampled_from(["", "far"]),
    health=st.sampled_from(Health),
)
events = st.tuples(st.sampled_from("abcd"), st.none()) | st.tuples(st.none(), pods)


def meant(label: str, there: dict[WorkloadUid, Workload], *, takes_all: bool) -> Workload | None:
    """Look at all of them: names first, then addresses; the least uid has it."""
    up = [
        pod
        for _, pod in sorted(there.items())
        if pod.network == HERE and (takes_all or pod.health is Health.HEALTHY)
    ]
    by_name = [pod for pod in up if "." not in pod.name and pod.name.lower() == label]
    addresses = {
        "10-1-0-1": "10.1.0.1",
        "10-1-0-2": "10.1.0.2",
        "2001-db8--a": "2001:db8::a",
        "2001-db8--0": "2001:db8::",
    }
    by_ip = [pod for pod in up if label in addresses and parse_ip(addresses[label]) in pod.ips]
    return next(iter(by_name + by_ip), None)


@given(
    start=st.lists(pods, max_size=3),
    changes=st.lists(events, max_size=12),
    takes_all=st.booleans(),
)
def test_names_that_keep_up_are_those_of_a_naive_look(
    start: list[Workload],
    changes: list[tuple[str | None, Workload | None]],
    takes_all: bool,
) -> None:
    there = named(*start)
    kept = PodNames(HERE, there.values(), takes_all=takes_all)
    for gone, put in changes:
        uid = put.uid if put is not None else WorkloadUid(gone or "")
        there.pop(uid, None)
        if put is not None:
            there[uid] = put
        kept.changed(uid, put)
        for label in LABELS:
            assert kept.get(label) is meant(label, there, takes_all=takes_all), label
    for uid in list(there):
        kept.changed(uid, None)
    assert not any(kept.get(label) for label in LABELS)

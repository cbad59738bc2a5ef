from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from cni.agent.cgroup import pod_uid

UID = "1b3e0f5a-1111-2222-3333-444455556666"
FLAT = UID.replace("-", "_")
CID = "a" * 64


@pytest.mark.parametrize(
    "path",
    [
        f"/kubepods/burstable/pod{UID}/{CID}",
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{FLAT}.slice/docker-{CID}.scope",
        f"/kubepods.slice/kubepods-pod{FLAT}.slice:cri-containerd:{CID}",
        f"/../../pod{UID}/{CID}",
        f"/kubepods/besteffort/pod{UID}/crio-{CID}.scope",
        f"/a/b/pod{UID.replace('-', '')}/{CID}",
        f"/kubepods/pod{UID}/{CID}/init",
    ],
)
@pytest.mark.parametrize("head", ["0::", "12:cpu,cpuacct:", "1:name=systemd:"])
def test_the_pod_is_read_from_the_ways_runtimes_name_it(head: str, path: str) -> None:
    assert pod_uid(f"{head}{path}\n") == UID


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0::/\n",
        f"0::/../crio-{CID}.scope\n",
        f"0::/kubepods/pod{UID}\n",
        f"0::/kubepods/xpod{UID}/{CID}\n",
        f"0::/kubepods/pod{UID[:-1]}/{CID}\n",
        "nonsense",
        pytest.param(
            f"1:cpu:/pod{UID}/{CID}\n2:pids:/pod{UID.replace('1b', '2b')}/{CID}\n", id="two pods"
        ),
        pytest.param(f"1:cpu:/pod{UID}/{CID}\n2:pids:/pod{UID}/{CID[1:]}b\n", id="two containers"),
    ],
)
def test_what_is_in_no_pod_or_in_two_is_nobodys(text: str) -> None:
    assert pod_uid(text) is None


def test_hierarchies_without_a_pod_do_not_matter() -> None:
    assert pod_uid(f"3:misc:/\n2:cpu:/pod{UID}/{CID}\n1:pids:/pod{UID}/{CID}\n") == UID


@given(st.text())
def test_nothing_in_the_text_is_an_error(text: str) -> None:
    pod_uid(text)

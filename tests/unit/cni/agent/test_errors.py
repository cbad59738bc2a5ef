from __future__ import annotations

import pytest

from cni.agent import errors
from cni.agent.errors import AgentError, ExpiredError, KubeError, SocketPathError, UsurpedError
from ztunnel.errors import ConfigError, ZtunnelError

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, AgentError) and kind is not AgentError
]


@pytest.mark.parametrize("kind", KINDS)
def test_each_reason_a_pod_waits_is_told_apart(kind: type[AgentError]) -> None:
    assert issubclass(kind, ZtunnelError)
    assert kind.reason != AgentError.reason
    assert [other for other in KINDS if other.reason == kind.reason] == [kind]


@pytest.mark.parametrize("kind", [SocketPathError, UsurpedError])
def test_a_node_with_two_agents_is_no_pods_fault(kind: type[ConfigError]) -> None:
    assert issubclass(kind, ConfigError)
    assert not issubclass(kind, AgentError)


def test_an_answer_of_the_api_keeps_its_status() -> None:
    assert KubeError("no", status=403).status == 403
    assert KubeError("no").status is None
    assert isinstance(ExpiredError("old", status=410), KubeError)

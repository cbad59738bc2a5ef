from __future__ import annotations

import pytest

from cni.agent import errors
from ztunnel.errors import ConfigError, ZtunnelError

KINDS = [errors.NoProxyError, errors.ProxyLostError, errors.ProxyRefusedError]


@pytest.mark.parametrize("kind", KINDS)
def test_each_reason_to_wait_is_an_agent_error_with_a_name_of_its_own(
    kind: type[errors.AgentError],
) -> None:
    assert issubclass(kind, errors.AgentError)
    assert issubclass(kind, ZtunnelError)
    assert sum(other.reason == kind.reason for other in KINDS) == 1


def test_a_bad_socket_path_is_a_matter_of_configuration() -> None:
    assert issubclass(errors.SocketPathError, ConfigError)

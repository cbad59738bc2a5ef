from __future__ import annotations

import ssl
import subprocess
import sys

import pytest

from ztunnel.tls.groups import GROUPS, POST_QUANTUM, offered_groups

RESTRICT = """
import ssl, sys
from tests.support.certs import a_client_context, a_server_context, an_established_pair
from ztunnel.errors import ConfigError
from ztunnel.tls.groups import offered_groups, restrict_groups
try:
    restrict_groups(sys.argv[1], why="COMPLIANCE_POLICY=pqc")
except ConfigError as error:
    sys.exit(f"refused: {error}")
an_established_pair(a_client_context(), a_server_context())
print(offered_groups(a_client_context().ssl_context))
"""


def restricted_to(group: str) -> subprocess.CompletedProcess[str]:
    """Restrict a process of its own: there is no way back."""
    return subprocess.run(
        [sys.executable, "-c", RESTRICT, group], capture_output=True, text=True, check=False
    )


def test_without_a_restriction_there_is_a_choice() -> None:
    offered = offered_groups(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    assert {GROUPS["X25519"], GROUPS["P-256"]} < set(offered)


@pytest.mark.parametrize("group", ["P-384", POST_QUANTUM])
def test_a_restricted_process_offers_one_group_or_does_not_start(group: str) -> None:
    run = restricted_to(group)
    if group == POST_QUANTUM and ssl.OPENSSL_VERSION_INFO < (3, 5):
        assert run.stderr.startswith(f"refused: COMPLIANCE_POLICY=pqc: {ssl.OPENSSL_VERSION}")
        assert "OpenSSL 3.5" in run.stderr
    else:
        assert run.stdout.strip() == str((GROUPS[group],)), run.stderr

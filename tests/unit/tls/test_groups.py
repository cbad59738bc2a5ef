from __future__ import annotations

import os
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from ztunnel.tls.groups import CONFIGURATION, GROUPS, POST_QUANTUM, USUAL, offered_groups

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

PREFER = """
from tests.support.certs import a_client_context, a_server_context, an_established_pair
from ztunnel.tls.groups import offered_groups, prefer_usual_groups
print(prefer_usual_groups())
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


def preferring(**env: str) -> list[str]:
    """Say what a process finds that prefers the usual groups: did it work, what is offered."""
    run = subprocess.run(
        [sys.executable, "-c", PREFER],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | env,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_no_share_for_a_post_quantum_group_is_sent_unasked() -> None:
    worked, offered = preferring()
    assert offered.startswith(f"({GROUPS[USUAL[0]]}, ")
    if ssl.OPENSSL_VERSION_INFO >= (3, 5):
        assert (worked, offered) == ("True", str(tuple(GROUPS[name] for name in USUAL)))
    else:
        assert str(GROUPS[POST_QUANTUM]) not in offered


def test_what_an_operator_has_configured_stays(tmp_path: Path) -> None:
    configuration = tmp_path / "openssl.cnf"
    configuration.write_text(CONFIGURATION.format(groups="P-384"))
    worked, offered = preferring(OPENSSL_CONF=str(configuration))
    assert (worked, offered) == ("False", str((GROUPS["P-384"],)))

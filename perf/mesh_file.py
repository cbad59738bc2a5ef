"""The static configuration that node proxies of the reference's kind are given."""

from __future__ import annotations

import json
import re
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from perf.contender import Wish
from perf.track import APP_PORT, CLIENT_IP, PLAIN, SERVER_IP
from ztunnel.model.identity import Identity

CLIENT = Identity.parse("spiffe://cluster.local/ns/bench/sa/client")
SERVER = Identity.parse("spiffe://cluster.local/ns/bench/sa/server")
NAMESPACE = "bench"
NODES = ("node-a", "node-b")
RULES_EACH = 10
EXACT = re.compile(r'\{\s*"Exact": ("[^"]*")\s*\}')
OTHERS_FROM = IPv4Address("10.64.0.0")
VIPS_FROM = IPv4Address("10.100.0.0")


def write_mesh(path: Path, wish: Wish) -> None:
    """Write it: the two pods, an ALLOW for the client, the DENY policies, further workloads."""
    workloads = [
        workload("client", CLIENT_IP, NODES[0]),
        workload("server", SERVER_IP, NODES[1]),
        *(
            workload(f"other-{n}", OTHERS_FROM + n, f"node-{n % 100}")
            for n in range(wish.workloads)
        ),
        *(
            workload(f"pod-{n}", OTHERS_FROM + wish.workloads + n, NODES[0])
            for n in range(wish.pods)
        ),
        *(
            workload(f"plain-{n}", PLAIN[n + 1], "node-0", protocol="TCP")
            for n in range(wish.plain)
        ),
    ]
    services = [service(n) for n in range(wish.services)]
    policies = [allow_client(), *(deny_strangers(n) for n in range(wish.deny_policies))]
    mesh = {"workloads": workloads, "services": services, "policies": policies}
    # JSON is YAML; but the reference knows how a text is to match only by a tag in front of it.
    path.write_text(EXACT.sub(r"!Exact \1", json.dumps(mesh, indent=0)))


def workload(name: str, ip: IPv4Address, node: str, *, protocol: str = "HBONE") -> dict[str, Any]:
    """One pod; its account has its name."""
    return {
        "uid": f"bench//Pod/{NAMESPACE}/{name}",
        "name": name,
        "namespace": NAMESPACE,
        "serviceAccount": name,
        "trustDomain": "cluster.local",
        "clusterId": "bench",
        "node": node,
        "workloadIps": [str(ip)],
        "protocol": protocol,
        "workloadName": name,
        "canonicalName": name,
        "services": {},
    }


def service(number: int) -> dict[str, Any]:
    """One service that nobody calls."""
    return {
        "name": f"service-{number}",
        "namespace": NAMESPACE,
        "hostname": f"service-{number}.{NAMESPACE}.svc.cluster.local",
        "vips": [f"/{VIPS_FROM + number}"],
        "ports": {"80": 8080},
        "subjectAltNames": [],
    }


def allow_client() -> dict[str, Any]:
    """Make what lets the client in, so that policy is asked and says yes."""
    clause = [{"principals": [{"Exact": "cluster.local/ns/bench/sa/client"}]}]
    port = [{"destinationPorts": [APP_PORT]}]
    return _policy("allow-client", "Allow", [[clause, port]])


def deny_strangers(number: int) -> dict[str, Any]:
    """Make one of the policies that match nobody (dataplane.md 13.2, `rbac`)."""
    rules = [
        [[{"principals": [{"Exact": f"cluster.local/ns/bench/sa/stranger-{number}-{rule}"}]}]]
        for rule in range(RULES_EACH)
    ]
    return _policy(f"deny-{number}", "Deny", rules)


def _policy(name: str, action: str, rules: list[Any]) -> dict[str, Any]:
    return {
        "name": name,
        "namespace": NAMESPACE,
        "scope": "Namespace",
        "action": action,
        "dryRun": False,
        "rules": rules,
    }

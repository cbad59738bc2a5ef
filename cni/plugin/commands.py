"""The commands of the runtime: what each of them does (cni.md 1.3 and 1.5).

Only ADD does anything. DEL, CHECK and GC succeed always: the agent learns from Kubernetes that a
pod is gone and repairs pods by itself, and a DEL that fails keeps a pod Terminating for ever.

STATUS succeeds, too, even if the agent is away. A runtime that hears otherwise calls the node's
whole network not ready and starts no pod at all: not those that need nothing from us, and not the
agent, which lives in the pod network itself and could then never come back.
"""

from __future__ import annotations

import os

from cni.plugin.errors import Code, PluginError
from cni.plugin.event import BUDGET_SECONDS, announce, encode_event
from cni.plugin.netconf import Enrolment, NetConf, is_at_least, parse_enrolment, parse_previous
from cni.plugin.result import add_result

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.plugin.environment import Call, Pod
    from cni.plugin.journal import Journal

AGENT_POD_PREFIX = "istio-cni-node-"
_SINCE = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}
_OWN_NETNS = "/proc/self/ns/net"


def run(call: Call, conf: NetConf, journal: Journal, *, seconds: float = BUDGET_SECONDS) -> str:
    """Carry out a command other than VERSION and give what it prints.

    `seconds` is how long the agent may take.

    Raises:
        PluginError: the pod must not start, or the command makes no sense.
    """
    since = _SINCE.get(call.command)
    if since and not is_at_least(conf.version, since):
        raise PluginError(
            Code.INCOMPATIBLE_VERSION,
            f"config version does not allow {call.command}",
            f'config is "{conf.version}", {call.command} exists since {since}',
        )
    if call.command != "ADD":
        journal.debug("nothing to do")
        return ""
    return _add(call, conf, journal, seconds)


def not_our_business(pod: Pod, enrolment: Enrolment) -> str | None:
    """Say why a pod may start without asking anybody; None if the agent must be asked."""
    if pod.namespace in enrolment.exclude_namespaces:
        return "namespace is excluded"
    if not pod.name or not pod.namespace:
        return "not a pod of Kubernetes"
    # The agent must be able to start when no agent is there to ask.
    if pod.name.startswith(AGENT_POD_PREFIX) and pod.namespace == enrolment.agent_namespace:
        return "the node agent itself"
    if not enrolment.ambient_enabled:
        return "ambient mode is off"
    return None


def _add(call: Call, conf: NetConf, journal: Journal, seconds: float) -> str:
    enrolment, previous = parse_enrolment(conf), parse_previous(conf)
    result = add_result(previous, conf.version)
    reason = not_our_business(call.pod, enrolment)
    if reason is not None:
        journal.info("pod passed by", reason=reason)
        return result
    if not enrolment.agent_decides:
        raise PluginError(
            Code.BAD_CONFIG,
            "this plugin cannot tell which pods are in the mesh",
            "the configuration lacks agent_decides: it was written by another node agent",
        )
    if _is_own_netns(call.netns) and not call.same_netns_allowed:
        raise PluginError(
            Code.BAD_NETNS, "plugin's netns and netns from CNI_NETNS should not be the same"
        )
    body = encode_event(call, previous, conf.version)
    announce(conf.run_dir, body, netns=call.netns, seconds=seconds)
    journal.info("node agent lets the pod start")
    return result


def _is_own_netns(netns: str) -> bool:
    """Whether a path is the namespace we run in, which is the host's; false if we cannot see."""
    try:
        own, pods = os.stat(_OWN_NETNS), os.stat(netns)  # noqa: PTH116, pathlib takes 4 ms
    except (OSError, ValueError):
        return False
    return (own.st_dev, own.st_ino) == (pods.st_dev, pods.st_ino)

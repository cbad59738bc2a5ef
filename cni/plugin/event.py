"""The event that tells the node agent about a new pod, before its containers start.

The protocol (cni.md 1.4; the reference's, and what is ours beside it)
----------------------------------------------------------------------
Transport: a UNIX stream socket, `<cni_agent_run_dir>/pluginevent.sock`, HTTP/1.1, one request per
connection. The plugin waits 5 s in all. While nobody listens yet (the agent restarts) it tries
again within that time; once the request is on its way it never does.

    POST /cmdadd
    Host: unix
    Content-Type: application/json

    {"Netns": "/var/run/netns/cni-1",        CNI_NETNS as it is, a path on the host
     "PodName": "p", "PodNamespace": "n",
     "IPs": [{"Interface": 2,                index in the previous result, or null
              "Address": {"IP": "10.1.2.3", "Mask": "////AA=="},     mask: base64 of its bytes
              "Gateway": ""}],               null instead of the list if there are no addresses
     "PodUID": "...",                        ours: K8S_POD_UID, "" if the runtime does not say
     "ContainerID": "..."}                   ours: CNI_CONTAINERID, the sandbox

Ours, beside the body: with the first bytes of the request comes one descriptor (SCM_RIGHTS), open
on the pod's namespace, so that the agent need not have the runtime's folder of namespaces
mounted. It is absent if the plugin cannot open the path. A server that reads without room for it,
as the reference's does, never sees it: the kernel closes it. Who does take it closes it, and
checks that it is a network namespace and not the host's.

Answers: 200 means the pod may start. Anything else means that it must not, and the body, plain
text, is the reason that people get to see (64 KiB of it). 503 says in addition that trying again
may help.

Who decides (cni.md 1.7): the plugin has no client for Kubernetes and no credentials, hence
neither the start-up time, nor the token on the node's disk, nor the reference's failure of every
pod on the node when that token has expired. With `"agent_decides": true` in the configuration,
which our installer writes, it sends each pod but those it can rule out alone (excluded namespace,
not Kubernetes, the agent itself), and the agent, which watches pods anyway, answers 200 for a pod
that needs nothing. Not knowing the pod (yet) is not such a case: the agent waits for its watch a
little, then answers 503.

A reference agent answers 500 for pods that are not in the mesh, because its own plugin asks
Kubernetes first. Under a configuration without `agent_decides`, which is what its installer
writes, we therefore cannot tell who is eligible, and fail closed with an error that says so,
rather than send ineligible pods or let eligible ones start unprotected. Where each pod outside
the excluded namespaces is in the mesh, `agent_decides` may be set for a reference agent, too.
"""

from __future__ import annotations

import json
import os

from cni.plugin.addresses import event_addresses
from cni.plugin.environment import Call
from cni.plugin.errors import Code, PluginError
from cni.plugin.unix_http import OK, AnswerError, Deadline, connect, receive, request, send

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.plugin.netconf import PreviousResult

SOCKET_NAME = "pluginevent.sock"
TARGET = "/cmdadd"
BUDGET_SECONDS = 5.0  # the reference's timeout for dialling, waiting and reading together
_REASON_BYTES_MAX = 65536
_UNAVAILABLE = 503


def encode_event(call: Call, previous: PreviousResult | None, version: str) -> bytes:
    """Give the body of the event.

    Raises:
        PluginError: the previous result is malformed.
    """
    event = {
        "Netns": call.netns,
        "PodName": call.pod.name,
        "PodNamespace": call.pod.namespace,
        "IPs": event_addresses(previous.members, version) if previous else None,
        "PodUID": call.pod.uid,
        "ContainerID": call.container_id,
    }
    return json.dumps(event).encode()


def announce(run_dir: str, body: bytes, *, netns: str, seconds: float = BUDGET_SECONDS) -> None:
    """Tell the node agent about a pod; when this returns, the pod may start.

    Raises:
        PluginError: the agent cannot be reached, does not answer in time, or refuses the pod.
    """
    path = f"{run_dir}/{SOCKET_NAME}"
    try:
        status, reason = _exchange(path, body, netns, Deadline(seconds))
    except (OSError, AnswerError) as exc:
        raise PluginError(
            Code.TRY_AGAIN_LATER, f"node agent does not answer at {path}", str(exc)
        ) from exc
    if status != OK:
        code = Code.TRY_AGAIN_LATER if status == _UNAVAILABLE else Code.AGENT_REFUSED
        text = reason.decode(errors="replace").strip()
        raise PluginError(code, f"node agent answers {status}", text)


def _exchange(path: str, body: bytes, netns: str, deadline: Deadline) -> tuple[int, bytes]:
    sock = connect(path, deadline, patiently=True)
    try:
        netns_fd = _open_netns(netns)
        try:
            fds = [] if netns_fd is None else [netns_fd]
            send(sock, request(TARGET, body), deadline, fds=fds)
        finally:
            if netns_fd is not None:
                os.close(netns_fd)
        return receive(sock, deadline, body_bytes_max=_REASON_BYTES_MAX)
    finally:
        sock.close()


def _open_netns(netns: str) -> int | None:
    """Open the pod's namespace; None if we cannot, for the agent finds it by its path, too."""
    try:
        # Non-blocking, because opening a pipe by mistake must not stop us.
        return os.open(netns, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):
        return None

"""The plugin's side door: `POST /cmdadd` and `POST /log` (cni.md 1.4, 1.6 and `cni.plugin.event`).

The answer decides whether a pod may start, so whatever goes wrong here is an answer other than 200.
503 says that trying again may help.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog
import trio

from cni.agent.errors import AgentError, EventError, KubeError, NoProxyError, PodUnknownError
from cni.agent.http_server import Request, Response, serve
from cni.agent.metrics import AgentMetrics
from cni.agent.scopes import PLUGIN_TARGET
from cni.agent.unix_socket import listen_unix
from ztunnel.errors import ZtunnelError
from ztunnel.linux.netns import PodNetns
from ztunnel.model.identity import Namespace
from ztunnel.model.network import IpAddress, parse_ip

EVENT_SOCKET = "pluginevent.sock"
LOG_SOCKET = "log.sock"
EVENT_PATH, LOG_PATH = "/cmdadd", "/log"
# Below the 5 s of the plugin, so that it gets to hear the reason.
ADMISSION_SECONDS = 4.6
LOG_LINES_MAX = 1000
# Only root runs plugins; the reference lets everybody connect who can enter the folder.
EVENT_SOCKET_MODE = 0o600
LOG_SOCKET_MODE = 0o666

_RETRY = (PodUnknownError, NoProxyError, KubeError)
_EVENT = {"cni-event": "add"}  # the reference's label
_LEVELS = frozenset({"debug", "info", "warn", "error"})

log = structlog.get_logger(component="plugin")
spoken = structlog.get_logger(PLUGIN_TARGET)  # what the plugin says, as the reference shows it


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginEvent:
    """A new sandbox. `uid` is empty if the plugin is the reference's."""

    netns: str
    name: str
    namespace: Namespace
    ips: tuple[IpAddress, ...]
    uid: str = ""
    container_id: str = ""


class _Address(msgspec.Struct):
    address: str = msgspec.field(name="IP", default="")


class _Ip(msgspec.Struct):
    address: _Address = msgspec.field(name="Address", default_factory=_Address)


class _Event(msgspec.Struct, rename="pascal"):
    netns: str
    pod_name: str
    pod_namespace: str
    ips: list[_Ip] | None = msgspec.field(name="IPs", default=None)
    uid: str = msgspec.field(name="PodUID", default="")
    container_id: str = msgspec.field(name="ContainerID", default="")


def decode_event(body: bytes) -> PluginEvent:
    """Read an event.

    Raises:
        EventError: it is none.
    """
    try:
        event = msgspec.json.decode(body, type=_Event)
        ips = tuple(parse_ip(item.address.address) for item in event.ips or ())
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise EventError(f"not an event: {exc}") from exc
    if not (event.netns and event.pod_name and event.pod_namespace):
        raise EventError("an event without namespace or pod")
    return PluginEvent(
        netns=event.netns,
        name=event.pod_name,
        namespace=Namespace(event.pod_namespace),
        ips=ips,
        uid=event.uid,
        container_id=event.container_id,
    )


# Takes the namespace, whatever it raises.
Admit = Callable[[PluginEvent, PodNetns | None], Awaitable[None]]


class PluginDoor:
    """Answers the plugin."""

    def __init__(self, admit: Admit, metrics: AgentMetrics) -> None:
        self._admit = admit
        self._metrics = metrics

    async def run(
        self, run_dir: Path, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve both sockets until cancelled.

        Raises:
            SocketPathError: one of them cannot be made.
        """
        with (
            listen_unix(run_dir / EVENT_SOCKET, mode=EVENT_SOCKET_MODE) as events,
            listen_unix(run_dir / LOG_SOCKET, mode=LOG_SOCKET_MODE) as lines,
        ):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve, events, {EVENT_PATH: self.on_event})
                nursery.start_soon(serve, lines, {LOG_PATH: on_lines})
                task_status.started()

    async def on_event(self, request: Request) -> Response:
        """Answer one event."""
        fds, request.fds[:] = list(request.fds), []
        netns = PodNetns(fds[0]) if fds else None
        for fd in fds[1:]:
            PodNetns(fd).close()
        response = await self._answer(request.body, netns)
        self._metrics.plugin_requests.count(str(response.status)).add()
        return response

    async def _answer(self, body: bytes, netns: PodNetns | None) -> Response:
        try:
            event = decode_event(body)
        except EventError as exc:
            if netns is not None:
                netns.close()
            return Response(400, f"{exc}\n")
        log.debug(
            "plugin event",
            **_EVENT,
            ns=event.namespace,
            name=event.name,
            uid=event.uid,
            netns=event.netns,
        )
        try:
            with trio.fail_after(ADMISSION_SECONDS):
                await self._admit(event, netns)
        except trio.TooSlowError:
            return _refused(event, 503, AgentError("not done in time"))
        except ZtunnelError as exc:
            return _refused(event, 503 if isinstance(exc, _RETRY) else 500, exc)
        except Exception as exc:
            log.exception("plugin event failed", ns=event.namespace, name=event.name)
            return Response(500, f"internal error: {type(exc).__name__}\n")
        return Response(200)


async def on_lines(request: Request) -> Response:
    """Show the plugin's log lines among ours."""
    await trio.lowlevel.checkpoint()
    try:
        lines = msgspec.json.decode(request.body, type=list[str])
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        return Response(400, f"not a list of lines: {exc}\n")
    for line in lines[:LOG_LINES_MAX]:
        _show(line)
    return Response(200)


def _show(line: str) -> None:
    """Log one line; one that lacks level, time or message is dropped, as by the reference."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return
    if not isinstance(fields, dict) or not {"level", "time", "msg"} <= fields.keys():
        return
    level, message = str(fields.pop("level")), str(fields.pop("msg"))
    if level not in _LEVELS:
        return
    labels = {f"plugin.{key}": str(value)[:512] for key, value in list(fields.items())[:16]}
    # A pod that must not start is the plugin's error, and only a line of ours.
    writes = {"debug": spoken.debug, "error": spoken.warning, "warn": spoken.warning}
    write = writes.get(level, spoken.info)
    write("plugin says", message=message[:1024], **labels)


def _refused(event: PluginEvent, status: int, error: ZtunnelError) -> Response:
    log.warning(
        "pod not admitted",
        **_EVENT,
        ns=event.namespace,
        name=event.name,
        status=status,
        reason=error.reason,
        error=str(error),
    )
    return Response(status, f"{error}\n")

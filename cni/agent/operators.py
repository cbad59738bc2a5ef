"""How operators look in: probes, metrics, and the commands of `ztunnel-cni-agent` (cni.md 8)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Protocol
from urllib.parse import parse_qs

import msgspec
import trio

from cni.agent.http_server import JSON, Request, Response, Routes
from cni.agent.metrics import AgentMetrics, prometheus_text
from cni.agent.status import AgentStatus

CONTROL_SOCKET = "agent.sock"
OPENMETRICS = "application/openmetrics-text"
OPENMETRICS_TYPE = f"{OPENMETRICS}; version=1.0.0; charset=utf-8"
PROMETHEUS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Insight(Protocol):
    """What there is to see."""

    def status(self) -> AgentStatus:
        """Say how things are."""

    async def rules_of(self, pod: str) -> str | None:
        """Print what is wanted and found in a pod `namespace/name`; None if it is not ours."""


def health_routes(insight: Insight) -> Routes:
    """Make the pages of the health port."""

    async def alive(_: Request) -> Response:
        # Being answered is the message: the event loop turns.
        await trio.lowlevel.checkpoint()
        return Response(HTTPStatus.OK, "ok\n")

    async def ready(_: Request) -> Response:
        await trio.lowlevel.checkpoint()
        status = insight.status()
        if status.ready:
            return Response(HTTPStatus.OK, "ready\n")
        waiting = ", ".join(status.waiting_for)
        return Response(HTTPStatus.SERVICE_UNAVAILABLE, f"not ready, waiting for {waiting}\n")

    return {"/healthz": alive, "/readyz": ready}


def metrics_routes(metrics: AgentMetrics, refresh: Callable[[], None]) -> Routes:
    """Make the page of the monitoring port; `refresh` brings the gauges up to date.

    Who does not ask for OpenMetrics gets the older form, which is all the reference's agent has.
    """

    async def show(request: Request) -> Response:
        await trio.lowlevel.checkpoint()
        refresh()
        text = "".join(metrics.text())
        if OPENMETRICS in request.accept.lower():
            return Response(HTTPStatus.OK, text, OPENMETRICS_TYPE)
        return Response(HTTPStatus.OK, prometheus_text(text), PROMETHEUS_TYPE)

    return {"/metrics": show}


def control_routes(insight: Insight) -> dict[str, Callable[[Request], Awaitable[Response]]]:
    """Make the pages of the control socket, which only root can reach."""

    async def status(_: Request) -> Response:
        await trio.lowlevel.checkpoint()
        return Response(HTTPStatus.OK, msgspec.json.encode(insight.status()).decode(), JSON)

    async def rules(request: Request) -> Response:
        pod = parse_qs(request.query).get("pod", [""])[0]
        text = await insight.rules_of(pod)
        if text is None:
            return Response(HTTPStatus.NOT_FOUND, f"pod {pod} is not in the mesh on this node\n")
        return Response(HTTPStatus.OK, text)

    return {"/status": status, "/rules": rules}

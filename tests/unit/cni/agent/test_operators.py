from __future__ import annotations

import msgspec
import pytest

from cni.agent.http_server import Request, Routes
from cni.agent.metrics import AgentMetrics
from cni.agent.operators import OPENMETRICS, control_routes, health_routes, metrics_routes
from cni.agent.status import AgentStatus


class Insight:
    """Shows what it is told to."""

    def __init__(self, *waiting: str) -> None:
        self.waiting = list(waiting)

    def status(self) -> AgentStatus:
        return AgentStatus(
            node="n", ready=not self.waiting, waiting_for=self.waiting, proxies=0,
            api_silent_seconds=1.0, pods=[],
        )  # fmt: skip

    async def rules_of(self, pod: str) -> str | None:
        return "table\n" if pod == "shop/a" else None


async def get(routes: Routes, path: str, query: str = "") -> tuple[int, str]:
    response = await routes[path](Request("GET", path, query, b""))
    return response.status, response.body


async def test_alive_means_being_answered_and_ready_means_having_done_everything() -> None:
    assert await get(health_routes(Insight("Kubernetes")), "/healthz") == (200, "ok\n")
    assert await get(health_routes(Insight()), "/readyz") == (200, "ready\n")
    waiting = health_routes(Insight("Kubernetes", "a first look"))
    assert await get(waiting, "/readyz") == (
        503,
        "not ready, waiting for Kubernetes, a first look\n",
    )


async def test_metrics_are_brought_up_to_date_before_they_are_shown() -> None:
    metrics = AgentMetrics()
    routes = metrics_routes(metrics, lambda: metrics.proxies.set(7))
    status, text = await get(routes, "/metrics")
    assert status == 200
    assert "ztunnel_connected 7\n" in text


async def test_metrics_come_in_the_form_that_is_asked_for() -> None:
    show = metrics_routes(AgentMetrics(), lambda: None)["/metrics"]
    for accept, kind, end in (
        ("", "text/plain; version=0.0.4; charset=utf-8", "\n"),
        ("text/plain;version=0.0.4;q=0.2,*/*;q=0.1", "text/plain; version=0.0.4", "\n"),
        ("application/openmetrics-text;version=1.0.0,*/*;q=0.1", OPENMETRICS, "# EOF\n"),
    ):
        response = await show(Request("GET", "/metrics", "", b"", accept=accept))
        assert response.kind.startswith(kind)
        assert response.body.endswith(end)
        assert ("# EOF" in response.body) == (kind == OPENMETRICS)


async def test_the_commands_get_status_and_rules() -> None:
    routes = control_routes(Insight())
    status, text = await get(routes, "/status")
    assert (status, msgspec.json.decode(text, type=AgentStatus).node) == (200, "n")
    assert await get(routes, "/rules", "pod=shop%2Fa") == (200, "table\n")


@pytest.mark.parametrize("query", ["", "pod=", "pod=shop/b", "x=y"])
async def test_rules_of_others_are_not_there(query: str) -> None:
    status, text = await get(control_routes(Insight()), "/rules", query)
    assert status == 404
    assert "not in the mesh" in text

"""What a failed dial to the next hop changes for the connections after it."""

from __future__ import annotations

import pytest

from tests.support.builders import a_gateway, a_service, a_store, a_workload
from tests.support.routing import HBONE, KEY, a_remote_pod, a_vip_service, hop
from ztunnel.decide.feedback import Feedback
from ztunnel.decide.outliers import FIRST_SECONDS
from ztunnel.model.workload import TunnelProtocol, Workload
from ztunnel.state.store import Store

WAYPOINTS, GATEWAYS = "ns/waypoint.example.com", "east/gw.example.com"


def two(service: str, port: int, *, protocol: TunnelProtocol, network: str = "") -> list[Workload]:
    return [
        a_workload(
            f"one-{last}",
            ips=[f"127.0.0.{last}"],
            protocol=protocol,
            network=network,
            services={service: {port: 8080 if port == 80 else port}},
        )
        for last in (4, 5)
    ]


def two_gateways() -> Store:
    return a_store(
        a_vip_service(),
        a_remote_pod(network_gateway=a_gateway(GATEWAYS, 15009)),
        a_service("gw.example.com", ns="east", port_map={15009: 15009}),
        *two(GATEWAYS, 15009, protocol=HBONE, network="remote"),
    )


@pytest.mark.parametrize(
    "store",
    [
        pytest.param(
            a_store(a_vip_service(), *two(KEY, 80, protocol=TunnelProtocol.NONE)), id="plain TCP"
        ),
        pytest.param(a_store(a_vip_service(), *two(KEY, 80, protocol=HBONE)), id="HBONE"),
        pytest.param(
            a_store(
                a_vip_service(waypoint=a_gateway(WAYPOINTS)),
                a_service("waypoint.example.com", ns="ns", port_map={15008: 15008}),
                *two(WAYPOINTS, 15008, protocol=HBONE),
            ),
            id="waypoint",
        ),
        pytest.param(two_gateways(), id="network gateway"),
    ],
)
def test_a_hop_that_could_not_be_dialled_is_left_alone_for_a_while(store: Store) -> None:
    feedback = Feedback()
    failed = hop(store, "127.0.0.3:80").peer

    def peers() -> set[str]:
        return {
            str(hop(store, "127.0.0.3:80", seed=seed, feedback=feedback).peer) for seed in range(20)
        }

    assert len(peers()) == 2
    feedback.outliers.failed(failed, 0.0)
    assert len(peers()) == 1
    assert str(failed) not in peers()
    feedback.outliers.expire(FIRST_SECONDS)
    assert len(peers()) == 2
    feedback.outliers.failed(failed, FIRST_SECONDS)
    feedback.outliers.reached(failed)
    assert len(peers()) == 2

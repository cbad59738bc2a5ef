from __future__ import annotations

from google.protobuf.struct_pb2 import Struct

from ztunnel.config import Config
from ztunnel.xds.node import node_info


def test_a_pod_says_who_it_is() -> None:
    config = Config(
        pod_name="ztunnel-x",
        pod_namespace="istio-system",
        instance_ip="192.0.2.7",
        node_name="node-a",
        proxy_metadata={"CLUSTER_ID": "lab", "ISTIO_VERSION": "1.27"},
    )
    info = node_info(config)
    assert info.id == "ztunnel~192.0.2.7~ztunnel-x.istio-system~istio-system.svc.cluster.local"
    assert info.metadata == {
        "NAME": "ztunnel-x",
        "NAMESPACE": "istio-system",
        "INSTANCE_IPS": "192.0.2.7",
        "NODE_NAME": "node-a",
        "CLUSTER_ID": "lab",
        "ISTIO_VERSION": "1.27",
    }


def test_without_a_pod_the_id_still_has_four_parts_and_an_address() -> None:
    info = node_info(Config())
    assert info.id == "ztunnel~1.1.1.1~.~.svc.cluster.local"
    assert info.metadata == {"CLUSTER_ID": "Kubernetes"}


def test_the_first_of_several_addresses_is_in_the_id_and_all_in_the_metadata() -> None:
    info = node_info(Config(instance_ip="192.0.2.7,2001:db8::7"))
    assert info.id.split("~")[1] == "192.0.2.7"
    assert info.metadata["INSTANCE_IPS"] == "192.0.2.7,2001:db8::7"


def test_json_metadata_wins_and_what_protobuf_cannot_carry_is_left_out() -> None:
    config = Config(
        pod_name="a",
        node_metadata={"NAME": {"b": [1, None, True]}, "HUGE": [{"n": 10**400}], "ZERO": 0},
    )
    metadata = node_info(config).metadata
    assert metadata["NAME"] == {"b": [1, None, True]}
    assert metadata["ZERO"] == 0
    assert "HUGE" not in metadata
    Struct().update(metadata)

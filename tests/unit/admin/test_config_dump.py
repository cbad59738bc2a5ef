from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from hypothesis import given, strategies as st

from ztunnel.admin.config_dump import (
    RUN_ITEMS,
    Large,
    ListSection,
    Many,
    MapSection,
    Section,
    Wish,
    certificate_to_dict,
    config_dump,
    constant,
    pieces,
    pod_to_dict,
)
from ztunnel.identity.rotation import CertificateState, CertificateStatus
from ztunnel.model.identity import Identity
from ztunnel.model.network import Endpoint
from ztunnel.tls.certificate import WorkloadCertificate

CART = Identity.parse("spiffe://cluster.local/ns/shop/sa/cart")
SERIAL = 90871236512


@dataclass(frozen=True)
class Item:
    name: str
    namespace: str = "shop"


@dataclass(frozen=True)
class Connection:
    source: Endpoint
    original: str | None
    actual: Endpoint | None
    protocol: str


def a_list(*items: Item) -> ListSection:
    return ListSection(
        items=lambda: items,
        key=lambda item: item.name,
        show=lambda item: {"name": item.name, "namespace": item.namespace},
    )


def dump(sections: dict[str, Section], **query: str) -> str:
    return b"".join(config_dump(sections, Wish.of(query))).decode()


def test_a_dump_is_pretty_and_sorted_everywhere() -> None:
    sections: dict[str, Section] = {
        "workloads": a_list(Item("b"), Item("a")),
        "config": constant(lambda: {"z": 1, "a": {"y": 2, "b": 3}}),
        "services": a_list(),
    }
    whole = {
        "config": {"a": {"b": 3, "y": 2}, "z": 1},
        "services": [],
        "workloads": [{"name": "a", "namespace": "shop"}, {"name": "b", "namespace": "shop"}],
    }
    assert dump(sections) == json.dumps(whole, indent=2, sort_keys=True) + "\n"


def test_nothing_is_an_empty_object() -> None:
    assert json.loads(dump({})) == {}


def test_a_dump_can_be_narrowed() -> None:
    sections: dict[str, Section] = {
        "workloads": a_list(Item("a"), Item("b", "bank")),
        "version": constant(lambda: {"version": "1"}),
    }
    assert json.loads(dump(sections, types="workloads", namespace="bank")) == {
        "workloads": [{"name": "b", "namespace": "bank"}]
    }
    assert list(json.loads(dump(sections, types="version"))) == ["version"]


def test_an_item_that_has_no_node_is_shown_for_every_node() -> None:
    assert Wish(node="a").takes({"namespace": "x"})
    assert not Wish(node="a").takes({"node": "b"})


@given(st.lists(st.text(max_size=5), max_size=30), st.integers(1, 3))
def test_any_items_come_out_sorted(names: list[str], nesting: int) -> None:
    clean = [name.encode("utf-8", "replace").decode() for name in names]
    shown = json.loads(dump({"x": a_list(*map(Item, clean))}))
    assert [item["name"] for item in shown["x"]] == sorted(clean)


class Worked:
    """A section's functions that count what is done between two pieces of the dump."""

    def __init__(self) -> None:
        self.steps = 0

    def key(self, item: Item) -> str:
        self.steps += 1
        return item.name

    def show(self, item: Item) -> dict[str, object]:
        self.steps += 1
        return {"name": item.name, "namespace": item.namespace}

    def taken(self, sections: dict[str, Section], wish: Wish = Wish()) -> tuple[bytes, int]:  # noqa: B008
        """The whole dump, and the most that was done for one piece of it."""
        text, most = b"", 0
        for piece in config_dump(sections, wish):
            text += piece
            most, self.steps = max(most, self.steps), 0
        return text, most


MANY = 20_000
SHUFFLED = [Item(f"workload-{n * 7919 % MANY:05}") for n in range(MANY)]
MOST_STEPS = 2 * RUN_ITEMS  # of sorting or of printing


@pytest.mark.parametrize(("namespace", "count"), [("", MANY), ("nobody's", 0)])
def test_a_large_dump_never_works_long_without_a_rest(namespace: str, count: int) -> None:
    worked = Worked()
    section = ListSection(items=lambda: SHUFFLED, key=worked.key, show=worked.show)
    text, most = worked.taken({"workloads": section}, Wish(namespace=namespace))
    names = [item["name"] for item in json.loads(text)["workloads"]]
    assert names == sorted(names)
    assert len(names) == count
    assert most <= MOST_STEPS


@pytest.mark.parametrize("is_object", [False, True])
def test_an_item_with_many_members_is_printed_like_any_other_but_with_rests(
    *, is_object: bool
) -> None:
    worked = Worked()
    many = Many(items=SHUFFLED, key=worked.key, show=worked.show, is_object=is_object)
    item = Large({"name": "big", "of": Large(members=many, none=Many(items=[], show=str))})
    text, most = worked.taken({"services": constant(lambda: {"it": item})})
    shown = {one.name: {"name": one.name, "namespace": "shop"} for one in sorted(SHUFFLED, key=str)}
    members = shown if is_object else list(shown.values())
    whole = {"services": {"it": {"name": "big", "of": {"members": members, "none": []}}}}
    assert text.decode() == json.dumps(whole, indent=2, sort_keys=True) + "\n"
    assert most <= MOST_STEPS


def test_entries_of_a_map_are_sorted_by_key() -> None:
    section = MapSection(items=lambda: [("b", 1), ("a", 2)], show=lambda value: {"n": value})
    assert json.loads(dump({"workloadState": section})) == {
        "workloadState": {"a": {"n": 2}, "b": {"n": 1}}
    }


def a_certificate() -> WorkloadCertificate:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    start = datetime(2026, 1, 2, tzinfo=UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), SERIAL)
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(CART))]), critical=True
        )
        .sign(key, hashes.SHA256())
    )
    pem = made.public_bytes(Encoding.PEM)
    key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return WorkloadCertificate.load(chain_pem=pem, key_pem=key_pem, roots_pem=pem + pem)


def test_a_certificate_is_shown_as_istioctl_reads_it() -> None:
    certificate = a_certificate()
    status = CertificateStatus(
        identity=CART, state=CertificateState.AVAILABLE, certificate=certificate, error=None
    )
    shown = certificate_to_dict(status)
    expected = {
        "pem": base64.b64encode(certificate.chain_pem).decode(),
        "serialNumber": str(SERIAL),
        "validFrom": "2026-01-02T00:00:00Z",
        "expirationTime": "2026-01-03T00:00:00Z",
    }
    assert shown == {
        "identity": "spiffe://cluster.local/ns/shop/sa/cart",
        "state": "Available",
        "certChain": [expected],
        "rootCerts": [expected, expected],
    }
    assert "PRIVATE" not in json.dumps(shown)


@pytest.mark.parametrize(
    ("state", "error", "shown"),
    [
        (CertificateState.INITIALIZING, None, "Initializing"),
        (CertificateState.UNAVAILABLE, "CA is down", "Unavailable: CA is down"),
        (CertificateState.UNAVAILABLE, None, "Unavailable: unknown"),
    ],
)
def test_without_a_certificate_the_lists_are_empty(
    state: CertificateState, error: str | None, shown: str
) -> None:
    status = CertificateStatus(identity=CART, state=state, certificate=None, error=error)
    assert certificate_to_dict(status) == {
        "identity": str(CART),
        "state": shown,
        "certChain": [],
        "rootCerts": [],
    }


def test_a_pod_that_is_up_shows_its_connections() -> None:
    inbound = Connection(
        Endpoint.parse("192.0.2.10:40112"),
        "cart.shop.svc.cluster.local",
        Endpoint.parse("192.0.2.20:8080"),
        "HBONE",
    )
    outbound = Connection(Endpoint.parse("[2001:db8::1]:5"), None, None, "TCP")
    shown = pod_to_dict(
        name="cart-0",
        namespace="shop",
        service_account="cart",
        inbound=[inbound],
        outbound=[outbound],
        is_up=True,
    )
    assert json.loads(b"".join(pieces(shown, b"\n"))) == {
        "state": "Up",
        "info": {"name": "cart-0", "namespace": "shop", "serviceAccount": "cart"},
        "connections": {
            "inbound": [
                {
                    "src": "192.0.2.10:40112",
                    "originalDst": "cart.shop.svc.cluster.local",
                    "actualDst": "192.0.2.20:8080",
                    "protocol": "HBONE",
                }
            ],
            "outbound": [
                {
                    "src": "[2001:db8::1]:5",
                    "originalDst": None,
                    "actualDst": None,
                    "protocol": "TCP",
                }
            ],
        },
    }


def test_a_pod_that_is_starting_shows_none() -> None:
    shown = pod_to_dict(
        name="a", namespace="b", service_account="c", inbound=(), outbound=(), is_up=False
    )
    assert shown["state"] == "Pending"
    assert "connections" not in shown

"""Orders travel as they are; answers as plain values, and nothing else is taken for one."""

from __future__ import annotations

import pickle

import msgspec
import pytest
from hypothesis import given, strategies as st

from tests.support.builders import a_policy, a_service, a_workload, an_identity
from ztunnel.config import Config
from ztunnel.errors import PeerError
from ztunnel.identity.dev_ca import DevelopmentCa
from ztunnel.model.identity import Namespace, ServiceAccount
from ztunnel.model.workload import PodUid
from ztunnel.state.store import Update
from ztunnel.wire.zds import PodInfo
from ztunnel.workers.messages import (
    Answer,
    Apply,
    Asks,
    Begin,
    Certified,
    Connected,
    Done,
    Metered,
    Order,
    Ready,
    Serve,
    Wants,
    decode_answer,
    decode_order,
    encode_answer,
    encode_order,
)

CART = PodInfo("cart", Namespace("shop"), ServiceAccount("cart"))


@pytest.mark.parametrize(
    "order",
    [
        Begin(Config(proxy_metadata={"A": "b"}), 1, "info,access=debug"),
        Apply(Update(workloads=[a_workload(ips=["192.0.2.1", "2001:db8::1"])])),
        Apply(Update(services=[a_service(vips=["10.0.0.1"])], policies=[a_policy()])),
        Serve(7, PodUid("0001"), CART),
    ],
)
def test_an_order_arrives_as_it_was(order: Order) -> None:
    assert decode_order(encode_order(order)) == order


def test_a_certificate_arrives_with_its_key() -> None:
    issued = DevelopmentCa.create().issue(an_identity())
    arrived = decode_order(encode_order(Certified(an_identity(), issued)))
    assert isinstance(arrived, Certified)
    assert arrived.certificate is not None
    assert (arrived.certificate.key_pem, arrived.certificate.serial) == (
        issued.key_pem,
        issued.serial,
    )


@pytest.mark.parametrize("body", [b"", b"\x80", pickle.dumps("an order")])
def test_what_is_no_order_is_refused(body: bytes) -> None:
    with pytest.raises(PeerError, match="order from the control process"):
        decode_order(body)


@pytest.mark.parametrize(
    "answer",
    [
        Ready(),
        Done(1),
        Done(2, "failed to bind"),
        Wants("spiffe://a/ns/b/sa/c"),
        Asks(3, "/10.0.0.1"),
        Metered(4, "a 1\n"),
        Connected(5, "0001", [{"src": "192.0.2.1:1", "originalDst": None}], []),
    ],
)
def test_an_answer_arrives_as_it_was(answer: Answer) -> None:
    assert decode_answer(encode_answer(answer)) == answer


@given(st.binary(max_size=60))
def test_any_bytes_are_an_answer_or_refused(noise: bytes) -> None:
    try:
        answer = decode_answer(noise)
    except PeerError:
        return
    assert isinstance(answer, Answer)


def test_a_worker_cannot_have_us_unpickle_anything() -> None:
    with pytest.raises(PeerError, match="answer of a worker"):
        decode_answer(encode_order(Serve(7, PodUid("0001"), CART)))
    with pytest.raises(PeerError, match="answer of a worker"):
        decode_answer(msgspec.msgpack.encode({"type": "Done", "turn": "one"}))

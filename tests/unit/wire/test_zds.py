from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from ztunnel.errors import PeerError
from ztunnel.model.identity import Namespace, ServiceAccount
from ztunnel.model.workload import PodUid
from ztunnel.wire import zds
from ztunnel.wire.zds import (
    Add,
    AgentSession,
    Delete,
    Keep,
    Nothing,
    PodInfo,
    ProxySession,
    Reconcile,
    Request,
    SnapshotSent,
    Start,
    Stop,
    decode_ack,
    decode_hello,
    decode_request,
    encode_ack,
    encode_hello,
    encode_request,
)


def pod(uid: str) -> PodUid:
    return PodUid(uid)


def info(name: str = "n", ns: str = "ns", sa: str = "sa") -> PodInfo:
    return PodInfo(name, Namespace(ns), ServiceAccount(sa))


ACK = b"\x0a\x00"
GOLDEN = [
    pytest.param("1a 00", SnapshotSent(), id="snapshot sent"),
    pytest.param("2a 04 0a 02 75 31", Keep(pod("u1")), id="keep"),
    pytest.param("12 04 12 02 75 31", Delete(pod("u1")), id="delete"),
    pytest.param(
        "0a 11 0a 02 75 31 12 0b 0a 01 6e 12 02 6e 73 1a 02 73 61",
        Add(pod("u1"), info()),
        id="add",
    ),
]


@pytest.mark.parametrize(("wire", "request_"), GOLDEN)
def test_requests_are_the_bytes_of_the_reference(wire: str, request_: Request) -> None:
    assert encode_request(request_) == bytes.fromhex(wire)
    assert decode_request(bytes.fromhex(wire)) == request_


def test_the_hello_is_the_bytes_of_the_reference() -> None:
    assert encode_hello() == bytes.fromhex("08 01")
    assert decode_hello(b"\x08\x01") == 1


@pytest.mark.parametrize(("wire", "error"), [("0a 00", ""), ("0a 03 0a 01 78", "x")])
def test_answers_are_the_bytes_of_the_reference(wire: str, error: str) -> None:
    assert encode_ack(error) == bytes.fromhex(wire)
    assert decode_ack(bytes.fromhex(wire)) == error


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
uids = texts.filter(bool).map(PodUid)
infos = st.builds(PodInfo, texts, texts.map(Namespace), texts.map(ServiceAccount))
requests = st.one_of(
    st.builds(Add, uids, infos),
    st.builds(Keep, uids),
    st.builds(Delete, uids),
    st.just(SnapshotSent()),
)


@given(requests)
def test_requests_survive_the_wire(request: Request) -> None:
    assert decode_request(encode_request(request)) == request


@given(st.binary(max_size=64) | requests.map(encode_request).map(lambda data: data[:-1]))
def test_any_bytes_raise_only_the_declared_error(data: bytes) -> None:
    for decode in (decode_request, decode_hello, decode_ack):
        try:
            decode(data)
        except PeerError:
            continue


@given(st.text(max_size=3000))
def test_any_error_fits_a_packet(error: str) -> None:
    data = encode_ack(error)
    assert len(data) <= 1024
    assert error.encode("utf-8", "replace").startswith(decode_ack(data).encode())


@pytest.mark.parametrize(
    ("wire", "problem"),
    [
        pytest.param("", "unknown kind", id="nothing"),
        pytest.param("22 00", "unknown kind", id="a message of the future"),
        pytest.param("0a 04 0a 02 75 31", "workload_info", id="an add without workload_info"),
        pytest.param("0a 02 12 00", "uid", id="an add without a uid"),
        pytest.param("2a 00", "uid", id="a keep without a uid"),
        pytest.param("12 00", "uid", id="a delete without a uid"),
        pytest.param("0a ff", "not a ZDS request", id="no protobuf"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(wire: str, problem: str) -> None:
    with pytest.raises(PeerError, match=problem):
        decode_request(bytes.fromhex(wire))


@pytest.mark.parametrize("wire", ["", "12 00", "0a ff"])
def test_an_answer_that_makes_no_sense_is_refused(wire: str) -> None:
    with pytest.raises(PeerError):
        decode_ack(bytes.fromhex(wire))


class Proxy:
    """A session with the namespaces spelled as strings."""

    def __init__(self) -> None:
        self.session = ProxySession()
        self.session.connected()

    def tell(self, request: Request, netns: str | None = None) -> object:
        return self.session.receive(encode_request(request), netns)

    def add(self, uid: str, netns: str) -> None:
        self.tell(Add(pod(uid), info()), netns)
        assert self.session.succeeded() == ACK

    def do(self, request: Request) -> object:
        action = self.tell(request)
        assert self.session.succeeded() == ACK
        return action


@pytest.fixture
def proxy() -> Proxy:
    return Proxy()


def test_connecting_says_hello(proxy: Proxy) -> None:
    assert proxy.session.connected() == b"\x08\x01"


def test_an_added_pod_is_started_and_runs(proxy: Proxy) -> None:
    assert proxy.tell(Add(pod("a"), info()), "n1") == Start(pod("a"), info(), replaces=False)
    assert proxy.session.running == set()
    assert proxy.session.succeeded() == ACK
    assert proxy.session.running == {"a"}


def test_the_same_pod_again_is_only_acknowledged(proxy: Proxy) -> None:
    proxy.add("a", "n1")
    assert proxy.tell(Add(pod("a"), info()), "n1") == Nothing()
    assert proxy.session.succeeded() == ACK


def test_another_namespace_replaces_the_first(proxy: Proxy) -> None:
    proxy.add("a", "n1")
    assert proxy.tell(Add(pod("a"), info()), "n2") == Start(pod("a"), info(), replaces=True)


def test_a_failed_start_is_refused_and_pending(proxy: Proxy) -> None:
    proxy.tell(Add(pod("a"), info()), "n1")
    assert decode_ack(proxy.session.failed("no port")) == "failed to start proxy : no port"
    assert (proxy.session.pending, proxy.session.running) == ({"a"}, set())


def test_a_pending_pod_that_starts_is_not_pending_any_more(proxy: Proxy) -> None:
    proxy.tell(Add(pod("a"), info()), "n1")
    proxy.session.failed("no port")
    assert proxy.session.retry(pod("a")) == Start(pod("a"), info(), replaces=False)
    proxy.session.succeeded()
    assert (proxy.session.pending, proxy.session.running) == (set(), {"a"})
    assert proxy.session.retry(pod("a")) is None


def test_a_pending_pod_added_again_in_another_namespace_runs_there(proxy: Proxy) -> None:
    proxy.tell(Add(pod("a"), info()), "n1")
    proxy.session.failed("no port")
    proxy.add("a", "n2")
    assert proxy.session.pending == set()
    assert proxy.tell(Add(pod("a"), info()), "n2") == Nothing()


def test_a_deleted_pod_is_stopped(proxy: Proxy) -> None:
    proxy.do(SnapshotSent())
    proxy.add("a", "n1")
    assert proxy.do(Delete(pod("a"))) == Stop(pod("a"))
    assert proxy.session.running == set()


def test_deleting_an_unknown_pod_is_fine(proxy: Proxy) -> None:
    proxy.do(SnapshotSent())
    assert proxy.do(Delete(pod("a"))) == Nothing()


def test_a_deleted_pod_is_not_pending(proxy: Proxy) -> None:
    proxy.do(SnapshotSent())
    proxy.tell(Add(pod("a"), info()), "n1")
    proxy.session.failed("no port")
    proxy.do(Delete(pod("a")))
    assert proxy.session.pending == set()


def test_what_is_deleted_before_the_snapshot_is_stopped_by_it(proxy: Proxy) -> None:
    proxy.add("a", "n1")
    assert proxy.do(Delete(pod("a"))) == Nothing()
    assert proxy.session.running == {"a"}
    assert proxy.do(SnapshotSent()) == Reconcile(frozenset())
    assert proxy.session.running == set()


def test_added_deleted_and_added_again_before_the_snapshot_is_kept(proxy: Proxy) -> None:
    proxy.add("a", "n1")
    proxy.do(Delete(pod("a")))
    proxy.add("a", "n1")
    assert proxy.do(SnapshotSent()) == Reconcile(frozenset({pod("a")}))


def test_pods_run_on_across_a_reconnect_if_added_or_kept(proxy: Proxy) -> None:
    for uid in ("added", "kept", "gone"):
        proxy.add(uid, "n-" + uid)
    proxy.session.connected()
    assert proxy.session.running == {"added", "kept", "gone"}
    assert proxy.tell(Add(pod("added"), info()), "n-added") == Nothing()
    proxy.session.succeeded()
    proxy.do(Keep(pod("kept")))
    assert proxy.do(SnapshotSent()) == Reconcile(frozenset({pod("added"), pod("kept")}))
    assert proxy.session.running == {"added", "kept"}


def test_a_reconnect_forgets_what_is_pending(proxy: Proxy) -> None:
    proxy.do(SnapshotSent())
    proxy.tell(Add(pod("a"), info()), "n1")
    proxy.session.failed("no port")
    proxy.session.connected()
    assert proxy.session.pending == set()
    assert not proxy.session.has_snapshot


@pytest.mark.parametrize(
    ("request_", "netns", "problem"),
    [
        pytest.param(Add(pod("a"), info()), None, "missing descriptor", id="add without"),
        pytest.param(Delete(pod("a")), "n1", "unexpected descriptor", id="delete with"),
        pytest.param(Keep(pod("a")), None, "after the snapshot", id="late keep"),
        pytest.param(SnapshotSent(), None, "twice", id="second snapshot"),
    ],
)
def test_an_agent_that_breaks_the_protocol_is_told(
    proxy: Proxy, request_: Request, netns: str | None, problem: str
) -> None:
    proxy.do(SnapshotSent())
    with pytest.raises(PeerError, match=problem):
        proxy.tell(request_, netns)


def test_the_number_of_pods_is_limited(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zds, "PODS_MAX", 2)
    proxy.add("a", "n1")
    proxy.do(Keep(pod("b")))
    with pytest.raises(PeerError, match="more than 2 pods in one snapshot"):
        proxy.tell(Add(pod("c"), info()), "n3")
    proxy.do(SnapshotSent())
    proxy.add("c", "n3")
    with pytest.raises(PeerError, match="more than 2 pods on one node"):
        proxy.tell(Add(pod("d"), info()), "n4")


@given(st.lists(st.tuples(st.binary(max_size=16), st.none() | st.just("n")), max_size=8))
def test_any_messages_raise_only_the_declared_error(messages: list[tuple[bytes, None]]) -> None:
    session = ProxySession()
    session.connected()
    for data, netns in messages:
        try:
            session.receive(data, netns)
        except PeerError:
            continue
        session.succeeded()


few_uids = st.sampled_from(["a", "b", "c"])
steps = st.one_of(
    st.tuples(st.just("add"), few_uids, st.sampled_from(["n1", "n2"]), st.booleans()),
    st.tuples(st.just("delete"), few_uids),
    st.tuples(st.just("retry"), few_uids),
    st.tuples(st.just("connect")),
)


class Node:
    """A plain model of an agent, and of what a proxy that obeys its session serves."""

    def __init__(self) -> None:
        self.session = ProxySession()
        self.wanted: dict[str, str] = {}
        self.served: dict[str, str] = {}

    def connect(self) -> None:
        self.session.connected()
        for uid, netns in self.wanted.items():
            self.tell(Add(pod(uid), info()), netns)
        self.tell(SnapshotSent())

    def add(self, uid: str, netns: str, works: bool) -> None:
        self.wanted[uid] = netns
        self.tell(Add(pod(uid), info()), netns, works=works)

    def delete(self, uid: str) -> None:
        self.wanted.pop(uid, None)
        self.tell(Delete(pod(uid)))

    def retry(self, uid: str) -> None:
        start = self.session.retry(pod(uid))
        if start is not None:
            self.start(start, works=True)

    def tell(self, request: Request, netns: str | None = None, *, works: bool = True) -> None:
        match self.session.receive(encode_request(request), netns):
            case Start() as start:
                self.start(start, works=works)
                return
            case Stop(uid):
                del self.served[uid]
            case Reconcile(keep):
                for uid in self.served.keys() - keep:
                    del self.served[uid]
        self.session.succeeded()

    def start(self, start: Start, *, works: bool) -> None:
        assert start.replaces == (start.uid in self.served)
        self.served.pop(start.uid, None)
        if works:
            self.served[start.uid] = self.wanted[start.uid]
            self.session.succeeded()
        else:
            self.session.failed("no")


@given(st.lists(steps, max_size=30))
def test_whatever_happens_started_pods_agree_with_a_plain_model(
    steps: list[tuple[str, str, str, bool]],
) -> None:
    node = Node()
    node.connect()
    for name, *arguments in steps:
        getattr(node, name)(*arguments)
        assert node.session.running == node.served.keys()
        assert node.session.running | node.session.pending == node.wanted.keys()
    node.connect()
    assert node.served == node.wanted


def test_an_agent_asks_one_thing_at_a_time() -> None:
    session = AgentSession()
    assert not session.may_send
    assert session.receive(encode_hello()) is None
    assert session.version == 1
    assert session.may_send
    assert session.send(Keep(pod("u1"))) == bytes.fromhex("2a 04 0a 02 75 31")
    assert not session.may_send
    assert session.receive(encode_ack("busy")) == "busy"
    assert session.may_send
    session.send(SnapshotSent())
    assert session.receive(ACK) == ""


def test_a_packet_that_nobody_asked_for_is_refused() -> None:
    session = AgentSession()
    session.receive(encode_hello())
    with pytest.raises(PeerError, match="unexpected"):
        session.receive(ACK)


def test_a_proxy_that_does_not_say_hello_is_refused() -> None:
    with pytest.raises(PeerError, match="hello"):
        AgentSession().receive(b"\xff")

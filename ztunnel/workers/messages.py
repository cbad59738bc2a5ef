"""What the control process and a worker say to each other.

To a worker go our own nouns as they are, pickled: both ends are the same program of one version,
and the link is inherited, so nobody else can speak on it. What a worker says is decoded strictly
and into plain values only: it is the worker that faces the network, and whoever took one over must
not get at the control process by what it says.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import msgspec

from ztunnel.config import Config
from ztunnel.errors import PeerError
from ztunnel.model.identity import Identity
from ztunnel.model.workload import PodUid
from ztunnel.state.store import Update
from ztunnel.tls.certificate import WorkloadCertificate
from ztunnel.wire.zds import PodInfo

# A worker's answers come in pieces of 64 KiB and less; a dump of one connection is below 1 KiB.
ANSWER_BYTES_MAX = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Begin:
    """The first message: what the operator chose, and which worker this is, from 0."""

    config: Config
    number: int
    log_filter: str


@dataclass(frozen=True, slots=True)
class Apply:
    """A part of the mesh's state."""

    update: Update


@dataclass(frozen=True, slots=True)
class Lists:
    """The revocation lists in force, DER."""

    lists: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Certified:
    """The certificate of an identity; None if forgotten, or if there is none, as `error` says."""

    identity: Identity
    certificate: WorkloadCertificate | None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Serve:
    """Serve a pod; its namespace comes along. Answered by `Done` with the same turn."""

    turn: int
    uid: PodUid
    info: PodInfo


@dataclass(frozen=True, slots=True)
class Leave:
    """Serve a pod no longer. Answered by `Done`."""

    turn: int
    uid: PodUid


@dataclass(frozen=True, slots=True)
class Learned:
    """What became of a question; all that the answer brought was sent before."""

    turn: int
    answer: str | None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Levels:
    """The log filter from now on."""

    log_filter: str


@dataclass(frozen=True, slots=True)
class ShowMetrics:
    """Say all metrics: any number of `Metered`, then `Done`."""

    turn: int


@dataclass(frozen=True, slots=True)
class ShowConnections:
    """Say which connections are in progress: any number of `Connected`, then `Done`."""

    turn: int


@dataclass(frozen=True, slots=True)
class Ping:
    """Show that you are alive. Answered by `Done`."""

    turn: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Accept nothing more and let connections end for so long. Answered by `Done`."""

    turn: int
    seconds: float


Order = (
    Begin
    | Apply
    | Lists
    | Certified
    | Serve
    | Leave
    | Learned
    | Levels
    | ShowMetrics
    | ShowConnections
    | Ping
    | Drain
)


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The worker stands and takes orders."""


class Done(msgspec.Struct, frozen=True, tag=True):
    """An order was carried out, or `error` says why not."""

    turn: int
    error: str | None = None


class Wants(msgspec.Struct, frozen=True, tag=True):
    """A certificate is needed: of this SPIFFE URI."""

    identity: str


class Asks(msgspec.Struct, frozen=True, tag=True):
    """An address is needed that we were not told of. Answered by `Learned`."""

    turn: int
    what: str


class Metered(msgspec.Struct, frozen=True, tag=True):
    """A part of the metrics' text: whole lines."""

    turn: int
    text: str


class Connected(msgspec.Struct, frozen=True, tag=True):
    """Some of a pod's connections, as the configuration dump shows them."""

    turn: int
    uid: str
    inbound: list[dict[str, str | None]]
    outbound: list[dict[str, str | None]]


Answer = Ready | Done | Wants | Asks | Metered | Connected

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def encode_order(order: Order) -> bytes:
    """Make what the control process sends."""
    return pickle.dumps(order, protocol=pickle.HIGHEST_PROTOCOL)


def decode_order(body: bytes) -> Order:
    """Read what the control process sent, and nobody else could have.

    Raises:
        PeerError: it is none of our orders.
    """
    try:
        order: Any = pickle.loads(body)  # noqa: S301 - from our parent, over what we inherited
    except Exception as exc:  # whatever a broken pickle raises
        raise PeerError(f"unreadable order from the control process: {exc!r}") from exc
    if not isinstance(order, Order):
        raise PeerError(f"unknown order from the control process: {type(order).__name__}")
    return order


def encode_answer(answer: Answer) -> bytes:
    """Make what a worker sends."""
    return _encoder.encode(answer)


def decode_answer(body: bytes) -> Answer:
    """Read what a worker sent.

    Raises:
        PeerError: it is none of the answers.
    """
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise PeerError(f"unreadable answer of a worker: {exc}") from exc

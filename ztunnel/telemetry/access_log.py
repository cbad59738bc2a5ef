"""Record: one line per connection, field names fixed here (dns-and-observability.md 8.4).

The lines are formatted by hand, because they are written for every connection, and what they say
of both ends is printed once for all connections that share it. Directions: bytes
are kept as "from the client" and "from the server", as the metrics count them, and shown as the
application on this side sees them: outbound, sent is from the client; inbound, from the server.

Two fields of ours come last and only with an error: `reason` (`errors.py`; `internal` for what
nobody foresaw) and `policy`, the policy that refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from ipaddress import IPv4Address

from ztunnel.errors import ZtunnelError
from ztunnel.model.identity import Identity
from ztunnel.model.network import Endpoint, HostPort
from ztunnel.telemetry.filter import ACCESS, Level
from ztunnel.telemetry.lines import bare, quoted
from ztunnel.telemetry.log import PIPELINE, Pipeline, Sink

VALUE_CHARS_MAX = 512  # of one field; names of Kubernetes have at most 253
ERROR_CHARS_MAX = 2048  # of an error text, which may quote identities and certificates
FIELDS = (
    "src.addr", "src.workload", "src.namespace", "src.identity", "src.cluster",
    "dst.addr", "dst.hbone_addr", "dst.service", "dst.workload", "dst.namespace", "dst.identity",
    "dst.cluster", "direction", "bytes_sent", "bytes_recv", "duration", "error", "reason", "policy",
)  # fmt: skip
_DESTINATION, _DIRECTION, _TOTALS, _BLAME = map(
    FIELDS.index, ("dst.addr", "direction", "bytes_sent", "error")
)
_DEBUG, _INFO, _WARN, _ERROR = map(int, (Level.DEBUG, Level.INFO, Level.WARN, Level.ERROR))


@lru_cache(maxsize=4096)
def _v4_text(number: int) -> str:
    """Print an IPv4 address; remembered, as `str` of one costs 0.7 us."""
    return str(IPv4Address(number))


class Direction(StrEnum):
    """Which way a connection goes, seen from the pod we serve."""

    INBOUND = "inbound"
    OUTBOUND = "outbound"


_INBOUND = Direction.INBOUND


class _Keys:
    """What stands before each value, in one of the two formats."""

    __slots__ = ("blame", "context", "quote", "totals")

    def __init__(self, *, json: bool) -> None:
        self.quote = '"' if json else ""  # around addresses
        names = tuple(f',"{name}":' if json else f" {name}=" for name in FIELDS)
        self.context, self.totals, self.blame = (
            names[:_TOTALS],
            names[_TOTALS:_BLAME],
            names[_BLAME:],
        )


class AccessLog:
    """Where records go."""

    __slots__ = ("_keys", "_pipeline", "sink")

    def __init__(self, pipeline: Pipeline = PIPELINE) -> None:
        self.sink: Sink = pipeline.sink(ACCESS)
        self._pipeline = pipeline
        self._keys = {json: _Keys(json=json) for json in (False, True)}

    @property
    def keys(self) -> _Keys:
        """The keys of the current format."""
        return self._keys[self._pipeline.json]

    def write(self, level: str, message: str, fields: str) -> None:
        """Write one line of ready-made `fields`, each with its separator in front."""
        time = self._pipeline.now()
        if self._pipeline.json:
            head = f'{{"level":"{level}","time":"{time}","scope":"access","message":"{message}"'
            self._pipeline.writer.write(f"{head}{fields}}}\n")
        else:  # the first separator is the tab instead of a space
            self._pipeline.writer.write(f"{time}\t{level}\taccess\t{message}\t{fields[1:]}\n")


@dataclass(slots=True, kw_only=True)
class Ends:
    """What a line says of both ends, but for the caller's address; not changed once in use.

    None and empty fields are left out of the line. Connections of one way share one.
    """

    destination: Endpoint | None = None
    hbone_target: Endpoint | HostPort | str | None = None  # the authority of the CONNECT
    source_workload: str | None = None
    source_namespace: str | None = None
    source_identity: Identity | None = None  # with mutual TLS only
    source_cluster: str | None = None
    destination_service: str | None = None  # host name
    destination_workload: str | None = None
    destination_namespace: str | None = None
    destination_identity: Identity | None = None  # with mutual TLS only
    destination_cluster: str | None = None
    _printed: tuple[_Keys, str] | None = field(default=None, init=False, repr=False, compare=False)

    def text(self, keys: _Keys) -> str:
        """Print it in the format of `keys`."""
        printed = self._printed
        if printed is None or printed[0] is not keys:
            printed = self._printed = keys, self._print(keys)
        return printed[1]

    def _print(self, keys: _Keys) -> str:
        (
            _, k_workload, k_namespace, k_identity, k_cluster,
            k_destination, k_hbone, k_service, k_to_workload, k_to_namespace, k_to_identity,
            k_to_cluster, _,
        ) = keys.context  # fmt: skip
        return (
            f"{_text(k_workload, self.source_workload)}"
            f"{_text(k_namespace, self.source_namespace)}"
            f"{_identity(k_identity, self.source_identity)}"
            f"{_text(k_cluster, self.source_cluster)}"
            f"{k_destination + _address(keys, self.destination) if self.destination else ''}"
            f"{k_hbone + _address(keys, self.hbone_target) if self.hbone_target else ''}"
            f"{_text(k_service, self.destination_service)}"
            f"{_text(k_to_workload, self.destination_workload)}"
            f"{_text(k_to_namespace, self.destination_namespace)}"
            f"{_identity(k_to_identity, self.destination_identity)}"
            f"{_text(k_to_cluster, self.destination_cluster)}"
        )


@dataclass(slots=True, kw_only=True)
class Record:
    """What is known of one connection; owned by whoever serves it.

    Call `opened` once both ends are known (before connecting and before policy is asked), and
    `finish` exactly once. `started` and `now` are seconds of `trio.current_time()`. `destination`
    is where the connection was meant to go, for as long as no more is known of it.
    """

    log: AccessLog
    direction: Direction
    source: Endpoint
    started: float
    destination: Endpoint | None = None
    ends: Ends | None = None
    bytes_from_client: int = 0
    bytes_from_server: int = 0
    policy: str | None = None  # `namespace/name`
    is_finished: bool = False

    @property
    def is_open(self) -> bool:
        """Whether both ends are known."""
        return self.ends is not None

    def opened(self, ends: Ends) -> None:
        """Say who is at the ends."""
        assert self.ends is None
        assert not self.is_finished
        self.ends = ends
        if self.log.sink.threshold <= _DEBUG:
            self.log.write("debug", "connection opened", self._context())

    def finish(self, now: float, error: BaseException | None = None) -> None:
        """Write the one line about the end.

        A failure before `opened` is a refusal before context exists: a short line, level warn.
        """
        assert not self.is_finished
        self.is_finished = True
        threshold = self.log.sink.threshold
        if error is None:
            if threshold <= _INFO:
                fields = self._context() + self._totals(now)
                self.log.write("info", "connection complete", fields)
        elif self.ends is not None:
            if threshold <= _ERROR:
                fields = self._context() + self._totals(now) + self._blame(error)
                self.log.write("error", "connection complete", fields)
        elif threshold <= _WARN:
            self.log.write("warn", "connection failed", self._ends() + self._blame(error))

    def _context(self) -> str:
        """Print what is known before any byte moved."""
        keys = self.log.keys
        ends = self.ends or Ends(destination=self.destination)
        return (
            f"{keys.context[0]}{_address(keys, self.source)}{ends.text(keys)}"
            f'{keys.context[_DIRECTION]}"{self.direction._value_}"'
        )

    def _totals(self, now: float) -> str:
        sent, received = self.bytes_from_client, self.bytes_from_server
        if self.direction is _INBOUND:
            sent, received = received, sent
        k_sent, k_received, k_duration = self.log.keys.totals
        milliseconds = int((now - self.started) * 1000)
        return f'{k_sent}{sent}{k_received}{received}{k_duration}"{milliseconds}ms"'

    def _ends(self) -> str:
        keys = self.log.keys
        shown = keys.context[0] + _address(keys, self.source)
        if self.destination is not None:
            shown += keys.context[_DESTINATION] + _address(keys, self.destination)
        return f'{shown}{keys.context[_DIRECTION]}"{self.direction.value}"'

    def _blame(self, error: BaseException) -> str:
        while isinstance(error, BaseExceptionGroup):  # a nursery's; the first one came first
            error = error.exceptions[0]
        reason = error.reason if isinstance(error, ZtunnelError) else "internal"
        text = str(error) or type(error).__name__
        k_error, k_reason, k_policy = self.log.keys.blame
        shown = f"{k_error}{quoted(text[:ERROR_CHARS_MAX])}{k_reason}{quoted(reason)}"
        return shown + _text(k_policy, self.policy)


def _address(keys: _Keys, address: Endpoint | HostPort | str) -> str:
    if type(address) is not Endpoint:  # an authority's host name: the peer chose it
        text = str(address)[:VALUE_CHARS_MAX]
        return quoted(text) if keys.quote else bare(text)
    ip = address.ip
    text = _v4_text(int(ip)) if type(ip) is IPv4Address else f"[{ip}]"
    return f"{keys.quote}{text}:{address.port}{keys.quote}"


def _text(key: str, value: str | None) -> str:
    return key + quoted(value[:VALUE_CHARS_MAX]) if value else ""


def _identity(key: str, value: Identity | None) -> str:
    if value is None:
        return ""
    uri = f"spiffe://{value.trust_domain}/ns/{value.namespace}/sa/{value.service_account}"
    return key + quoted(uri[:VALUE_CHARS_MAX])

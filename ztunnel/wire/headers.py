"""The values of HBONE's header fields: authority, baggage, forwarded, traceparent.

Sources: dataplane.md 2.8 and 3.7, dns-and-observability.md 9, W3C Trace Context. Nothing read here
is ever trusted for authorization; it names things in logs and metrics. So a broken value is absent,
not an error, except the authority: that says where to go.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Final, Self
from urllib.parse import quote, unquote_to_bytes

from ztunnel.model.network import Endpoint, HostPort, Port, parse_port
from ztunnel.model.workload import Locality, Workload

METHOD: Final = b":method"
AUTHORITY: Final = b":authority"
BAGGAGE: Final = b"baggage"
FORWARDED: Final = b"forwarded"
TRACEPARENT: Final = b"traceparent"
X_FORWARDED_NETWORK: Final = b"x-forwarded-network"

MAX_HOST: Final = 253  # RFC 1035 s2.3.4, in text form
MAX_BAGGAGE: Final = 8192  # W3C Baggage s3.3.2: what everyone must be able to carry
MAX_BAGGAGE_VALUE: Final = 256  # no Kubernetes name is longer; it becomes a metric label

WORKLOAD_KEYS: Final = frozenset(
    f"k8s.{kind}.name" for kind in ("deployment", "cronjob", "pod", "job")
)

_HOST: Final = re.compile(r"[0-9A-Za-z_](?:[0-9A-Za-z_.-]*[0-9A-Za-z_.])?")
_TRACEPARENT: Final = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
# W3C Baggage s3.3.1, less `=`, at which the reference splits, and `%`, which introduces an escape.
_BAGGAGE_SAFE: Final = "!#$&'()*+-./:<>?@[]^_`{|}~"


def values_of(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    """Return every value of a field, in order."""
    return [value for each, value in headers if each == name]


def first_value(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """Return the first value of a field, None if there is none."""
    for each, value in headers:  # a generator would take three times as long
        if each == name:
            return value
    return None


def parse_authority(authority: bytes) -> Endpoint | HostPort:
    """Read `ip:port`, `[ip6]:port` or `host:port`; an IPv4-mapped address becomes IPv4.

    Deliberately unlike the reference, which takes a mapped address for a mismatch.

    Raises:
        ValueError: it is none of these, or the port is 0.
    """
    try:
        text = authority.decode("ascii")
    except UnicodeDecodeError:
        raise ValueError(f"not an authority: {authority!r}") from None
    host, _, digits = text.rpartition(":")
    try:
        port = parse_port(digits)
    except ValueError:
        raise ValueError(f"no port in authority: {text!r}") from None
    if port == 0:
        raise ValueError(f"port 0 in authority: {text!r}")
    return _endpoint(text) or _host_port(host, port)


def _endpoint(text: str) -> Endpoint | None:
    """Read an address and port; None if it is something else. A zone means nothing to a peer."""
    if "%" in text:
        return None
    try:
        return Endpoint.parse(text)
    except ValueError:
        return None


def _host_port(host: str, port: Port) -> HostPort:
    if len(host) > MAX_HOST or _HOST.fullmatch(host) is None:
        raise ValueError(f"neither address nor host name in authority: {host!r}")
    return HostPort(host.lower(), port)


def format_authority(target: Endpoint | HostPort) -> bytes:
    """Print what `parse_authority` reads.

    Raises:
        ValueError: a host name that is not ASCII.
    """
    return str(target).encode("ascii")


@dataclass(frozen=True, slots=True, kw_only=True)
class Baggage:
    """How a peer describes a workload; fields as in `Workload`, None where it said nothing."""

    cluster_id: str | None = None
    namespace: str | None = None
    workload_name: str | None = None
    canonical_name: str | None = None
    canonical_revision: str | None = None
    region: str | None = None
    zone: str | None = None


_FIELDS: Final = {
    "k8s.cluster.name": "cluster_id",
    "k8s.namespace.name": "namespace",
    "service.name": "canonical_name",
    "service.version": "canonical_revision",
    "cloud.region": "region",
    "cloud.availability_zone": "zone",
} | dict.fromkeys(WORKLOAD_KEYS, "workload_name")


def build_baggage(workload: Workload) -> bytes:
    """Describe a workload to a peer; empty if nothing is known about it.

    Escapes what would break the list, which the reference does not do; Kubernetes names never
    need it.
    """
    return _print_baggage(
        workload.cluster_id,
        workload.namespace,
        workload.workload_type,
        workload.workload_name,
        workload.canonical_name,
        workload.canonical_revision,
        workload.locality,
    )


@lru_cache(maxsize=1024)
def _print_baggage(
    cluster: str, namespace: str, kind: str, name: str, service: str, version: str, place: Locality
) -> bytes:
    """Print it; remembered, as escaping costs 20 us and a node has few workloads of its own."""
    members = (
        ("k8s.cluster.name", cluster),
        ("k8s.namespace.name", namespace),
        (f"k8s.{kind.lower()}.name", name),
        ("service.name", service),
        ("service.version", version),
        ("cloud.region", place.region),
        ("cloud.availability_zone", place.zone),
    )
    return ",".join(
        f"{quote(key, safe=_BAGGAGE_SAFE)}={quote(value, safe=_BAGGAGE_SAFE)}"
        for key, value in members
        if value
    ).encode("ascii")


def parse_baggage(values: Iterable[bytes]) -> Baggage:
    """Read all `baggage` fields of a message; the later member wins, unknown ones are skipped.

    A value that is not ASCII voids the whole; so does a total above 8 KiB. A single member is
    skipped when it is empty, too long, or not printable once its escapes are undone.
    """
    joined = b",".join(values)
    if len(joined) > MAX_BAGGAGE or not joined.isascii():
        return Baggage()
    found: dict[str, str] = {}
    for member in joined.decode("ascii").split(","):
        key, _, rest = member.partition(";")[0].partition("=")
        field = _FIELDS.get(key.strip())
        value = _baggage_value(rest.partition("=")[0].strip()) if field else None
        if field and value:
            found[field] = value
    return Baggage(**found)


def _baggage_value(text: str) -> str | None:
    """Undo percent escapes; None unless the result may stand in a log line and a label."""
    try:
        value = unquote_to_bytes(text).decode() if "%" in text else text
    except UnicodeDecodeError:
        return None
    return value if len(value) <= MAX_BAGGAGE_VALUE and value.isprintable() else None


@dataclass(frozen=True, slots=True)
class Forwarded:
    """For whom a tunnel was opened, and the service host name that was meant."""

    source: Endpoint | None = None
    host: str | None = None


def build_forwarded(source: Endpoint, host: str | None = None) -> bytes:
    """Print the application's address and, if known, the destination service's host name."""
    text = f'for="{source}"'
    if host and _HOST.fullmatch(host):  # else leave it out: it is a hint and must not break out
        text += f";host={host}"
    return text.encode("ascii")


def parse_forwarded(value: bytes) -> Forwarded:
    """Read a `forwarded` field; what is missing or broken is None."""
    if not value.isascii():
        return Forwarded()
    pairs = [part.strip() for part in value.decode("ascii").split(";")]
    host = _parameter(pairs, "host=")
    return Forwarded(
        _endpoint(_parameter(pairs, "for=")),
        host if len(host) <= MAX_HOST and _HOST.fullmatch(host) else None,
    )


def forwarded_host(value: bytes) -> str | None:
    """Read only the host of a `forwarded` field."""
    return parse_forwarded(value).host if b"host=" in value else None


def _parameter(pairs: list[str], prefix: str) -> str:
    """Return the first pair that begins with `prefix`, without it and its quotes; or nothing."""
    for pair in pairs:
        if pair.startswith(prefix):
            return pair[len(prefix) :].strip('"')
    return ""


@dataclass(frozen=True, slots=True)
class Traceparent:
    """The id of a connection in logs (W3C Trace Context s3.2); all parts lower-case hex."""

    trace_id: str
    parent_id: str
    flags: str = "00"

    @classmethod
    def parse(cls, value: bytes) -> Self | None:
        """Read exactly 55 characters of a known form; None for anything else, never an error."""
        match = _TRACEPARENT.fullmatch(value)
        if match is None:
            return None
        version, trace_id, parent_id, flags = (part.decode("ascii") for part in match.groups())
        if version == "ff" or not trace_id.strip("0") or not parent_id.strip("0"):
            return None  # what the standard says means nothing
        return cls(trace_id, parent_id, flags)


def new_traceparent(random: Random) -> bytes:
    """Print a fresh one."""
    ids = f"{random.getrandbits(128 + 64):048x}"
    return f"00-{ids[:32]}-{ids[32:]}-00".encode("ascii")

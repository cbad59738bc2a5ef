"""What settings mean: nouns, readers of text, fields made of both (state-and-xds.md 1.1)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import field
from enum import StrEnum
from math import ceil
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

from ztunnel.model.identity import Namespace, ServiceAccount, TrustDomain
from ztunnel.model.network import Endpoint

T = TypeVar("T")

REDACTED = "<redacted>"
SHOWN_CHARS = 80  # of a value that is complained about
_JSON_PREFIX = "ISTIO_METAJSON_"
INT_MAX = 2**31 - 1
SECONDS_MAX = 10**10  # three centuries: far beyond it, deadlines overflow
_UNIT_SECONDS = {"w": 604800, "d": 86400, "h": 3600, "m": 60, "s": 1} | {
    "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9,
}  # fmt: skip
_HEADER_NAME = re.compile(r"[a-z0-9_.-]+")
_HEADER_VALUE = re.compile(r"[\x20-\x7e]*")
_TRUST_DOMAIN = re.compile(r"[A-Za-z0-9._-]{1,255}")  # capitals: the check is case-sensitive
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ns|us|µs|ms|[smhdw])")


class ProxyMode(StrEnum):
    """Whom one process serves: every pod of a node, or one workload."""

    SHARED = "shared"
    DEDICATED = "dedicated"


class Balancing(StrEnum):
    """How one of several equal endpoints is chosen."""

    RANDOM = "random"
    LEAST_CONNECTIONS = "least-connections"


class WorkloadInfo(NamedTuple):
    """The one workload of a dedicated proxy."""

    namespace: Namespace
    name: str
    service_account: ServiceAccount


class ServerUrl(NamedTuple):
    """Where a control-plane service is; TLS always. `host` has no brackets."""

    host: str
    port: int

    @property
    def target(self) -> str:
        """`host:port`, brackets around an IPv6 address."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"https://{self.target}"


class SourceKind(StrEnum):
    """Where the content of a credential is."""

    FILE = "file"
    SYSTEM = "system"
    LITERAL = "literal"


class Source(NamedTuple):
    """A credential: path of a file to read again at each use, the system's trust, or the text."""

    kind: SourceKind
    value: str

    def __repr__(self) -> str:
        return self.value if self.kind is SourceKind.FILE else f"<{self.kind}>"


def boolean(text: str) -> bool:
    """Read `true` or `false`, nothing else."""
    if text not in {"true", "false"}:
        raise ValueError("not a boolean; write true or false")
    return text == "true"


def proxy_mode(text: str) -> ProxyMode:
    """Read `shared` or `dedicated`."""
    try:
        return ProxyMode(text)
    except ValueError:
        raise ValueError("unknown mode; write shared or dedicated") from None


def balancing(text: str) -> Balancing:
    """Read how to choose among endpoints."""
    try:
        return Balancing(text)
    except ValueError:
        raise ValueError("unknown choice; write random or least-connections") from None


def is_true(text: str) -> bool:
    """Whether the text is `true`; anything else means off, as in the reference."""
    return text == "true"


def seconds(text: str) -> float:
    """Read a duration such as `1h30m`, `100ms` or `90` (seconds); it must be more than zero.

    Raises:
        ValueError: it is not one.
    """
    plain = re.fullmatch(r"[0-9]+(?:\.[0-9]+)?", text)
    parts = _DURATION_PART.findall(text)
    if plain:
        total = float(text)
    elif parts and "".join(number + unit for number, unit in parts) == text:
        total = sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts)
    else:
        raise ValueError("not a duration; write for example 10s, 5m, 1h30m or 100ms")
    if not 0 < total < SECONDS_MAX:
        raise ValueError("out of range; a duration is above 0 and below three centuries")
    return total


def no_limit(text: str) -> float:
    """Read a duration, or `0` for "no limit".

    Raises:
        ValueError: it is neither.
    """
    return 0.0 if text in {"0", "0s"} else seconds(text)


def integer(low: int, high: int = INT_MAX) -> Callable[[str], int]:
    """Make a reader of whole numbers from `low` to `high`."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,19}", text):
            raise ValueError("not a whole number; write decimal digits only")
        if not low <= int(text) <= high:
            raise ValueError(f"out of range; write {low} to {high}")
        return int(text)

    return read


def optional(parse: Callable[[str], T]) -> Callable[[str], T | None]:
    """Make a reader to which the empty text means absent."""
    return lambda text: parse(text) if text else None


def server_url(text: str) -> ServerUrl:
    """Read `host:port` or `https://host:port`; the port defaults to 443.

    Raises:
        ValueError: it is not one, or another scheme.
    """
    parts = urlsplit(text if "://" in text else f"https://{text}")
    if parts.scheme != "https":
        raise ValueError("only https is supported; write https://host:port")
    if not parts.hostname or parts.path not in {"", "/"} or parts.username or parts.query:
        raise ValueError("not an address of a server; write host:port")
    return ServerUrl(parts.hostname, parts.port or 443)


def workload_info(text: str) -> WorkloadInfo:
    """Read `namespace/name/service-account`."""
    match text.split("/"):
        case [namespace, name, account] if namespace and name and account:
            return WorkloadInfo(Namespace(namespace), name, ServiceAccount(account))
        case _:
            raise ValueError("three parts are needed; write namespace/name/service-account")


def trust_domains(text: str) -> tuple[TrustDomain, ...]:
    """Read a comma list of trust domains.

    Raises:
        ValueError: one of them cannot be the first part of a SPIFFE URI.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not all(_TRUST_DOMAIN.fullmatch(name) for name in names):
        raise ValueError("not trust domains; write for example cluster.local,old.example")
    return tuple(TrustDomain(name) for name in names)


def compliance(text: str) -> bool:
    """Whether post-quantum key exchange is demanded."""
    if text not in {"", "pqc"}:
        raise ValueError("unknown policy, and ignoring it would be unsafe; write pqc or nothing")
    return text == "pqc"


def workers(text: str) -> str:
    """Check `N`, `N%` or the empty text; what it means depends on the node."""
    if text and not re.fullmatch(r"[0-9]{1,3}|([1-9][0-9]?|100)%", text):
        raise ValueError("not a number of workers; write for example 2, 50% or 0 for all")
    return text


def worker_count(wanted: str, cpus: int) -> int:
    """Work out the number of data-path processes; `wanted` as `workers` checked it.

    Without a wish it is one. The reference takes a quarter of the cores, but its workers are
    threads: ours are processes, each with the mesh's state in its own memory.
    """
    if wanted.endswith("%"):
        return max(1, ceil(cpus * int(wanted[:-1]) / 100))
    return int(wanted or 1) or cpus


def drain_seconds(grace_seconds: int | None) -> float:
    """Work out the drain deadline from the pod's grace period (dataplane.md 10.3)."""
    if grace_seconds is None:
        return 5.0
    margin = 5 if grace_seconds > 10 else 1  # noqa: PLR2004 the reference's rule
    return float(max(1, grace_seconds - margin))


def fake_ca(text: str) -> Path | bool:
    """Read `true`, `false` or the path of a PEM file with a root certificate and its key."""
    if text in {"true", "false", ""}:
        return text == "true"
    if "/" not in text:
        raise ValueError("neither a boolean nor a path; write true, false or /path/of/ca.pem")
    return Path(text)


def header(name: str, value: str) -> tuple[str, str]:
    """Check one header of gRPC metadata; its name goes in lower case.

    Raises:
        ValueError: gRPC would refuse it, and with it every call.
    """
    if not _HEADER_NAME.fullmatch(name.lower()) or not _HEADER_VALUE.fullmatch(value):
        raise ValueError("not a gRPC header; use letters, digits, -_. and plain ASCII")
    return name.lower(), value


def both_loopbacks(port: int) -> tuple[Endpoint, ...]:
    """Say `localhost:port` in addresses."""
    return (Endpoint.parse(f"127.0.0.1:{port}"), Endpoint.parse(f"[::1]:{port}"))


def dns_addresses(text: str) -> tuple[Endpoint, ...]:
    """Read `localhost:port` or `ip:port`."""
    host, _, port = text.rpartition(":")
    if host == "localhost" and port.isdecimal():
        return both_loopbacks(int(port))
    try:
        return (Endpoint.parse(text),)
    except ValueError:
        raise ValueError("not an address; write localhost:15053 or ip:port") from None


def dns_capture(text: str, warnings: list[str]) -> bool:
    """Tell whether the DNS proxy is on; the reference takes all but `true` for no, in silence."""
    capture = text.lower()
    if capture not in ("true", "false"):
        reason = f"{capture[:SHOWN_CHARS]!r} is neither true nor false"
        warnings.append(f"ISTIO_META_DNS_CAPTURE: {reason}, so DNS is off")
    return capture == "true"


def json_metadata(env: Mapping[str, str], warnings: list[str]) -> dict[str, object]:
    """Read what is in `ISTIO_METAJSON_*`; what is no JSON is left out, as in the reference."""
    metadata: dict[str, object] = {}
    for name in sorted(name for name in env if name.startswith(_JSON_PREFIX)):
        try:
            metadata[name.removeprefix(_JSON_PREFIX)] = json.loads(env[name])
        except ValueError as exc:
            warnings.append(f"{name} is ignored: {exc}")
    return metadata


def needed_server_url(text: str) -> ServerUrl:
    """Read a server's address that may not be empty."""
    if not text:
        raise ValueError("empty; write host:port, or use FAKE_CA for a test")
    return server_url(text)


def root_source(text: str) -> Source:
    """Read `SYSTEM`, PEM text, or else a path (which may come to exist later)."""
    if text == "SYSTEM":
        return Source(SourceKind.SYSTEM, text)
    if "-----BEGIN" in text:
        return Source(SourceKind.LITERAL, text)
    if not text or "\n" in text:
        raise ValueError("neither PEM nor a path; write a path, SYSTEM or PEM text")
    return Source(SourceKind.FILE, text)


def duration(value: float) -> dict[str, int]:
    """Show seconds as the reference's dump does."""
    nanos = round(value * 10**9)
    return {"secs": nanos // 10**9, "nanos": nanos % 10**9}


def shown(name: str, value: object) -> object:
    """Show the setting `name` as JSON, without secrets (dns-and-observability.md 4.7)."""
    as_json: object = value
    match value:
        case float() if name.endswith("_seconds"):
            as_json = duration(value)
        case ProxyMode():
            as_json = value.value.capitalize()
        case WorkloadInfo():
            as_json = "/".join(value)
        case ServerUrl() | Source() | Path():
            as_json = str(value)
        case Mapping():
            as_json = dict(value)
        case tuple() if name.endswith("_headers"):
            as_json = [[header, REDACTED] for header, _ in value]
        case tuple():
            as_json = [str(item) for item in value]
        case _:
            pass
    return as_json


def setting(name: str, default: str, parse: Callable[[str], T], dump: str = "") -> T:
    """Declare a field read from the variable `name` and shown as `dump`, if that is given."""
    metadata = {"env": name, "default": default, "parse": parse, "dump": dump}
    declared: T = field(default=parse(default), metadata=metadata)
    return declared


def derived(default: T, dump: str = "", *, secret: bool = False) -> T:
    """Declare a field that several variables decide."""
    metadata = {"dump": dump}
    declared: T = field(default_factory=lambda: default, metadata=metadata, repr=not secret)
    return declared

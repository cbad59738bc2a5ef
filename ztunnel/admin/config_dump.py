"""The state as one JSON object (dns-and-observability.md 4), made in slices.

A mesh can have 100 000 workloads, so nothing here is done to all of them at once: lists are sorted
in runs that are merged while they are printed, and the text comes in pieces. Objects in the state
are immutable, so what is printed is what was known when the dump began. Beyond the reference:
`types` (comma list of top keys), `namespace` and `node` narrow the dump; secrets are not in it.
"""

from __future__ import annotations

import base64
import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from ztunnel.identity.rotation import CertificateState, CertificateStatus

if TYPE_CHECKING:
    from ztunnel.proxy.live import Shown

RUN_ITEMS = 1000  # sorted at once: 0.5 ms
REST_ITEMS = 100  # printed between rests: about 2 ms
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True, slots=True, kw_only=True)
class ListSection:
    """A top key that holds a sorted list."""

    items: Callable[[], Iterable[Any]]
    key: Callable[[Any], str]
    show: Callable[[Any], Mapping[str, object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class MapSection:
    """A top key that holds an object; its entries are made one at a time."""

    items: Callable[[], Iterable[tuple[str, Any]]]
    show: Callable[[Any], object]


Section = ListSection | MapSection


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the reader wants to see; empty = everything."""

    types: frozenset[str] = frozenset()
    namespace: str = ""
    node: str = ""

    @classmethod
    def of(cls, query: Mapping[str, str]) -> Wish:
        """Read it from the query of a request."""
        types = frozenset(part for part in query.get("types", "").split(",") if part)
        return cls(types=types, namespace=query.get("namespace", ""), node=query.get("node", ""))

    def takes(self, shown: Mapping[str, object]) -> bool:
        """Whether an item is wanted; one without a namespace or node always is."""
        return all(
            not wanted or shown.get(name, wanted) == wanted
            for name, wanted in (("namespace", self.namespace), ("node", self.node))
        )


def constant(make: Callable[[], Mapping[str, object]]) -> MapSection:
    """Make a section of a small object."""
    return MapSection(items=lambda: make().items(), show=lambda value: value)


def config_dump(sections: Mapping[str, Section], wish: Wish) -> Iterator[bytes]:
    """Print the sections in the order of their names; an empty piece is a rest."""
    opening = b"{\n"
    for name in sorted(sections):
        if wish.types and name not in wish.types:
            continue
        section = sections[name]
        yield opening + f'  "{name}": '.encode()
        if isinstance(section, ListSection):
            yield from _brackets(b"[]", _list_items(section, wish))
        else:
            yield from _brackets(b"{}", _map_items(section))
        opening = b",\n"
    yield b"\n}\n" if opening == b",\n" else b"{}\n"


def _brackets(pair: bytes, items: Iterator[bytes]) -> Iterator[bytes]:
    """Print items between brackets, and rest often enough; an empty item is only a rest."""
    before = pair[:1] + b"\n    "
    gathered: list[bytes] = []
    for number, item in enumerate(items, 1):
        if item:
            gathered += (before, item)
            before = b",\n    "
        if number % REST_ITEMS == 0:
            yield b"".join(gathered)
            gathered.clear()
    yield b"".join(gathered) + (b"\n  " + pair[1:] if before[:1] == b"," else pair)


def _list_items(section: ListSection, wish: Wish) -> Iterator[bytes]:
    runs = []
    items: Sequence[Any] = list(section.items())
    for start in range(0, len(items), RUN_ITEMS):
        runs.append(sorted(items[start : start + RUN_ITEMS], key=section.key))
        yield from (b"",) * REST_ITEMS  # a rest
    for item in heapq.merge(*runs, key=section.key):
        shown = section.show(item)
        yield pretty(shown) if wish.takes(shown) else b""


def _map_items(section: MapSection) -> Iterator[bytes]:
    for key, value in sorted(section.items(), key=itemgetter(0)):
        yield msgspec.json.encode(key) + b": " + pretty(section.show(value))


def pretty(value: object) -> bytes:
    """Print JSON with sorted keys, indented as a member of a member of the top object."""
    text = msgspec.json.format(msgspec.json.encode(value, order="sorted"), indent=2)
    return text.replace(b"\n", b"\n    ")  # a newline within a string is escaped, never bare


def certificate_to_dict(status: CertificateStatus) -> dict[str, object]:
    """Show the certificate of one identity (4.4)."""
    state = str(status.state)
    if status.state is CertificateState.UNAVAILABLE:
        state += f": {status.error or 'unknown'}"
    known = status.certificate
    return {
        "identity": str(status.identity),
        "state": state,
        "certChain": [] if known is None else _chain(known.chain_pem),
        "rootCerts": [] if known is None else _chain(known.roots_pem),
    }


def _chain(pem: bytes) -> list[dict[str, str]]:
    return [
        {
            "pem": base64.b64encode(one.public_bytes(Encoding.PEM)).decode(),
            "serialNumber": str(one.serial_number),  # istioctl reads decimal and nothing else
            "validFrom": _time(one.not_valid_before_utc),
            "expirationTime": _time(one.not_valid_after_utc),
        }
        for one in x509.load_pem_x509_certificates(pem)
    ]


def _time(moment: datetime) -> str:
    return moment.strftime(TIME_FORMAT)


def pod_to_dict(
    *,
    name: str,
    namespace: str,
    service_account: str,
    inbound: Iterable[Shown],
    outbound: Iterable[Shown],
    is_up: bool,
) -> dict[str, object]:
    """Show one pod we serve (4.5); connections only when it is up."""
    shown: dict[str, object] = {
        "state": "Up" if is_up else "Pending",
        "info": {"name": name, "namespace": namespace, "serviceAccount": service_account},
    }
    if is_up:
        shown["connections"] = {
            "inbound": [connection_to_dict(one) for one in inbound],
            "outbound": [connection_to_dict(one) for one in outbound],
        }
    return shown


def connection_to_dict(connection: Shown) -> dict[str, object]:
    """Show one connection in progress."""
    actual = connection.actual
    return {
        "src": str(connection.source),
        "originalDst": connection.original,
        "actualDst": None if actual is None else str(actual),
        "protocol": connection.protocol,
    }

"""The state as one JSON object (dns-and-observability.md 4), made in slices.

A mesh can have 100 000 workloads, so nothing here is done to all of them at once: lists are sorted
in runs that are merged while they are printed, and the text comes in pieces. Nor is one item made
at once that may be large itself, as a service of thousands of endpoints is (`Many`). Objects in
the state are immutable, so what is printed is what was known when the dump began. Beyond the
reference: `types` (comma list of top keys), `namespace` and `node` narrow the dump; secrets are not
in it.
"""

from __future__ import annotations

import base64
import heapq
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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

RUN_ITEMS = 200  # sorted at once: 0.1 ms
REST_BYTES = 4096  # printed between rests: 0.05 ms
LEFT_OUT_ITEMS = 8  # looked at between rests, where they are not wanted
REST = object()  # among items: nothing, but others may go first
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True, slots=True, kw_only=True)
class ListSection:
    """A top key that holds a sorted list."""

    items: Callable[[], Collection[Any]]
    key: Callable[[Any], str]
    show: Callable[[Any], Mapping[str, object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Many:
    """A part of an item with so many members that they are made one at a time.

    It is a list; with `is_object` an object, whose names `key` gives. With `key` it is sorted.
    """

    items: Collection[Any]
    show: Callable[[Any], object]
    key: Callable[[Any], str] | None = None
    is_object: bool = False


class Large(dict[str, object]):
    """An object with a `Many` or a `Large` in it."""


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
    return _resting(_dump(sections, wish))


def _dump(sections: Mapping[str, Section], wish: Wish) -> Iterator[bytes]:
    opening = b"{\n"
    for name in sorted(sections):
        if wish.types and name not in wish.types:
            continue
        yield opening + f'  "{name}": '.encode()
        section = sections[name]
        if isinstance(section, ListSection):
            many = Many(items=section.items(), key=section.key, show=section.show)
            yield from _members(many, b"\n  ", wish.takes)
        else:
            yield from _members(_entries(section), b"\n  ", everything)
        opening = b",\n"
    yield b"\n}\n" if opening == b",\n" else b"{}\n"


def _entries(section: MapSection) -> Many:
    return Many(
        items=list(section.items()),
        key=itemgetter(0),
        show=lambda entry: section.show(entry[1]),
        is_object=True,
    )


def _resting(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Gather parts to pieces of a good size; an empty part asks for a rest at once."""
    gathered: list[bytes] = []
    size = 0
    for part in parts:
        gathered.append(part)
        size += len(part)
        if size >= REST_BYTES or not part:
            yield b"".join(gathered)
            gathered.clear()
            size = 0
    yield b"".join(gathered)


def pieces(value: object, margin: bytes) -> Iterator[bytes]:
    """Print JSON with sorted keys; `margin` begins its further lines. An empty piece is a rest."""
    if isinstance(value, Many):
        yield from _members(value, margin, everything)
    elif isinstance(value, Large):
        before = b"{"
        for name in sorted(value):
            yield before + margin + b"  " + msgspec.json.encode(name) + b": "
            yield from pieces(value[name], margin + b"  ")
            before = b","
        yield margin + b"}"
    else:
        text = msgspec.json.format(msgspec.json.encode(value, order="sorted"), indent=2)
        yield text.replace(b"\n", margin)  # a newline within a string is escaped, never bare


def _members(
    many: Many, margin: bytes, takes: Callable[[Mapping[str, object]], bool]
) -> Iterator[bytes]:
    """Print those that `takes` lets through."""
    opening, closing = (b"{", b"}") if many.is_object else (b"[", b"]")
    before, inner, left_out = opening, margin + b"  ", 0
    for item in many.items if many.key is None else _in_order(list(many.items), many.key):
        shown: Any = None if item is REST else many.show(item)
        if item is REST or not takes(shown):
            left_out += 1
            if item is REST or left_out % LEFT_OUT_ITEMS == 0:
                yield b""
            continue
        name = b""
        if many.is_object:
            assert many.key is not None
            name = msgspec.json.encode(many.key(item)) + b": "
        yield before + inner + name
        yield from pieces(shown, inner)
        before = b","
    yield margin + closing if before == b"," else opening + closing


def _in_order(items: Sequence[Any], key: Callable[[Any], str]) -> Iterator[Any]:
    """Sort in runs, with a `REST` after each, then merge them."""
    runs = []
    for start in range(0, len(items), RUN_ITEMS):
        runs.append(sorted(items[start : start + RUN_ITEMS], key=key))
        yield REST
    yield from heapq.merge(*runs, key=key)


def everything(_: object) -> bool:
    """Take whatever there is."""
    return True


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
    inbound: Sequence[Shown],
    outbound: Sequence[Shown],
    is_up: bool,
) -> dict[str, object]:
    """Show one pod we serve (4.5); connections only when it is up."""
    shown = Large(
        state="Up" if is_up else "Pending",
        info={"name": name, "namespace": namespace, "serviceAccount": service_account},
    )
    if is_up:
        shown["connections"] = Large(
            inbound=Many(items=inbound, show=connection_to_dict),
            outbound=Many(items=outbound, show=connection_to_dict),
        )
    return shown


def connection_to_dict(connection: Shown) -> dict[str, str | None]:
    """Show one connection in progress."""
    actual = connection.actual
    return {
        "src": str(connection.source),
        "originalDst": connection.original,
        "actualDst": None if actual is None else str(actual),
        "protocol": connection.protocol,
    }

"""The header blocks of a CONNECT and of its answer (dataplane.md 2.8 and 3.7)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Self

from ztunnel.errors import RejectedError
from ztunnel.wire.headers import (
    AUTHORITY,
    BAGGAGE,
    FORWARDED,
    METHOD,
    TRACEPARENT,
    X_FORWARDED_NETWORK,
    Baggage,
    build_baggage,
    build_forwarded,
    first_value,
    format_authority,
    forwarded_host,
    parse_authority,
    parse_baggage,
    values_of,
)

if TYPE_CHECKING:
    from ztunnel.model.network import Endpoint, HostPort, Network
    from ztunnel.model.service import Service
    from ztunnel.model.workload import Workload
    from ztunnel.wire.hbone.events import Headers


def request_head(authority: Endpoint | HostPort, workload: Workload) -> Headers:
    """Build what all requests of a workload for tunnels to `authority` begin with."""
    return [
        (METHOD, b"CONNECT"),
        (AUTHORITY, format_authority(authority)),
        (BAGGAGE, build_baggage(workload)),
    ]


def tunnel_request(
    head: Headers,
    *,
    source: Endpoint,
    service: Service | None,
    traceparent: bytes,
    network: Network | None = None,
) -> Headers:
    """Build the request for a tunnel on behalf of `source`; `head` says where to.

    `network` is set for the inner request of a double tunnel only.
    """
    headers = [
        *head,
        (FORWARDED, build_forwarded(source, None if service is None else service.hostname)),
        (TRACEPARENT, traceparent),
    ]
    if network is not None:
        headers.append((X_FORWARDED_NETWORK, network.encode()))
    return headers


def response_headers(workload: Workload | None) -> Headers:
    """Build what goes with a 200: who we are, if that is wanted and known."""
    return [] if workload is None else [(BAGGAGE, build_baggage(workload))]


@dataclass(frozen=True, slots=True)
class TunnelRequest:
    """A received request. No part of it is trusted for authorization."""

    headers: Headers
    method: bytes
    forwarded_host: str | None

    @classmethod
    def read(cls, headers: Headers) -> Self:
        """Take what is needed of every request; the rest is read on demand."""
        forwarded = first_value(headers, FORWARDED)
        return cls(
            headers,
            first_value(headers, METHOD) or b"",
            None if forwarded is None else forwarded_host(forwarded),
        )

    def essence(self) -> Headers:
        """Give what two requests of one caller for the same thing have in common.

        That is all but the id of the connection, and the application's own port in `forwarded`.
        """
        own = (TRACEPARENT, FORWARDED)
        return [pair for pair in self.headers if pair[0] not in own]

    def without_headers(self) -> Self:
        """Keep the little that is of use for as long as the connection lives."""
        return self._bare(self.method, self.forwarded_host)

    @classmethod
    @lru_cache(maxsize=256)
    def _bare(cls, method: bytes, forwarded_host: str | None) -> Self:
        """Make one without headers; nearly all connections share one."""
        return cls([], method, forwarded_host)

    def authority(self) -> Endpoint | HostPort:
        """Read where the client wants to go.

        Raises:
            RejectedError: not a CONNECT, or no usable authority; the status is 400.
        """
        if self.method != b"CONNECT":
            shown = self.method[:32].decode("ascii", "backslashreplace")
            raise RejectedError(
                f"expected method CONNECT, got {shown}", status=HTTPStatus.BAD_REQUEST
            )
        raw = first_value(self.headers, AUTHORITY) or b""
        try:
            return parse_authority(raw)
        except ValueError as error:
            raise RejectedError(
                f"no valid authority pseudo header: {error}", status=HTTPStatus.BAD_REQUEST
            ) from error

    def baggage(self) -> Baggage:
        """Read how the client describes its workload."""
        return parse_baggage(values_of(self.headers, BAGGAGE))

    def is_from_gateway(self, network: Network) -> bool:
        """Tell whether the request crossed networks, so that its address says nothing."""
        named = first_value(self.headers, X_FORWARDED_NETWORK)
        return named is not None and named.lower() != network.encode().lower()

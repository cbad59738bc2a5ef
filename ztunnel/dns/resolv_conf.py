"""What resolv.conf(5) says that matters to us."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from ztunnel.model.network import Endpoint, Port, parse_ip

DNS_PORT = Port(53)
_V4 = 4


@dataclass(frozen=True, slots=True)
class ResolvConf:
    """Resolvers in order, and the domains that short names are tried in."""

    servers: tuple[Endpoint, ...] = ()
    search: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the file; wrong lines are ignored, as resolvers do.

        Resolvers at addresses of a link are left out: it is another link where the pod is.
        """
        servers: list[Endpoint] = []
        search: tuple[str, ...] = ()
        for line in text.splitlines():
            keyword, *words = line.split() or [""]
            if keyword == "nameserver" and words:
                with suppress(ValueError):
                    ip = parse_ip(words[0])
                    if ip.version == _V4 or not ip.is_link_local:
                        servers.append(Endpoint(ip, DNS_PORT))
            elif keyword == "search" or (keyword == "domain" and words):
                # The last line of the two kinds counts.
                names = words if keyword == "search" else words[:1]
                search = tuple(name.strip(".").lower() for name in names if name.strip("."))
        return cls(tuple(servers), search)

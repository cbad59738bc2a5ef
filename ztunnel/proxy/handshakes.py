"""TLS handshakes under way on the whole node: how many, and who must give way to whom.

A handshake costs its caller nothing, not even a certificate, and a place here for as long as it
takes. So one address that opens connections and says nothing could hold all places, and no pod of
the node would take another tunnel. When there is no place left, the oldest handshake of whoever
has the most gives way to a caller who has fewer.
"""

from __future__ import annotations

from collections import Counter
from ipaddress import IPv6Address
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from ztunnel.model.network import IpAddress

HOST_BITS = 64  # an IPv6 host may choose these as it likes (RFC 4291 s2.5.1)

Caller: TypeAlias = "IpAddress | int"


class UnderWay(Protocol):
    """A handshake that holds a place."""

    def give_way(self) -> None:
        """End, as the place is needed for somebody else."""


class Handshakes:
    """The places, each with the handshake that holds it."""

    __slots__ = ("_callers", "_under_way", "most")

    def __init__(self, most: int) -> None:
        self.most = most
        self._under_way: dict[UnderWay, Caller] = {}  # the oldest first
        self._callers: Counter[Caller] = Counter()

    @property
    def taken(self) -> int:
        """How many are under way."""
        return len(self._under_way)

    def begin(self, ip: IpAddress, handshake: UnderWay) -> bool:
        """Take a place, if there is one; call `end` when it is no longer needed."""
        caller = int(ip) >> HOST_BITS if isinstance(ip, IPv6Address) else ip
        if len(self._under_way) >= self.most and not self._make_room(caller):
            return False
        self._under_way[handshake] = caller
        self._callers[caller] += 1
        return True

    def end(self, handshake: UnderWay) -> None:
        """Free the place; one that was given away is fine."""
        caller = self._under_way.pop(handshake, None)
        if caller is not None:
            self._callers[caller] -= 1
            if not self._callers[caller]:
                del self._callers[caller]

    def _make_room(self, caller: Caller) -> bool:
        """End the oldest handshake of whoever has the most, if that is fairer than to refuse."""
        greediest, number = max(self._callers.items(), key=lambda item: item[1])
        if number <= self._callers[caller] + 1:
            return False
        oldest = next(one for one, each in self._under_way.items() if each == greediest)
        self.end(oldest)
        oldest.give_way()
        return True

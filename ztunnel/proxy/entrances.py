"""Who was let in before: what the same caller would be answered again.

Admitting a request, asking policy and naming both ends costs a fifth of what a new connection costs
at the server's side. The answer depends on nothing but the question and the state. Only leave is
remembered: a refusal is explained anew each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ztunnel.decide.admit import Admission
    from ztunnel.decide.authorize import Permit
    from ztunnel.model.identity import Identity
    from ztunnel.model.network import Endpoint, IpAddress
    from ztunnel.proxy.labels import Description

ENTRANCES_MAX = 128  # two kibibytes each, and a node has hundreds of pods
HEADERS_BYTES_MAX = 2048  # ours have 300; a stranger's may be as long as the limit of a request


class Question(NamedTuple):
    """Who asks for what."""

    caller: Identity | None  # as TLS proved it
    caller_ip: IpAddress
    local: Endpoint  # where it came to
    service: str | None  # the host name it meant
    headers: tuple[tuple[bytes, bytes], ...]  # without those that differ each time

    def __hash__(self) -> int:
        """Hash what tells most apart: identities and endpoints are slow to hash."""
        return hash((int(self.caller_ip), self.service, self.headers))


@dataclass(frozen=True, slots=True)
class Entrance:
    """How somebody was let in."""

    admission: Admission
    description: Description
    permit: Permit


class Entrances:
    """The entrances of one workload, true for one version of the state."""

    __slots__ = ("_by_question", "_version")

    def __init__(self) -> None:
        self._version = -1
        self._by_question: dict[Question, Entrance] = {}

    def find(self, question: Question, version: int) -> Entrance | None:
        """Give what `question` was answered under this version of the state."""
        return self._by_question.get(question) if version == self._version else None

    def keep(self, question: Question, version: int, entrance: Entrance) -> None:
        """Remember an answer given under this version of the state."""
        if sum(len(name) + len(value) for name, value in question.headers) > HEADERS_BYTES_MAX:
            return
        if version != self._version or len(self._by_question) >= ENTRANCES_MAX:
            self._by_question.clear()
            self._version = version
        self._by_question[question] = entrance

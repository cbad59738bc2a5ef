"""Read a YAML document field by field, and report every mistake with its line and path.

Nothing here raises while reading: a wrong field is noted in `Problems` and reads as its default,
so that one look at a file shows all that is wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import StrEnum
from sys import intern
from typing import TypeVar

import yaml

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)

PROBLEMS_MAX = 20  # more than a person mends in one go

NULL_TAG = "tag:yaml.org,2002:null"
BOOLEANS = {"true": True, "false": False}


@dataclass(slots=True)
class Problems:
    """What is wrong with one document; `source` names it for people."""

    source: str
    lines: list[str] = field(default_factory=list)
    unlisted: int = 0

    def add(self, node: yaml.Node, path: str, text: str) -> None:
        """Note one mistake."""
        if len(self.lines) < PROBLEMS_MAX:
            where = f"{path or 'document'}, line {node.start_mark.line + 1}"
            self.lines.append(f"{self.source}: {where}: {text}")
        else:
            self.unlisted += 1

    def __str__(self) -> str:
        more = [f"{self.source}: and {self.unlisted} more"] if self.unlisted else []
        return "\n".join(self.lines + more)


@dataclass(frozen=True, slots=True)
class Field:
    """One value of the document, where it stands and where its mistakes go."""

    node: yaml.Node
    path: str
    problems: Problems

    def wrong(self, text: str) -> None:
        """Note that this value is wrong, and how to mend it."""
        self.problems.add(self.node, self.path, text)

    @property
    def is_null(self) -> bool:
        """Tell whether the value is absent in all but name."""
        return self.node.tag == NULL_TAG

    def text(self) -> str | None:
        """Return a scalar as it is written; None when it is something else.

        It is interned: a mesh says the same few words of very many workloads.
        """
        if isinstance(self.node, yaml.ScalarNode) and not self.is_null:
            return intern(str(self.node.value))
        self.wrong(f"expected text, found {self.kind}")
        return None

    @property
    def kind(self) -> str:
        """The kind of value, in words for people."""
        if self.is_null:
            return "nothing"
        if isinstance(self.node, yaml.MappingNode):
            return "a map"
        return "a list" if isinstance(self.node, yaml.SequenceNode) else "a single value"

    def parse(self, parse: Callable[[str], T]) -> T | None:
        """Return what `parse` makes of the text; a ValueError is noted as the mistake."""
        text = self.text()
        if text is None:
            return None
        try:
            return parse(text)
        except ValueError as exc:
            self.wrong(str(exc))
            return None

    def choice(self, choices: type[E]) -> E | None:
        """Return one of an enumeration, by its value."""
        text = self.text()
        for member in choices:
            if text == member.value:
                return member
        if text is not None:
            allowed = ", ".join(member.value for member in choices)
            self.wrong(f"{text!r} is not known; use one of {allowed}")
        return None

    def items(self) -> Iterator[Field]:
        """Yield the elements of a list; nothing at all counts as an empty one."""
        if isinstance(self.node, yaml.SequenceNode):
            for number, node in enumerate(self.node.value):
                yield Field(node, f"{self.path}[{number}]", self.problems)
        elif not self.is_null:
            self.wrong(f"expected a list, found {self.kind}")

    def entries(self) -> Iterator[tuple[Field, Field]]:
        """Yield key and value of a map; nothing at all counts as an empty one."""
        if not isinstance(self.node, yaml.MappingNode):
            if not self.is_null:
                self.wrong(f"expected a map, found {self.kind}")
            return
        seen: set[str] = set()
        for key_node, value_node in self.node.value:
            key = Field(key_node, self.path, self.problems)
            name = key.text()
            if name is None:
                continue
            if name in seen:
                key.wrong(f"{name!r} is written twice; keep one")
                continue
            seen.add(name)
            inner = f"{self.path}.{name}" if self.path else name
            yield key, Field(value_node, inner, self.problems)

    def each(self, read: Callable[[Field], T | None]) -> tuple[T, ...]:
        """Return what `read` makes of each element of a list, without its failures."""
        found = (read(item) for item in self.items())
        return tuple(value for value in found if value is not None)

    def object(self, known: frozenset[str], required: tuple[str, ...] = ()) -> Object:
        """Return a map whose keys are fixed; unknown and missing ones are mistakes."""
        fields: dict[str, Field] = {}
        for key, value in self.entries():
            name = str(key.node.value)
            if name in known:
                fields[name] = value
            else:
                key.wrong(_unknown(name, known))
        for name in required:
            if name not in fields:
                self.wrong(f"`{name}` is missing")
        return Object(fields)


def _unknown(name: str, known: frozenset[str]) -> str:
    close = get_close_matches(name, sorted(known), n=1)
    hint = f"did you mean `{close[0]}`?" if close else f"known are {', '.join(sorted(known))}"
    return f"unknown key `{name}`; {hint}"


@dataclass(frozen=True, slots=True)
class Object:
    """The known fields of one map; a field that is absent, null or wrong reads as its default."""

    fields: dict[str, Field]

    def get(self, name: str) -> Field | None:
        """Return a field that is there and not null."""
        found = self.fields.get(name)
        return None if found is None or found.is_null else found

    def read(self, name: str, read: Callable[[Field], T | None], default: T) -> T:
        """Return what `read` makes of a field."""
        found = self.get(name)
        value = read(found) if found is not None else None
        return default if value is None else value

    def maybe(self, name: str, read: Callable[[Field], T]) -> T | None:
        """Return what `read` makes of a field, None without it."""
        found = self.get(name)
        return read(found) if found is not None else None

    def text(self, name: str) -> str:
        """Return a text, "" by default."""
        return self.read(name, Field.text, "")

    def boolean(self, name: str) -> bool:
        """Return true or false, false by default."""
        return self.read(name, lambda found: found.parse(_boolean), False)  # noqa: FBT003

    def choice(self, name: str, choices: type[E], default: E) -> E:
        """Return one of an enumeration."""
        return self.read(name, lambda found: found.choice(choices), default)

    def each(self, name: str, read: Callable[[Field], T | None]) -> tuple[T, ...]:
        """Return what `read` makes of each element of a list, () by default."""
        return self.read(name, lambda found: found.each(read), ())


def _boolean(text: str) -> bool:
    if text not in BOOLEANS:
        raise ValueError(f"{text!r} is neither true nor false")
    return BOOLEANS[text]


def integer_up_to(highest: int) -> Callable[[str], int]:
    """Return a parser of numbers from 0 to `highest`."""

    def parse(text: str) -> int:
        # The length first: int() of a million digits takes its time.
        if not (text.isascii() and text.isdigit() and len(text) <= len(str(highest))):
            raise ValueError(f"{text!r} is not a number from 0 to {highest}")
        if int(text) > highest:
            raise ValueError(f"{text!r} is over {highest}")
        return int(text)

    return parse

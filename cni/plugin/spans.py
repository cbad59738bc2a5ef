"""JSON read together with where each part stands, so that text can be kept byte for byte.

Go's decoder and ours agree on what JSON is (RFC 8259), except for the numbers NaN and Infinity,
which only Python accepts: they are refused here.
"""

from __future__ import annotations

import json

_SPACE = " \t\n\r"  # RFC 8259 s2


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


_decoder = json.JSONDecoder(parse_constant=_refuse_constant)


class Span:
    """A decoded value and the part of the text, `start` to `end`, that it was read from."""

    __slots__ = ("end", "start", "value")

    def __init__(self, value: object, start: int, end: int) -> None:
        self.value = value
        self.start = start
        self.end = end


def read_document(text: str) -> dict[str, Span]:
    """Read a text that is one JSON object; of members with the same name the last one counts.

    Raises:
        ValueError: the text is not JSON, is not an object, or has something after it.
    """
    members, end = _read_members(text, skip_space(text, 0))
    if skip_space(text, end) != len(text):
        raise ValueError(f"something follows the JSON object at character {end}")
    return members


def read_members(text: str, start: int) -> dict[str, Span]:
    """Read the members of the object that stands at `start` of a larger text.

    Raises:
        ValueError: there is no JSON object at `start`.
    """
    return _read_members(text, start)[0]


def read_elements(text: str, start: int) -> list[Span]:
    """Read the elements of the array that stands at `start` of a larger text.

    Raises:
        ValueError: there is no JSON array at `start`.
    """
    at = _after(text, start, "[")
    elements: list[Span] = []
    if text[at : at + 1] == "]":
        return elements
    while True:
        element = _read_value(text, at)
        elements.append(element)
        at = skip_space(text, element.end)
        if text[at : at + 1] == "]":
            return elements
        at = _after(text, at, ",")


def skip_space(text: str, at: int) -> int:
    """Give the place of the first character from `at` on that is not white space."""
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _read_members(text: str, start: int) -> tuple[dict[str, Span], int]:
    at = _after(text, start, "{")
    members: dict[str, Span] = {}
    if text[at : at + 1] == "}":
        return members, at + 1
    while True:
        key = _read_value(text, at)
        if not isinstance(key.value, str):
            raise ValueError(f"expected a member's name at character {at}")  # noqa: TRY004
        member = _read_value(text, _after(text, skip_space(text, key.end), ":"))
        members[key.value] = member
        at = skip_space(text, member.end)
        if text[at : at + 1] == "}":
            return members, at + 1
        at = _after(text, at, ",")


def _after(text: str, at: int, wanted: str) -> int:
    """Give the place of what follows the character `wanted`, which must stand at `at`."""
    if text[at : at + 1] != wanted:
        raise ValueError(f"expected {wanted!r} at character {at}")
    return skip_space(text, at + 1)


def _read_value(text: str, at: int) -> Span:
    try:
        value, end = _decoder.raw_decode(text, at)
    except RecursionError as exc:
        raise ValueError("JSON is nested too deeply") from exc
    return Span(value, at, end)

"""A runtime's chain of plugins as text: put us in and take us out again (cni.md 2.3).

Everything else keeps its bytes, white space and order included: `remove(insert(text))` is `text`.
The reference writes the whole file anew with sorted keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum, auto

from cni.install.errors import ConflistError
from cni.plugin.spans import Span, read_document, read_elements

PLUGIN_TYPE = "istio-cni"
WRAPPED_NAME = "k8s-pod-network"  # the reference's, for a configuration without a name
WRAPPED_VERSION = "0.3.1"

Entry = Mapping[str, object]


class Kind(Enum):
    """What a configuration is."""

    CHAIN = auto()  # a list of plugins
    SINGLE = auto()  # one plugin alone
    BROKEN = auto()  # nothing that a runtime could use


def decode(data: bytes) -> str:
    """Give the text of a file; what is not UTF-8 survives the way back."""
    return data.decode("utf-8", "surrogateescape")


def encode(text: str) -> bytes:
    """Give the bytes of a text that `decode` gave."""
    return text.encode("utf-8", "surrogateescape")


def kind_of(name: str, text: str) -> Kind:
    """Say what a file of this name and content is."""
    try:
        members = read_document(text)
    except ValueError:
        return Kind.BROKEN
    if name.endswith(".conflist"):
        plugins = members["plugins"].value if "plugins" in members else None
        is_chain = isinstance(plugins, list) and plugins and all(map(_has_type, plugins))
        return Kind.CHAIN if is_chain and _text(members, "name") else Kind.BROKEN
    return Kind.SINGLE if _text(members, "type") else Kind.BROKEN


def plugins_of(text: str) -> list[object]:
    """Give the plugins of a chain, decoded.

    Raises:
        ConflistError: the text is not a chain.
    """
    return [element.value for element in _elements(text)]


def our_entries(text: str) -> list[object]:
    """Give the entries of a chain that are ours.

    Raises:
        ConflistError: the text is not a chain.
    """
    return [plugin for plugin in plugins_of(text) if is_ours(plugin)]


def is_ours(plugin: object) -> bool:
    """Whether one plugin's configuration is for our plugin."""
    return isinstance(plugin, dict) and plugin.get("type") == PLUGIN_TYPE


def _has_type(plugin: object) -> bool:
    """Whether the CNI library would take this for one plugin's configuration."""
    return isinstance(plugin, dict) and isinstance(plugin.get("type"), str)


def insert(text: str, entry: Entry) -> str:
    """Add our entry at the end of a chain, unless just this one is there.

    Raises:
        ConflistError: the text is not a chain.
    """
    if our_entries(text) == [dict(entry)]:
        return text
    text = remove(text)
    elements = _elements(text)
    if not elements:
        at = text.index("[", _member(text, "plugins").start) + 1
        return f"{text[:at]}{json.dumps(entry)}{text[at:]}"
    last = elements[-1]
    before = text[: last.start]
    space = before[len(before.rstrip(" \t\r\n")) :]
    # As its neighbours are: each on a line of its own, or all on one.
    pretty = json.dumps(entry, indent=2).replace("\n", space) if "\n" in space else None
    ours = f",{space}{pretty}" if pretty else f", {json.dumps(entry)}"
    return f"{text[: last.end]}{ours}{text[last.end :]}"


def remove(text: str) -> str:
    """Take every entry of ours out of a chain, with the comma that came with it.

    Raises:
        ConflistError: the text is not a chain.
    """
    while True:
        elements = _elements(text)
        ours = [number for number, element in enumerate(elements) if is_ours(element.value)]
        if not ours:
            return text
        number = ours[-1]
        if number > 0:
            start, end = elements[number - 1].end, elements[number].end
        else:
            start = elements[0].start
            end = elements[1].start if len(elements) > 1 else elements[0].end
        text = text[:start] + text[end:]


def wrap(text: str) -> str:
    """Make a chain of a configuration for one plugin, whose text stays as it is.

    Name and version are the plugin's own, as the CNI library has it for such a file. The reference
    gives every chain the same name, which makes address managers that keep books by network forget
    all pods.

    Raises:
        ConflistError: the text is not a configuration.
    """
    members = _document(text)
    name, version = _text(members, "name"), _text(members, "cniVersion")
    head = {"cniVersion": version or WRAPPED_VERSION, "name": name or WRAPPED_NAME}
    return f'{json.dumps(head)[:-1]}, "plugins": [{text.strip()}]}}\n'


def _elements(text: str) -> list[Span]:
    plugins = _member(text, "plugins")
    if not isinstance(plugins.value, list):
        raise ConflistError("plugins is not a list")
    return read_elements(text, plugins.start)


def _member(text: str, key: str) -> Span:
    member = _document(text).get(key)
    if member is None:
        raise ConflistError(f"there are no {key}")
    return member


def _document(text: str) -> dict[str, Span]:
    try:
        return read_document(text)
    except ValueError as exc:
        raise ConflistError(f"not a CNI configuration: {exc}") from exc


def _text(members: dict[str, Span], key: str) -> str:
    member = members.get(key)
    return member.value if member is not None and isinstance(member.value, str) else ""

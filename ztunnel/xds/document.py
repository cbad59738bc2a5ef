"""Compose a YAML document in steps, so that a large one does not stop all connections.

The library composes a document in one call. Here its events become its nodes, some at a time, and
without recursion, so that deep nesting is an error like any other. Nodes weigh ten times what is
made of them, and what is made keeps the memory around it, so the elements of the document's lists
can be taken one by one as they become whole; then there is never more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import yaml

from ztunnel.errors import ResourceError

# A string match inside a policy is 10 deep.
DEPTH_MAX = 32
EVENTS_PER_STEP = 15  # a tenth of a millisecond, with what is made of them
ELEMENT_DEPTH = 2  # a list in the root map

# The loader written in C is ten times faster; both mark lines the same way.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# Is given the key of a list that stands in the root map, and a whole element of it.
Take: TypeAlias = Callable[[yaml.Node, yaml.Node], None]
T = TypeVar("T")


def compose(
    text: str, *, source: str, take: Take | None = None
) -> Generator[None, None, yaml.Node | None]:
    """Return the root of a document, None if there is nothing in it; rest at each step.

    `source` names the text in messages. What `take` is given is not in the document any more.

    Raises:
        ResourceError: it is no YAML, or is nested too deep; the text has the line.
    """
    try:
        return (yield from _compose(_LOADER(text), _Composer(source, take)))
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ResourceError(f"{source}{line}: not YAML: {exc.problem or exc.context}") from exc
    except (yaml.YAMLError, UnicodeError) as exc:
        raise ResourceError(f"{source}: not YAML: {exc}") from exc


def finish(steps: Generator[None, None, T]) -> T:
    """Take all steps at once."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            value: T = done.value
            return value


def _compose(
    loader: Any,  # noqa: ANN401 - what the stubs say of the two loaders does not agree
    composer: _Composer,
) -> Generator[None, None, yaml.Node | None]:
    count = 0
    try:
        while loader.check_event():
            composer.take(loader.get_event(), loader)
            count += 1
            if count % EVENTS_PER_STEP == 0:
                yield
    finally:
        loader.dispose()
    return composer.root


@dataclass(slots=True)
class _Composer:
    """Makes nodes of events; `open` are the collections around the next one."""

    source: str
    take_element: Take | None = None
    root: yaml.Node | None = None
    open: list[yaml.CollectionNode] = field(default_factory=list)
    keys: list[yaml.Node | None] = field(default_factory=list)  # of a map: waiting for its value
    anchors: dict[str, yaml.Node] = field(default_factory=dict)

    def take(self, event: Any, loader: Any) -> None:  # noqa: ANN401 - as in `_compose`
        """Take the next event."""
        start, end = event.start_mark, event.end_mark
        match event:
            case yaml.DocumentStartEvent() if self.root is not None:
                raise self._error(event, "not YAML: more than one document")
            case yaml.ScalarEvent():
                tag = _tag(event, loader, yaml.ScalarNode, event.value)
                node = yaml.ScalarNode(tag, event.value, start, end)
                self._place(node, event.anchor)
                self._give_element()
            case yaml.SequenceStartEvent():
                tag = _tag(event, loader, yaml.SequenceNode, None)
                self._enter(yaml.SequenceNode(tag, [], start), event)
            case yaml.MappingStartEvent():
                tag = _tag(event, loader, yaml.MappingNode, None)
                self._enter(yaml.MappingNode(tag, [], start), event)
            case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                self.open.pop().end_mark = end
                self.keys.pop()
                self._give_element()
            case yaml.AliasEvent():
                self._place(self._named(event), None)
                self._give_element()
            case _:
                pass

    def _enter(self, node: yaml.CollectionNode, event: Any) -> None:  # noqa: ANN401
        self._place(node, event.anchor)
        self.open.append(node)
        self.keys.append(None)
        if len(self.open) > DEPTH_MAX:
            raise self._error(event, f"nested over {DEPTH_MAX} deep")

    def _place(self, node: yaml.Node, anchor: str | None) -> None:
        """Put a node where it belongs."""
        if anchor is not None:
            self.anchors[anchor] = node
        if not self.open:
            self.root = node
            return
        parent, key = self.open[-1], self.keys[-1]
        if isinstance(parent, yaml.SequenceNode):
            parent.value.append(node)
        elif key is None:
            self.keys[-1] = node
        else:
            parent.value.append((key, node))
            self.keys[-1] = None

    def _give_element(self) -> None:
        """Let the element that has just become whole be taken, if it is one of the root's lists."""
        if self.take_element is None or len(self.open) != ELEMENT_DEPTH:
            return
        root, parent = self.open
        if isinstance(root, yaml.MappingNode) and isinstance(parent, yaml.SequenceNode):
            entries = root.value
            if entries and entries[-1][1] is parent:  # else the list is itself a key
                self.take_element(entries[-1][0], parent.value.pop())

    def _named(self, event: Any) -> yaml.Node:  # noqa: ANN401
        """Return the node an alias means; one it is inside of would have no end."""
        node = self.anchors.get(event.anchor)
        if node is None or node in self.open or self._is_given_away(node):
            raise self._error(event, f"not YAML: the alias {event.anchor!r} means nothing complete")
        return node

    def _is_given_away(self, node: yaml.Node) -> bool:
        if self.take_element is None or not isinstance(self.root, yaml.MappingNode):
            return False
        return any(node is value for _, value in self.root.value)

    def _error(self, event: Any, text: str) -> ResourceError:  # noqa: ANN401
        line = f", line {event.start_mark.line + 1}" if event.start_mark else ""
        return ResourceError(f"{self.source}{line}: {text}")


def _tag(event: Any, loader: Any, kind: type[yaml.Node], value: str | None) -> str:  # noqa: ANN401
    if event.tag is None or event.tag == "!":
        return str(loader.resolve(kind, value, event.implicit))
    return str(event.tag)

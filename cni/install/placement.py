"""Which files of the runtime's folder have to change, so that we are in the chain or out of it.

A pure function of what is there. It says the same whether it runs the first time, after somebody
wrote over our work, or after we were killed halfway, because each action alone leaves the runtime
with a chain it can use, and the next pass completes what is missing (cni.md 2.3 and 2.5).

A `.conf`, which holds one plugin, becomes a `.conflist` of the same name and is itself put aside
under a name no runtime reads, so that it can come back byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from cni.install.conflist import (
    Entry,
    Kind,
    decode,
    encode,
    insert,
    is_ours,
    kind_of,
    our_entries,
    plugins_of,
    remove,
    wrap,
)
from cni.install.errors import ConflistError
from cni.install.files import CONF_ENDINGS
from cni.plugin.spans import read_document

SAVED_ENDING = ".istio-cni-saved"
STANDALONE_NAME = "YYY-istio-cni.conf"  # sorts behind what others install


class Mode(StrEnum):
    """How the plugin gets called."""

    CHAINED = "chained"  # inside the primary configuration
    OWN_FILE = "own file"  # in a copy of the primary configuration that sorts before it
    STANDALONE = "standalone"  # a configuration alone, for a meta plugin to call


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the operator wants us."""

    mode: Mode
    conf_name: str = ""  # the primary's, or in standalone mode ours; empty: find it
    own_name: str = "02-istio-cni.conflist"


@dataclass(frozen=True, slots=True)
class Write:
    """A file gets new content, and the permissions of `like` if that exists."""

    name: str
    data: bytes
    like: str


@dataclass(frozen=True, slots=True)
class Move:
    """A file gets another name, over what has that name."""

    name: str
    target: str


@dataclass(frozen=True, slots=True)
class Delete:
    """A file goes away."""

    name: str


Action = Write | Move | Delete
Files = Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do, in this order."""

    actions: tuple[Action, ...] = ()
    waiting_for: str = ""  # what must appear before we can be in the chain; empty if nothing
    warnings: tuple[str, ...] = ()


def plan_install(files: Files, placement: Placement, entry: Entry) -> Plan:
    """Say how to get into the chain.

    Raises:
        ConflistError: what is wanted cannot work with the files there are.
    """
    broken = tuple(
        f"{name} is not a CNI configuration, passed over"
        for name, data in _confs(files)
        if kind_of(name, decode(data)) is Kind.BROKEN
    )
    if placement.mode is Mode.STANDALONE:
        return Plan(tuple(_standalone(files, placement, entry)), "", broken)
    primary = _find_primary(files, placement)
    if primary is None:
        # A file that is being written looks broken, and its owner is not gone.
        gone = () if broken else tuple(_without_own_file(files, placement))
        wanted = placement.conf_name or "a CNI configuration of the primary plugin"
        return Plan(gone, wanted, broken)
    if placement.mode is Mode.OWN_FILE:
        return Plan(tuple(_own_file(files, placement, entry, primary)), "", broken)
    actions = [*_chained(files, entry, primary), *_without_own_file(files, placement)]
    return Plan(tuple(actions), "", broken)


def plan_removal(files: Files, placement: Placement) -> Plan:
    """Say how to leave each chain we are in, so that every file is as we found it."""
    actions = list(_without_own_file(files, placement))
    removed = {action.name for action in actions}
    return Plan((*actions, *_without_entries(_others(files, removed))))


def _others(files: Files, names: set[str]) -> Files:
    return {name: data for name, data in files.items() if name not in names}


def _confs(files: Files) -> list[tuple[str, bytes]]:
    """List what runtimes read, in the order in which they do."""
    return sorted((name, data) for name, data in files.items() if name.endswith(CONF_ENDINGS))


def _find_primary(files: Files, placement: Placement) -> str | None:
    """Find the configuration the runtime would use without us; None if there is none yet."""
    stem = placement.conf_name.removesuffix(".conflist").removesuffix(".conf")
    allowed = {placement.conf_name, f"{stem}.conf", f"{stem}.conflist"} if stem else None
    for name, data in _confs(files):
        is_possible = allowed is None or name in allowed
        if is_possible and name != placement.own_name and _is_others(name, decode(data)):
            return name
    return None


def _is_others(name: str, text: str) -> bool:
    """Whether a configuration has a plugin that is not ours."""
    match kind_of(name, text):
        case Kind.CHAIN:
            return any(not is_ours(plugin) for plugin in plugins_of(text))
        case Kind.SINGLE:
            return not _is_standalone(text)
        case Kind.BROKEN:
            return False


def _is_standalone(text: str) -> bool:
    return is_ours({key: span.value for key, span in read_document(text).items()})


def _chained(files: Files, entry: Entry, primary: str) -> Iterator[Action]:
    text = decode(files[primary])
    if kind_of(primary, text) is Kind.CHAIN:
        yield from _write(files, primary, insert(text, entry), like=primary)
        return
    listed = f"{primary.removesuffix('.conf')}.conflist"
    if listed in files and not _has_us(listed, files[listed]):
        yield Move(listed, listed + SAVED_ENDING)
    # The runtime takes the `.conf` as long as both exist, so the switch is the renaming.
    yield Write(listed, encode(insert(wrap(text), entry)), primary)
    yield Move(primary, primary + SAVED_ENDING)


def _own_file(files: Files, placement: Placement, entry: Entry, primary: str) -> Iterator[Action]:
    if not placement.own_name < primary:
        raise ConflistError(
            f"{placement.own_name} must sort before {primary}, or the runtime never reads it"
        )
    text = remove_from_any(primary, decode(files[primary]))
    yield from _write(files, placement.own_name, insert(text, entry), like=primary)
    # Left by an agent that was told to work inside the primary file.
    yield from _without_entries(_others(files, {placement.own_name}))


def remove_from_any(name: str, text: str) -> str:
    """Give the chain that a configuration of either kind stands for, without us.

    Raises:
        ConflistError: it is neither.
    """
    return remove(text if kind_of(name, text) is Kind.CHAIN else wrap(text))


def _standalone(files: Files, placement: Placement, entry: Entry) -> Iterator[Action]:
    name = placement.conf_name or STANDALONE_NAME
    found = files.get(name)
    if found is not None and _is_others(name, decode(found)):
        raise ConflistError(f"{name} is another plugin's configuration, not ours to replace")
    yield from _without_own_file(files, placement)
    alone = insert('{"plugins": []}', {"cniVersion": "0.3.1", **entry})
    start, end = alone.index("[") + 1, alone.rindex("]")
    yield from _write(files, name, alone[start:end] + "\n", like=name)
    yield from _without_entries(_others(files, {name, placement.own_name}))


def _write(files: Files, name: str, text: str, *, like: str) -> Iterator[Action]:
    data = encode(text)
    if files.get(name) != data:
        yield Write(name, data, like)


def _without_own_file(files: Files, placement: Placement) -> Iterator[Action]:
    """Remove a chain that exists only because of us."""
    name = placement.own_name
    if name in files and _has_us(name, files[name]):
        yield Delete(name)


def _has_us(name: str, data: bytes) -> bool:
    text = decode(data)
    match kind_of(name, text):
        case Kind.CHAIN:
            return bool(our_entries(text))
        case Kind.SINGLE:
            return _is_standalone(text)
        case Kind.BROKEN:
            return False


def _without_entries(files: Files) -> Iterator[Action]:
    """Take us out of every file, and bring back what was put aside for us."""
    unwrapped: set[str] = set()
    for saved in sorted(name for name in files if name.endswith(SAVED_ENDING)):
        original = saved.removesuffix(SAVED_ENDING)
        listed = f"{original.removesuffix('.conf')}.conflist"
        if original.endswith(".conf") and listed in files and _has_us(listed, files[listed]):
            yield from _unwrap(files, original, listed)
            unwrapped.add(listed)
        elif original not in files or original in unwrapped or _is_leftover(files, original):
            yield Move(saved, original)
            unwrapped.add(original)
        else:
            yield Delete(saved)  # its owner has written a newer one
    for name, data in _confs(files):
        if name not in unwrapped and _has_us(name, data):
            yield from _leave(files, name)


def _unwrap(files: Files, original: str, listed: str) -> Iterator[Action]:
    """Undo the making of a list, unless somebody has changed the list since."""
    saved = original + SAVED_ENDING
    ours, theirs = decode(files[listed]), decode(files[saved])
    if _is_others(listed, ours) and not _is_wrapped(ours, theirs):
        yield from _leave(files, listed)
        yield Delete(saved)
        return
    yield Delete(saved) if original in files else Move(saved, original)
    if listed + SAVED_ENDING not in files:
        yield Delete(listed)


def _is_wrapped(chain: str, single: str) -> bool:
    """Whether a chain is what we made of a single plugin, and nobody has changed it since."""
    return plugins_of(remove(chain)) == plugins_of(wrap(single))


def _is_leftover(files: Files, name: str) -> bool:
    """Whether a removal was killed between bringing back a single plugin and deleting its chain."""
    single = f"{name.removesuffix('.conflist')}.conf"
    return (
        name.endswith(".conflist")
        and _has_us(name, files[name])
        and single in files
        and kind_of(single, decode(files[single])) is Kind.SINGLE
        and _is_wrapped(decode(files[name]), decode(files[single]))
    )


def _leave(files: Files, name: str) -> Iterator[Action]:
    text = decode(files[name])
    if _is_others(name, text) and not _is_leftover(files, name):
        yield Write(name, encode(remove(text)), name)
    else:
        yield Delete(name)

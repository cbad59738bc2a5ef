"""What `ztunnel-cni-agent run` takes on the command line: the reference's flags that we have.

Its charts start the agent with them. Everything else is set by environment variables (`config`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn, Self, TypeVar

from cni.agent.overrides import parse_bool
from cni.agent.scopes import LevelList
from ztunnel.errors import ConfigError
from ztunnel.model.network import Port, parse_ip, parse_port

T = TypeVar("T")

CONTROLZ_PORT = 9876
LOCALHOST = "localhost"
_LOOPBACK = "127.0.0.1"
# The reference's for other ways to write, which we lack: taken, so that its charts work.
_WITHOUT_EFFECT = ("--log_target", "--log_caller", "--log_stacktrace_level")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFlags:
    """What was said, and the words that no flag has taken."""

    controlz_host: str
    controlz_port: Port  # 0: any that is free
    levels: LevelList
    log_json: bool
    unknown: tuple[str, ...]

    @classmethod
    def parse(cls, words: Sequence[str]) -> Self:
        """Read the words after `run`.

        Raises:
            ConfigError: a flag has a wrong value, or none.
        """
        parser = _Parser(add_help=False, allow_abbrev=False)
        parser.add_argument("--ctrlz_port", default=str(CONTROLZ_PORT))
        parser.add_argument("--ctrlz_address", default=LOCALHOST)
        parser.add_argument("--log_output_level", default="")
        parser.add_argument("--log_as_json", nargs="?", default="false", const="true")
        for name in _WITHOUT_EFFECT:
            parser.add_argument(name)
        said, unknown = parser.parse_known_args(list(words))
        return cls(
            controlz_host=_read("ctrlz_address", said.ctrlz_address, _loopback),
            controlz_port=_read("ctrlz_port", said.ctrlz_port, parse_port),
            levels=_read("log_output_level", said.log_output_level, LevelList.parse),
            log_json=_read("log_as_json", said.log_as_json, parse_bool),
            unknown=tuple(unknown),
        )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _read(name: str, text: str, parse: Callable[[str], T]) -> T:
    try:
        return parse(text)
    except ValueError as exc:
        raise ConfigError(f"invalid flag --{name}={text[:80]!r}: {exc}") from exc


def _loopback(text: str) -> str:
    with suppress(ValueError):
        ip = parse_ip(_LOOPBACK if text == LOCALHOST else text)
        if ip.is_loopback:
            return str(ip)
    raise ValueError(
        "not a loopback address, and whoever reaches ControlZ may change the log; "
        "from elsewhere use kubectl port-forward"
    )

"""The command `ztunnel-cni-agent`."""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version as package_version
from pathlib import Path
from urllib.parse import quote

import msgspec
import structlog
import trio

from cni.agent.app import Agent
from cni.agent.capabilities import held_capabilities, require_capabilities
from cni.agent.config import AgentConfig
from cni.agent.controlz import serve_controlz
from cni.agent.flags import CONTROLZ_PORT, LOCALHOST, RunFlags
from cni.agent.operators import CONTROL_SOCKET
from cni.agent.pod_netns import NodeView
from cni.agent.scopes import EVERY_SCOPE, LEVELS, SCOPES, LogScopes
from cni.agent.status import AgentStatus, show
from ztunnel.errors import ConfigError
from ztunnel.linux import netns
from ztunnel.linux.netns import PodNetns
from ztunnel.telemetry import log as logs

USAGE = f"""\
usage: ztunnel-cni-agent [COMMAND]

commands:
  run                   run the node agent, configured by environment variables (the default)
  status                list the pods of this node: what became of them, and why
  rules --pod NS/NAME   print the redirection rules of a pod, and whether the kernel has them
  version               print the version
  help                  print this text

`status` and `rules` ask the running agent by its socket in the folder CNI_AGENT_RUN_DIR.

options of `run`, which is also meant if they come first:
  --log_output_level SCOPE:LEVEL,...
                        levels of the log, above RUST_LOG; scopes: {", ".join(SCOPES)},
                        {EVERY_SCOPE}; levels: {", ".join(LEVELS)}; a level alone is for default
  --log_as_json         write the log as JSON, as LOG_FORMAT=json does
  --ctrlz_port PORT     where levels are read and changed at run time (default {CONTROLZ_PORT}),
                        GET / there says how; 0 is any free port, and the log names it
  --ctrlz_address IP    the loopback address of it (default {LOCALHOST})
  --log_target, --log_caller, --log_stacktrace_level VALUE
                        are taken, and have no effect
"""
EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
DEFAULT_RUN_DIR = "/var/run/istio-cni"
CONTROL_SECONDS = 10.0
_READ_BYTES = 65536
_OK = 200

log = structlog.get_logger(component="agent")


def main(words: Sequence[str], env: Mapping[str, str]) -> int:
    """Run the command that `words` name; return the exit status."""
    commands: dict[str, Callable[[Sequence[str], Mapping[str, str]], int]] = {
        "run": run,
        "status": status,
        "rules": rules,
        "version": version,
        "--version": version,
        "help": help_,
        "--help": help_,
        "-h": help_,
    }
    flagged = not words or (words[0].startswith("--") and words[0] not in commands)
    command, rest = ("run", words) if flagged else (words[0], words[1:])
    chosen = commands.get(command)
    if chosen is None:
        sys.stderr.write(f"ztunnel-cni-agent: unknown command {command!r}\n\n{USAGE}")
        return EXIT_FAILED
    if {"-h", "--help"} & set(rest) and chosen is not rules:
        return help_(rest, env)
    return chosen(rest, env)


def refuse(command: str, words: Sequence[str]) -> int:
    """Say which words a command does not know."""
    unknown = " ".join(words)
    sys.stderr.write(f"ztunnel-cni-agent {command}: unknown words: {unknown}\n\n{USAGE}")
    return EXIT_USAGE


def help_(words: Sequence[str], env: Mapping[str, str]) -> int:  # noqa: ARG001
    """Print the usage."""
    sys.stdout.write(USAGE)
    return EXIT_OK


def version(words: Sequence[str], env: Mapping[str, str]) -> int:  # noqa: ARG001
    """Print the version."""
    if words:
        return refuse("version", words)
    sys.stdout.write(f"ztunnel-cni-agent {package_version('ztunnel')}\n")
    return EXIT_OK


def run(words: Sequence[str], env: Mapping[str, str]) -> int:
    """Run the agent until SIGTERM or SIGINT."""
    code = EXIT_OK
    try:
        flags = RunFlags.parse(words)
        if flags.unknown:
            return refuse("run", flags.unknown)
        config = AgentConfig.from_env(env)
        logs.PIPELINE.set_up(config.log_filter, json=config.log_json or flags.log_json)
        flags.levels.apply(LogScopes(logs.PIPELINE))
        if level := flags.levels.plugin_level():
            env = {**env, "PLUGIN_LOG_LEVEL": level}
        _raise_descriptor_limit()
        with _host_netns(config) as host:
            require_capabilities(held_capabilities())
            trio.run(_run, config, host, env if config.installs else None, flags)
    except* ConfigError as group:
        for line in _texts(group):
            sys.stderr.write(f"ztunnel-cni-agent: {line}\n")
        code = EXIT_FAILED
    return code


def status(words: Sequence[str], env: Mapping[str, str]) -> int:
    """Print the pods of this node."""
    if words:
        return refuse("status", words)
    code, body = ask(env, "/status")
    if code != _OK:
        sys.stderr.write(body)
        return EXIT_FAILED
    sys.stdout.write(show(msgspec.json.decode(body, type=AgentStatus)))
    return EXIT_OK


def rules(words: Sequence[str], env: Mapping[str, str]) -> int:
    """Print a pod's rules."""
    parser = argparse.ArgumentParser(prog="ztunnel-cni-agent rules")
    parser.add_argument("--pod", required=True, metavar="NAMESPACE/NAME")
    options = parser.parse_args(list(words))
    code, body = ask(env, f"/rules?pod={quote(options.pod)}")
    (sys.stdout if code == _OK else sys.stderr).write(body)
    return EXIT_OK if code == _OK else EXIT_FAILED


def ask(env: Mapping[str, str], target: str) -> tuple[int, str]:
    """Ask the running agent; the status is 0 if it does not answer, with the reason as text."""
    path = Path(env.get("CNI_AGENT_RUN_DIR", DEFAULT_RUN_DIR)) / CONTROL_SOCKET
    answer = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(CONTROL_SECONDS)
        try:
            sock.connect(str(path))
            sock.sendall(f"GET {target} HTTP/1.1\r\nHost: agent\r\n\r\n".encode())
            while piece := sock.recv(_READ_BYTES):
                answer += piece
        except OSError as exc:
            return 0, f"no node agent answers at {path}: {exc}\n"
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(maxsplit=2)
    code = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
    return code, body.decode("utf-8", "replace")


async def _run(
    config: AgentConfig, host: PodNetns, env: Mapping[str, str] | None, flags: RunFlags
) -> None:
    if flags.levels.unknown:
        log.warning("no such scopes of the log", scopes=", ".join(flags.levels.unknown))
    node = node_view(config, host)
    rng = random.Random()  # noqa: S311 - it only spreads delays
    agent = Agent(config, host=host, node=node, rng=rng, env=env)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(logs.PIPELINE.writer.run)
            scopes = LogScopes(logs.PIPELINE)
            nursery.start_soon(serve_controlz, flags.controlz_host, flags.controlz_port, scopes)
            nursery.start_soon(agent.run)
            await anext(aiter(signals))
            await agent.release()
            nursery.cancel_scope.cancel(reason="asked to stop")
        await agent.farewell()


def node_view(config: AgentConfig, host: PodNetns) -> NodeView:
    """Find out how we see the node: from a container with its folders mounted, or directly."""
    mounted = config.host_root / "proc"
    proc = mounted if mounted.is_dir() else Path("/proc")
    first = proc / "1"
    try:
        status = (first / "ns/net").stat()
        identity = netns.NetnsId(status.st_ino, status.st_dev)
    except OSError:
        identity = host.id
    roots = config.host_root, first / "root", Path("/")
    return NodeView(proc, roots, identity)


def _host_netns(config: AgentConfig) -> PodNetns:
    switched = config.host_root / "proc/1/ns/net"
    path = switched if config.switch_to_host_netns else Path("/proc/self/ns/net")
    try:
        return PodNetns.open(path)
    except OSError as exc:
        raise ConfigError(f"cannot open the host's network namespace: {exc}") from exc


def _raise_descriptor_limit() -> None:
    """One per pod and a few per connection; the usual soft limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _texts(group: BaseExceptionGroup[BaseException]) -> list[str]:
    texts: list[str] = []
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            texts += _texts(error)
        else:
            texts += str(error).splitlines()
    return texts


def environment() -> Mapping[str, str]:
    """Give the process's environment."""
    return os.environ

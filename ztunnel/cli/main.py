"""Which command was asked for. Imports are late, so that `version` need not load the proxy."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

USAGE = """\
usage: ztunnel [COMMAND]

commands:
  proxy [NAME]   run the node proxy, configured by environment variables (the default)
  demo           guided tour: a mesh of two nodes on this machine (needs root)
  version        print the version
  help           print this text

`ztunnel COMMAND --help` tells more about a command.
"""

PROXY_USAGE = """\
usage: ztunnel proxy [NAME]

Run the node proxy until SIGTERM or SIGINT. NAME is accepted and ignored, as the reference's chart
passes it. Settings come from environment variables only, with the reference's names; the most
important ones:
  PROXY_MODE           shared (default: serve the pods the node agent hands over) or dedicated
  INPOD_UDS            the node agent's socket (default /var/run/ztunnel/ztunnel.sock)
  PROXY_WORKLOAD_INFO  in dedicated mode: whom we serve, as namespace/name/account
  XDS_ADDRESS          the control plane (default https://localhost:15012, in a cluster istiod's;
                       empty: none)
  XDS_ON_DEMAND        true: fetch what connections ask for; needs ISTIO_META_DNS_CAPTURE=false
  LOCAL_XDS_PATH       a YAML file with workloads, services and policies, followed as it changes
  CA_ADDRESS           who signs certificates (the same default)
  FAKE_CA              true: certificates of an embedded development CA
  CRL_PATH             revocation lists, followed as they change
  NODE_NAME, NETWORK   who we are
  UNSTABLE_ENABLE_SOCKS5  true: take SOCKS5 on the pod's loopback, port 15080
  ZTUNNEL_WORKER_THREADS  data-path processes in shared mode: a number, 50% of the CPUs, 0 for all
                       of them (default 1)
  ZTUNNEL_LOAD_BALANCING  random (default) or least-connections, among equal endpoints
  RUST_LOG, LOG_FORMAT log levels; plain or json
"""

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2  # as argparse, which reads the words of `demo`


def main(words: Sequence[str]) -> int:
    """Run the command that `words` name; return the exit status."""
    command, *rest = words or ("proxy",)
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "proxy": proxy,
        "demo": demo,
        "worker": worker,  # not for people: see `cli.worker`
        "version": version,
        "--version": version,
        "help": help_,
        "--help": help_,
        "-h": help_,
    }
    chosen = commands.get(command)
    if chosen is None:
        sys.stderr.write(f"ztunnel: unknown command {command!r}\n\n{USAGE}")
        return EXIT_FAILED
    return chosen(rest)


def proxy(words: Sequence[str]) -> int:
    """Run the node proxy."""
    if {"-h", "--help"} & set(words):
        sys.stdout.write(PROXY_USAGE)
        return EXIT_OK
    if unknown := [word for word in words if word.startswith("-")] or words[1:]:
        return refuse("proxy", unknown, PROXY_USAGE)
    from ztunnel.cli.proxy import run_proxy  # noqa: PLC0415 - loads trio, ssl and the rest

    return run_proxy()


def worker(words: Sequence[str]) -> int:
    """Run one of several data paths; its parent starts it."""
    if words:
        return refuse("worker", words, USAGE)
    from ztunnel.cli.worker import run_worker_process  # noqa: PLC0415 - loads trio, ssl and more

    return run_worker_process()


def demo(words: Sequence[str]) -> int:
    """Run the guided tour."""
    from ztunnel.cli.demo import run_demo  # noqa: PLC0415 - loads trio, ssl and the rest

    return run_demo(words)


def version(words: Sequence[str]) -> int:
    """Print the version."""
    if {"-h", "--help"} & set(words):
        return help_(words)
    if words:
        return refuse("version", words, USAGE)
    from importlib.metadata import version as package_version  # noqa: PLC0415 - slow

    sys.stdout.write(f"ztunnel {package_version('ztunnel')}\n")
    return EXIT_OK


def help_(words: Sequence[str]) -> int:  # noqa: ARG001
    """Print the usage."""
    sys.stdout.write(USAGE)
    return EXIT_OK


def refuse(command: str, words: Sequence[str], usage: str) -> int:
    """Say which words a command does not know, and which it does."""
    sys.stderr.write(f"ztunnel {command}: unknown words: {' '.join(words)}\n\n{usage}")
    return EXIT_USAGE

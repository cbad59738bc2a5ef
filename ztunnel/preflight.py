"""What is settled before the first task runs: the static configuration, limits, privileges."""

from __future__ import annotations

import resource
import socket
from typing import TYPE_CHECKING

from ztunnel.errors import ConfigError, PrivilegeError, ResourceError
from ztunnel.linux import sockopt
from ztunnel.linux.netns import PodNetns
from ztunnel.state.store import Update
from ztunnel.telemetry.log import get
from ztunnel.xds.local import parse_local_config

if TYPE_CHECKING:
    from ztunnel.config import Config

log = get("app")


def read_static_config(config: Config) -> Update:
    """Read the static configuration, if there is one.

    Raises:
        ConfigError: the file cannot be read, or something in it is wrong (line and field named).
    """
    source, text = "LOCAL_XDS", config.local_xds
    if config.local_xds_path is not None:
        source = str(config.local_xds_path)
        try:
            text = config.local_xds_path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"LOCAL_XDS_PATH={source}: cannot be read: {error}; point it to a YAML file"
            ) from error
    if text is None:
        if config.xds_address is None:
            log.warning(
                "no workload, service or policy will be known",
                reason="XDS_ADDRESS is empty, and neither LOCAL_XDS_PATH nor LOCAL_XDS is set",
            )
        return Update()
    try:
        return parse_local_config(text, source=source)
    except ResourceError as error:
        raise ConfigError(str(error)) from error


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open files to the hard one (dataplane.md 1.2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        log.info("file descriptor limit raised", soft=soft, hard=hard)


def prove_privileges(config: Config) -> None:
    """Show that we can enter namespaces and mark packets; without it no pod can be served.

    Raises:
        PrivilegeError: a capability is missing.
    """
    try:
        with PodNetns.open("/proc/self/ns/net") as own:
            own.call(lambda: None)
    except OSError as error:
        raise PrivilegeError(
            f"cannot enter a network namespace: {error}; shared mode needs CAP_SYS_ADMIN "
            "(run as root, or set PROXY_MODE=dedicated)"
        ) from error
    try:
        with socket.socket() as probe:
            sockopt.set_mark(probe, config.packet_mark or 1)
    except OSError as error:
        raise PrivilegeError(
            f"cannot set a packet mark: {error}; shared mode needs CAP_NET_ADMIN "
            "(run as root, or set PROXY_MODE=dedicated)"
        ) from error

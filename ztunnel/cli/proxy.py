"""`ztunnel proxy`: read the configuration, set up logging, run, give the exit status."""

from __future__ import annotations

import os

import trio

from ztunnel.app import run
from ztunnel.cli.complaint import complain
from ztunnel.config import Config
from ztunnel.errors import ConfigError, first
from ztunnel.telemetry.log import PIPELINE, get


def run_proxy() -> int:
    """Run the node proxy to its end; 0 after a drain, 1 if it could not start."""
    status = 0
    try:
        config = Config.from_env(os.environ)
        PIPELINE.set_up(config.log_filter, json=config.log_json)
        log = get("app")
        for warning in config.warnings:
            log.warning(warning)
        trio.run(run, config)
    except* ConfigError as group:
        status = complain(first(group))
    return status

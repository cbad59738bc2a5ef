"""`ztunnel proxy`: read the configuration, set up logging, run, give the exit status."""

from __future__ import annotations

import os
import sys

import trio

from ztunnel.app import run
from ztunnel.config import Config
from ztunnel.errors import ConfigError
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


def first(error: BaseException) -> BaseException:
    """Return the first error of a group, however deep it lies."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def complain(error: BaseException) -> int:
    """Say what stopped the start, a line for each problem."""
    PIPELINE.writer.flush(1.0)
    for line in str(error).splitlines():
        sys.stderr.write(f"ztunnel: {line}\n")
    return 1

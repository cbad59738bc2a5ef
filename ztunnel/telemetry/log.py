"""The log: structlog loggers by target, a level for each that can change at run time.

`log = get("xds::client")` at module level, then `log.info("stream established", peer=address)`: the
event is a constant phrase, the values are keywords. `log.bind(...)` adds fields to every line,
`log.span("inbound", id=...)` encloses them in a span as the reference prints it. A call below the
level of its target costs about 0.1 us.

Loggers are made while modules are imported, before anyone knows the settings, so there is one
`Pipeline` in the process, and `set_up` tells it the filter and the format. Until then it writes
plain lines at `info`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, MutableMapping
from time import time_ns
from typing import Any, Self

import structlog
from structlog.typing import WrappedLogger

from ztunnel.errors import ConfigError
from ztunnel.telemetry.filter import Level, LogFilter
from ztunnel.telemetry.lines import Span, Timestamps, json_line, plain_line
from ztunnel.telemetry.writer import LineWriter

DEFAULT_FILTER = "info"

# Plain numbers: looking up a member of an enum would double the price of a call that logs nothing.
_TRACE, _DEBUG, _INFO, _WARN, _ERROR = (
    level.value for level in (Level.TRACE, Level.DEBUG, Level.INFO, Level.WARN, Level.ERROR)
)
_SPANS = "_spans"
_LABELS = {"warning": "warn", "exception": "error"}


class Sink:
    """Where the lines of one target go; shared by all its loggers, bound or not."""

    __slots__ = ("_pipeline", "target", "threshold")

    def __init__(self, pipeline: Pipeline, target: str, threshold: Level) -> None:
        self.target = target
        self.threshold = int(threshold)
        self._pipeline = pipeline

    def write(self, line: str) -> None:
        """Pass a finished line on."""
        self._pipeline.writer.write(line)

    def is_enabled(self, level: Level) -> bool:
        """Whether lines of that level are wanted."""
        return level >= self.threshold

    trace = debug = info = warning = error = exception = write


class Logger(structlog.BoundLoggerBase):
    """Logs events of one target."""

    _logger: Sink

    def trace(self, event: str, **fields: object) -> None:
        """Log detail that only a debugging session wants."""
        if self._logger.threshold <= _TRACE:
            self._proxy_to_logger("trace", event, **fields)

    def debug(self, event: str, **fields: object) -> None:
        """Log detail of one connection."""
        if self._logger.threshold <= _DEBUG:
            self._proxy_to_logger("debug", event, **fields)

    def info(self, event: str, **fields: object) -> None:
        """Log a step in the life of something that lives long."""
        if self._logger.threshold <= _INFO:
            self._proxy_to_logger("info", event, **fields)

    def warning(self, event: str, **fields: object) -> None:
        """Log that something is degraded and will be retried."""
        if self._logger.threshold <= _WARN:
            self._proxy_to_logger("warning", event, **fields)

    def error(self, event: str, **fields: object) -> None:
        """Log that a human must act."""
        if self._logger.threshold <= _ERROR:
            self._proxy_to_logger("error", event, **fields)

    def exception(self, event: str, **fields: object) -> None:
        """Log an error with the traceback of the exception being handled."""
        if self._logger.threshold <= _ERROR:
            fields.setdefault("exc_info", True)
            self._proxy_to_logger("exception", event, **fields)

    def is_enabled(self, level: Level) -> bool:
        """Whether lines of that level are wanted, for callers with costly fields."""
        return level >= self._logger.threshold

    def span(self, name: str, **fields: object) -> Self:
        """Give a logger whose lines are inside the span `name`."""
        spans: tuple[Span, ...] = self._context.get(_SPANS, ())
        return self.bind(**{_SPANS: (*spans, (name, fields))})


class Pipeline:
    """Filter, format and destination of all lines."""

    def __init__(self, *, writer: LineWriter, clock_ns: Callable[[], int] = time_ns) -> None:
        self.writer = writer
        self.writer.report = self._loss_line
        self.json = False
        self.clock_ns = clock_ns
        self.timestamps = Timestamps()
        self.filter = self._start_filter = LogFilter.parse(DEFAULT_FILTER)
        self.processors: list[structlog.typing.Processor] = [
            structlog.contextvars.merge_contextvars,
            structlog.processors.format_exc_info,
            self._render,
        ]
        self._sinks: dict[str, Sink] = {}

    def get(self, target: str) -> Logger:
        """Make a logger; `target` is a module path without `ztunnel::`, or `access`."""
        return Logger(self.sink(target), self.processors, {})

    def sink(self, target: str) -> Sink:
        """Give the one sink of `target`."""
        if target not in self._sinks:
            self._sinks[target] = Sink(self, target, self.filter.level_for(target))
        return self._sinks[target]

    def set_up(self, filter_text: str, *, json: bool) -> None:
        """Take the operator's choice.

        Raises:
            ConfigError: the filter is not one.
        """
        try:
            start = LogFilter.parse(filter_text)
        except ValueError as exc:
            raise ConfigError(f"invalid env var RUST_LOG={filter_text} ({exc})") from exc
        self.json = json
        self._start_filter = start
        self._use(start)

    def change(self, filter_text: str = "", *, reset: bool = False) -> LogFilter:
        """Add directives, after going back to the start filter if `reset`; return the result.

        Raises:
            ValueError: the text is not a filter; nothing has changed.
        """
        more = LogFilter.parse(filter_text)
        self._use((self._start_filter if reset else self.filter).merged(more))
        return self.filter

    def cover(self, target: str, level: Level) -> None:
        """Log `target` and all below at one level; the empty target is what nobody names."""
        self._use(self.filter.covered(target, level))

    def now(self) -> str:
        """Print the time of a line."""
        return self.timestamps.show(self.clock_ns())

    def _use(self, new: LogFilter) -> None:
        self.filter = new
        for sink in self._sinks.values():
            sink.threshold = int(new.level_for(sink.target))

    def _render(self, sink: WrappedLogger, method: str, event: MutableMapping[str, Any]) -> str:
        message, spans = event.pop("event"), event.pop(_SPANS, ())
        line = json_line if self.json else plain_line
        level = _LABELS.get(method, method)
        return line(self.now(), level, sink.target, str(message), event.items(), spans)

    def _loss_line(self, lines: int) -> str:
        line = json_line if self.json else plain_line
        return line(self.now(), "warn", "telemetry", "log lines dropped", [("lines", lines)])


PIPELINE = Pipeline(writer=LineWriter())


def get(target: str) -> Logger:
    """Make a logger of the process's pipeline."""
    return PIPELINE.get(target)


def _sink_of(*args: str) -> Sink:
    """Give the sink of the named target, or else of the module whose first call this is."""
    if args:
        return PIPELINE.sink(args[0])
    frame = sys._getframe(1)  # noqa: SLF001 the documented way to the caller
    while frame.f_back and frame.f_globals["__name__"].partition(".")[0] == "structlog":
        frame = frame.f_back
    module = str(frame.f_globals["__name__"]).removeprefix("ztunnel.")
    return PIPELINE.sink(module.replace(".", "::"))


# `structlog.get_logger()` works as well, and so does `structlog.testing.capture_logs`: it changes
# this list of processors in place, which is why caching the loggers does not hide them from it.
structlog.configure(
    processors=PIPELINE.processors,
    wrapper_class=Logger,
    logger_factory=_sink_of,
    context_class=dict,
    cache_logger_on_first_use=True,
)

"""Readiness: what must have happened before we say ready (dns-and-observability.md 5)."""

from __future__ import annotations

STATE_MANAGER = "state manager"  # until the first xDS sync
WORKLOAD_MANAGER = "workload proxy manager"  # until the node agent's snapshot is served
PROXY = "proxy"
DNS_PROXY = "dns proxy"
WORKERS = "workers"  # while no data-path process is up, where there are several


class Readiness:
    """The tasks that keep us from being ready."""

    def __init__(self, *tasks: str) -> None:
        self._pending = set(tasks)

    @property
    def is_ready(self) -> bool:
        """Whether nothing is pending."""
        return not self._pending

    @property
    def pending(self) -> tuple[str, ...]:
        """The pending tasks, sorted."""
        return tuple(sorted(self._pending))

    def register(self, task: str) -> None:
        """Wait for `task` from now on; also for a task that was done and is not any more."""
        self._pending.add(task)

    def clear(self, task: str) -> int | None:
        """Note that `task` is done; return how many are left, None if it was not pending.

        The caller logs a number: each task that is done, at info.
        """
        if task not in self._pending:
            return None
        self._pending.discard(task)
        return len(self._pending)

    def text(self) -> str:
        """Say the state as the probe's answer does."""
        return "ready\n" if self.is_ready else f"not ready, pending: {', '.join(self.pending)}\n"

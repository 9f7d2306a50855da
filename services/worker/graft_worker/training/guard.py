"""The guard: nothing is computed or written after the lease's deadline, and SIGTERM is obeyed between microbatches."""

from __future__ import annotations

import signal
from pathlib import Path

from graft_shared.clock import boottime
from graft_worker.protocol import DEADLINE_NAME, read_deadline


class LeaseOver(Exception):
    """The deadline has passed: someone else may own the job, so leave at once and write nothing."""


class ToldToStop(Exception):
    """SIGTERM came: save what is done and leave."""


class Guard:
    """Asked before every microbatch, update and checkpoint."""

    def __init__(self) -> None:
        self._workdir: Path | None = None
        self._told = False
        signal.signal(signal.SIGTERM, self._hear)

    @property
    def is_told_to_stop(self) -> bool:
        """Whether SIGTERM came."""
        return self._told

    def watch_lease(self, workdir: Path) -> None:
        """From now on obey the deadline that is written there; a run without a lease (a benchmark) has none."""
        self._workdir = workdir if (workdir / DEADLINE_NAME).exists() else None

    def check_lease(self) -> None:
        """Raise LeaseOver when the deadline has passed."""
        if self._workdir is not None and boottime() > read_deadline(self._workdir):
            raise LeaseOver

    def check(self) -> None:
        """Raise LeaseOver or ToldToStop."""
        self.check_lease()
        if self.is_told_to_stop:
            raise ToldToStop

    def _hear(self, *_: object) -> None:
        self._told = True

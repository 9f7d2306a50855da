"""The guard: nothing is computed or written after the lease's deadline, and SIGTERM is obeyed between microbatches."""

from __future__ import annotations

import signal
from pathlib import Path

from graft_shared.clock import boottime
from graft_worker.protocol import DEADLINE_NAME, DEADLINE_SHARE, read_deadline

# Of a lease: where microbatches take long, the guard says so before the deadline, but not so long before it that a
# heartbeat that came in time (a quarter of a lease after the last) could have been too late.
LARGEST_MARGIN_SHARE = 0.5


class LeaseOver(Exception):
    """The deadline has passed: someone else may own the job, so leave at once and write nothing."""


class ToldToStop(Exception):
    """SIGTERM came: save what is done and leave."""


class Guard:
    """Asked before every microbatch, update and checkpoint.

    What it allows must be over before the lease is: it keeps twice the longest microbatch or update that it has seen
    between two questions free before the lease's end, and at least what lies between the deadline and that end.
    """

    def __init__(self) -> None:
        self._workdir: Path | None = None
        self._lease_seconds = 0.0
        self._told = False
        self._asked_at: float | None = None  # None while what is done is not measured
        self._longest = 0.0
        signal.signal(signal.SIGTERM, self._hear)

    @property
    def is_told_to_stop(self) -> bool:
        """Whether SIGTERM came."""
        return self._told

    def watch_lease(self, workdir: Path, lease_seconds: float) -> None:
        """From now on obey the deadline that is written there; a run without a lease (a benchmark) has none."""
        self._workdir = workdir if (workdir / DEADLINE_NAME).exists() else None
        self._lease_seconds = lease_seconds

    def measure_from_here(self) -> None:
        """From here on nothing but microbatches and updates is done between two questions; what came before is none."""
        self._asked_at = boottime()

    def check_lease(self) -> None:
        """Raise LeaseOver when the deadline has passed, or what is long could last beyond the lease."""
        if self._workdir is None:
            return
        deadline = read_deadline(self._workdir)  # before the clock: whoever is frozen between the two may not go on
        if boottime() > deadline - self._earlier():
            raise LeaseOver

    def check(self) -> None:
        """Raise LeaseOver or ToldToStop."""
        if self._asked_at is not None:
            asked_before, self._asked_at = self._asked_at, boottime()
            self._longest = max(self._longest, self._asked_at - asked_before)
        self.check_lease()
        if self.is_told_to_stop:
            raise ToldToStop

    def _earlier(self) -> float:
        """How long before the deadline to leave, in seconds."""
        margin = min(2 * self._longest, LARGEST_MARGIN_SHARE * self._lease_seconds)
        return max(0.0, margin - (1 - DEADLINE_SHARE) * self._lease_seconds)

    def _hear(self, *_: object) -> None:
        self._told = True

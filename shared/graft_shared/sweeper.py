"""Sweeping: what no row needs any more is removed from the bucket, by any number of reconcilers at once.

Only what belongs to a row of this database is ever looked at: another service's objects in the same bucket, or those of
jobs that a database restored from a backup does not know, are left alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice

from graft_shared.artifacts import JobObject, job_prefix, read_job_key
from graft_shared.buckets import Bucket
from graft_shared.errors import NeighbourUnavailable
from graft_shared.jobs import TERMINAL_STATES, Job, JobState
from graft_shared.logs import log_event
from graft_shared.metrics import REMOVED_OBJECTS, counted_pass
from graft_shared.store import UPLOAD_LIFE, DueSweep, Files, Leases, Sweeps

JOBS_PER_PASS = 50
UPLOADS_PER_PASS = 50
OBJECTS_PER_JOB = 500  # removed in one go; the rest when the job is due again
UNFINISHED_EVERY_SECONDS = 3600.0

logger = logging.getLogger(__name__)


def leftovers(job: Job, keys: Iterable[str]) -> list[str]:
    """Of a job's objects those that nothing will need again.

    `keys` must have been listed before `job` was read: then whatever the row does not point to, and does not belong to
    the epoch that runs, was written by an epoch that is fenced off and can never make it the row's. No clock decides.

    Kept are, while the job lives, its prepared data, its committed checkpoint, every log, and all that the running
    epoch has written but checkpoints behind the committed one. When it has ended: the adapter, the last log, and the
    last checkpoint, whatever the end: it is all there is of a failed or cancelled job's training. Of a job that its
    tenant has deleted nothing is kept.
    """
    found = [made for key in keys if (made := read_job_key(job.tenant, job.id, key)) is not None]
    last_log = max((made.epoch for made in found if made.is_log), default=0)
    return [made.key for made in found if not _is_needed(job, made, last_log)]


def _is_needed(job: Job, made: JobObject, last_log: int) -> bool:
    if job.deleted_at is not None:
        return False
    ended = job.state in TERMINAL_STATES
    if made.epoch > job.epoch or made.key in _pointed_at(job):
        return True
    if job.adapter is not None and made.key.startswith(job.adapter["prefix"]):
        return True
    if made.is_log:
        return not ended or made.epoch == last_log
    if job.state is JobState.RUNNING and made.epoch == job.epoch:
        committed = job.checkpoint.step if job.checkpoint is not None else 0
        return made.checkpoint_step is None or made.checkpoint_step >= committed
    return False


def _pointed_at(job: Job) -> set[str]:
    keys = {job.checkpoint.object.key} if job.checkpoint is not None else set()
    if job.state not in TERMINAL_STATES:
        prepared = job.prepared or {}
        keys |= {prepared[part]["key"] for part in ("train", "validation", "adapter") if part in prepared}
    return keys


@dataclass
class Sweeper:
    """One pass at a time, each a bounded slice of what is due.

    Args:
        grace: How long after a job's end the last look at it is: longer than any lease, so that what a worker that was
            cut off still wrote is found by then.
    """

    sweeps: Sweeps
    leases: Leases
    files: Files
    bucket: Bucket
    grace: timedelta
    _unfinished_at: float = field(default=0.0, init=False)  # when to look for these next, monotonic

    def sweep(self, stop: threading.Event) -> None:
        """Remove what is due; idempotent, and harmless beside other sweepers.

        Raises:
            NeighbourUnavailable: Bucket or database are away; what was taken is due again after a while.
        """
        for due in self.sweeps.take(limit=JOBS_PER_PASS):
            if stop.is_set():
                return
            self._sweep_job(due)
        for key in self.files.lost_uploads(limit=UPLOADS_PER_PASS):
            self.bucket.delete(key)
            self.files.forget_upload(key)
            REMOVED_OBJECTS.inc()
            log_event(logger, "lost_upload_removed", key=key)
        if not stop.is_set() and time.monotonic() >= self._unfinished_at:
            self._remove_unfinished()

    def run(self, every: timedelta, stop: threading.Event) -> None:
        """Sweep until `stop`; a neighbour that is away is waited for."""
        while not stop.wait(every.total_seconds()):
            try:
                with counted_pass("sweep"):
                    self.sweep(stop)
            except NeighbourUnavailable as error:
                log_event(logger, "sweep_postponed", level=logging.WARNING, reason=error.message)

    def _sweep_job(self, due: DueSweep) -> None:
        keys = list(self.bucket.list(job_prefix(due.tenant, due.job_id)))
        job = self.leases.read(due.job_id)  # after the listing: see `leftovers`
        if job is None:
            return
        garbage: Sequence[str] = leftovers(job, keys)
        for key in islice(garbage, OBJECTS_PER_JOB):
            self.bucket.delete(key)
            REMOVED_OBJECTS.inc()
        if garbage:
            facts = {"removed": min(len(garbage), OBJECTS_PER_JOB), "left": len(keys) - len(garbage)}
            log_event(logger, "job_swept", job_id=job.id, state=job.state.value, **facts)
        if len(garbage) <= OBJECTS_PER_JOB:
            self.sweeps.finish(due, grace=self.grace)

    def _remove_unfinished(self) -> None:
        self._unfinished_at = time.monotonic() + UNFINISHED_EVERY_SECONDS
        if removed := self.bucket.remove_unfinished(older_than=UPLOAD_LIFE):
            log_event(logger, "unfinished_objects_removed", removed=removed)

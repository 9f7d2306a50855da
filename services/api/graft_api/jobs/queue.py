"""Why a job waits, or will once its data is prepared."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum

from graft_api.jobs.fleet import workers_for
from graft_api.jobs.schemas import Queue
from graft_api.jobs.starts import Starts
from graft_shared.capacity import CapacityTable
from graft_shared.jobs import FailureReason, Job, JobState, JobStatus, Stage
from graft_shared.store import Backlog, Crew, Jobs, PlaceInLine, Quota, Reached

PAUSED = "Paused: once it is resumed it goes on, in its old place."
FAILED = "The last run failed"
AWAY = {  # what the next run waits for, by how the last one failed
    FailureReason.BASE_MODEL_UNAVAILABLE: "The last run found the hub away",
    FailureReason.ARTIFACT_UPLOAD_FAILED: "The last run found the object store away",
    FailureReason.DISK_FULL: "The last run found its worker's disk full",
}


class Wait(StrEnum):
    """What a queued job waits for: the thing that would have to change first."""

    NO_LIVE_WORKER = "no_live_worker"
    RETRY_DELAY = "retry_delay"  # it goes on some seconds after a failed run
    IN_LINE = "in_line"  # for a worker that is busy, or about to take it


def queue_of(
    job: Job, place: PlaceInLine | None, jobs: Jobs, crews: Sequence[Crew], table: CapacityTable, starts: Starts
) -> Queue | None:
    """The place and the reason of a job that waits, or that nobody alive will train; None for any other.

    A paused job has no place: it waits for its user. Nor has one that a quota of its tenant holds back.
    """
    if job.status is JobStatus.PAUSED:
        return Queue(position=None, reason=PAUSED)
    trainers = workers_for(Stage.TRAIN, job.gpu_class, crews, table)
    untrained = job.stage is Stage.PREPARE and not trainers
    later = f"Once prepared, it waits for a worker of class {job.gpu_class}: none is alive."
    if place is None:
        return Queue(position=None, reason=later) if untrained and job.state is JobState.RUNNING else None
    able = workers_for(job.stage, job.gpu_class, crews, table)
    waits_until = jobs.waits_until(job)
    failure = jobs.last_failure(job) if waits_until is not None else None
    reason = reason_to_wait(job, place, sum(crew.size for crew in able), waits_until, failure)
    return Queue(
        position=place.position,
        reason=f"{reason} {later}" if untrained else reason,
        predicted_start=_predicted_start(job, place, starts, waits_until),
    )


def queue_of_merge(merge: Job, crews: Sequence[Crew]) -> Queue | None:
    """What a merged model that is not begun yet waits for."""
    if merge.status is not JobStatus.QUEUED:
        return None
    if any(Stage.MERGE in crew.stages for crew in crews):
        return Queue(position=None, reason="Waiting for a worker that merges.")
    return Queue(position=None, reason="No live worker merges: the operator starts one with GRAFT_WORKER_STAGE=merge.")


def _predicted_start(job: Job, place: PlaceInLine, starts: Starts, waits_until: datetime | None) -> int | None:
    if job.stage is not Stage.TRAIN or place.position is None:
        return None
    seconds = starts.seconds_until(job.gpu_class, place.position)
    if seconds is None:
        return None
    free = time.time() + seconds
    return int(free if waits_until is None else max(free, waits_until.timestamp()))


def lengths_by_reason(backlog: Backlog, able_workers: int) -> dict[Wait, int]:
    """How many jobs of a queue wait for what."""
    lengths = dict.fromkeys(Wait, 0)
    lengths[_wait(able_workers, delayed=True)] += backlog.delayed
    lengths[_wait(able_workers, delayed=False)] += backlog.length - backlog.delayed
    return lengths


def reason_to_wait(
    job: Job, place: PlaceInLine, able_workers: int, waits_until: datetime | None, failure: FailureReason | None
) -> str:
    """Say what the job waits for, as a sentence; `failure` is why its last run went back to the queue."""
    preparing = job.stage is Stage.PREPARE
    wait = _wait(able_workers, delayed=waits_until is not None)
    if wait is Wait.NO_LIVE_WORKER:
        return "No live worker prepares data." if preparing else f"No live worker of class {job.gpu_class}."
    if place.held_by is not None:
        return _held(place.held_by)
    if waits_until is not None:
        why = FAILED if failure is None else AWAY.get(failure, FAILED)
        return f"{why}; the next one starts after {waits_until:%H:%M:%S} UTC."
    before = (place.position or 1) - 1
    ahead = f"{before} {'job' if before == 1 else 'jobs'} before it" if before else ""
    if preparing:
        return f"Waiting for data preparation{f', {ahead}' if ahead else ''}."
    return f"{ahead or 'Next in line'} for a worker of class {job.gpu_class}."


def _held(reached: Reached) -> str:
    if reached.quota is Quota.GPU_HOURS:
        return (
            f"This tenant has used {reached.used:.2f} of the {reached.limit:g} GPU-hours that it has in a month; its "
            "jobs go on when the next one begins (UTC)."
        )
    if reached.limit == 0:
        return "This tenant's quota of running jobs is 0: nothing trains until the operator raises it."
    runs = "1 job trains" if reached.used == 1 else f"{reached.used:g} jobs train"
    return f"{runs} for this tenant, and its quota is {reached.limit:g}: it goes on when one of them leaves."


def _wait(able_workers: int, *, delayed: bool) -> Wait:
    if able_workers == 0:
        return Wait.NO_LIVE_WORKER
    return Wait.RETRY_DELAY if delayed else Wait.IN_LINE

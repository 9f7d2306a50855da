"""A job's history, played from its first event: it must lead to the row as it stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graft_shared.jobs import REMEDIES, FailureReason, JobState, Phase, Retry, Stage

Event = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What events tell of a row."""

    state: str
    stage: str
    epoch: int
    attempt: int
    runs_without_progress: int
    gpu_class: str
    worker: str | None = None
    phase: str | None = None
    cancel_requested: bool = False
    pause_requested: bool = False
    checkpoint: tuple[int, int, str] | None = None  # step, epoch, sha256
    warnings: tuple[str, ...] = ()  # their messages
    error: str | None = None  # its code
    adapter: Mapping[str, Any] | None = None


def events_replay_to(row: Mapping[str, Any], events: Sequence[Event]) -> None:
    """The invariant: a row of `jobs`, by its columns, is what its events tell. Warnings of its submission have none."""
    told, stands = replay(events), _of_row(row)
    assert stands.warnings[len(stands.warnings) - len(told.warnings) :] == told.warnings
    assert replace(stands, warnings=told.warnings) == told


def replay(events: Sequence[Event]) -> Replayed:
    """Play a whole history: events with `epoch`, `type`, `message` and `data`, as the API shows them, oldest first.

    Raises:
        ValueError: It holds an event that cannot come at its place.
    """
    first, *later = events
    if first["type"] != "submitted":
        raise ValueError(f"a history begins with 'submitted', not {first['type']!r}")
    job = Replayed(
        state=JobState.QUEUED.value,
        stage=Stage.PREPARE.value,
        epoch=0,
        attempt=0,
        runs_without_progress=0,
        gpu_class=first["data"]["gpu_class"],
    )
    for event in later:
        job = _after(job, event)
    return job


def _after(job: Replayed, event: Event) -> Replayed:
    data, message, epoch = event["data"], event["message"], event["epoch"]
    match event["type"]:
        case "claimed":
            return _claimed(job, event)
        case "phase":
            return replace(_held(job, event), phase=data["phase"])
        case "metrics" | "note":
            return _held(job, event)
        case "warning":
            return replace(_held(job, event), warnings=(*job.warnings, message))
        case "checkpoint":
            return replace(_held(job, event), checkpoint=(data["step"], epoch, data["sha256"]))
        case "cancel_requested":
            return replace(_held(job, event), cancel_requested=True)
        case "pause_requested":
            return replace(_held(job, event), pause_requested=True)
        case "paused":
            return _paused(job, event)
        case "resumed":
            _must(job.pause_requested, job, event)
            return replace(job, pause_requested=False)
        case "prepared":
            handed = _left(_held(job, event), JobState.QUEUED)
            return replace(handed, stage=Stage.TRAIN.value, attempt=0, runs_without_progress=0)
        case "requeued":
            return replace(_left(_requeued(_held(job, event), data["reason"]), JobState.QUEUED), epoch=data["epoch"])
        case "replanned":
            _must(job.state == JobState.QUEUED.value, job, event)
            return replace(job, gpu_class=data["to"]["gpu_class"], warnings=(*job.warnings, message))
        case "succeeded":
            return replace(_left(_held(job, event), JobState.SUCCEEDED), adapter=data["adapter"])
        case "failed":
            _must(job.state == JobState.RUNNING.value, job, event)
            ended = _left(_counted(job, data["reason"]), JobState.FAILED)
            return replace(ended, epoch=epoch, error=data["reason"])
        case "cancelled":
            _must(job.state in (JobState.QUEUED.value, JobState.RUNNING.value), job, event)
            asked = job.cancel_requested or job.state == JobState.QUEUED.value
            return replace(_left(job, JobState.CANCELLED), epoch=epoch, cancel_requested=asked)
        case unknown:
            raise ValueError(f"no event is of type {unknown!r}")


def _claimed(job: Replayed, event: Event) -> Replayed:
    data = event["data"]
    _must(job.state == JobState.QUEUED.value, job, event)
    _must((event["epoch"], data["attempt"], data["stage"]) == (job.epoch + 1, job.attempt + 1, job.stage), job, event)
    taken = {"epoch": event["epoch"], "attempt": data["attempt"], "worker": data["worker"]}
    return replace(job, state=JobState.RUNNING.value, phase=Phase.FETCHING.value, **taken)


def _paused(job: Replayed, event: Event) -> Replayed:
    """In the queue, or by a worker that obeyed: then it tells of that run's end too."""
    if job.state == JobState.QUEUED.value:
        return replace(job, pause_requested=True)
    _must(job.pause_requested, job, event)
    left = _left(_requeued(_held(job, event), event["data"]["reason"]), JobState.QUEUED)
    return replace(left, epoch=event["data"]["epoch"])


def _requeued(job: Replayed, reason: str) -> Replayed:
    counted = _counted(job, reason)
    if REMEDIES[FailureReason(reason)].retry is Retry.REPLANNED:  # with another plan: else it would have been the end
        return replace(counted, attempt=job.attempt - 1)
    return counted


def _counted(job: Replayed, reason: str) -> Replayed:
    """What a failed run cost: a free one gives its attempt back. One without a checkpoint counts if it was free."""
    retry = REMEDIES[FailureReason(reason)].retry
    progressed = job.checkpoint is not None and job.checkpoint[1] == job.epoch and job.checkpoint[0] > 0
    fruitless = 0 if progressed else job.runs_without_progress + (retry is Retry.FREE)
    given_back = retry in (Retry.FREE, Retry.UNCOUNTED)
    return replace(job, attempt=job.attempt - given_back, runs_without_progress=fruitless)


def _left(job: Replayed, state: JobState) -> Replayed:
    return replace(job, state=state.value, worker=None, phase=None)


def _held(job: Replayed, event: Event) -> Replayed:
    _must(job.state == JobState.RUNNING.value and event["epoch"] == job.epoch, job, event)
    return job


def _must(can_follow: bool, job: Replayed, event: Event) -> None:
    if not can_follow:
        raise ValueError(f"{dict(event)} cannot follow {job}")


def _of_row(row: Mapping[str, Any]) -> Replayed:
    checkpoint, error = row["checkpoint"], row["error"]
    names = (
        "state", "stage", "epoch", "attempt", "runs_without_progress", "gpu_class", "worker", "phase",
        "cancel_requested", "pause_requested", "adapter",
    )  # fmt: skip
    return Replayed(
        **{name: row[name] for name in names},
        checkpoint=(checkpoint["step"], checkpoint["epoch"], checkpoint["object"]["sha256"]) if checkpoint else None,
        warnings=tuple(warning["message"] for warning in row["warnings"]),
        error=error["code"] if error else None,
    )

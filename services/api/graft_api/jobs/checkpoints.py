"""A job's checkpoints, read from its history: what was committed, when, and how well the adapter did by then."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from graft_api.jobs.events import all_events
from graft_api.jobs.schemas import CheckpointBody, JobMetrics, Metrics
from graft_api.jobs.views import metric_series
from graft_shared.errors import InvalidParameter
from graft_shared.jobs import Job, JobEvent
from graft_shared.store import Jobs


@dataclass(frozen=True, kw_only=True)
class CommittedCheckpoint:
    """One checkpoint that was stored, read back and committed.

    Args:
        number: Of the event that told of it: stable, and unique within the job.
        is_stored: It is the one that the job goes on from. Earlier ones are removed.
        train_loss: The last that was logged up to its step, None before the first; `eval_loss` likewise.
    """

    number: int
    epoch: int
    step: int
    size: int
    sha256: str
    created_at: datetime
    is_stored: bool
    train_loss: float | None
    eval_loss: float | None


def committed_checkpoints(job: Job, jobs: Jobs) -> list[CommittedCheckpoint]:
    """All of them, newest first; what was stored before the first step holds no training and is left out."""
    committed: list[JobEvent] = []
    metrics = metric_series(job.id, _putting_aside(committed, all_events(jobs, job.tenant, job.id)))
    found = [
        CommittedCheckpoint(
            number=event.id,
            epoch=event.epoch,
            step=event.data["step"],
            size=event.data["size"],
            sha256=event.data["sha256"],
            created_at=event.created_at,
            is_stored=job.checkpoint is not None
            and (job.checkpoint.epoch, job.checkpoint.step) == (event.epoch, event.data["step"]),
            train_loss=_last_until(event.data["step"], "loss", metrics),
            eval_loss=_last_until(event.data["step"], "eval_loss", metrics),
        )
        for event in committed
    ]
    return found[::-1]


def checkpoint_id(job_id: str, number: int) -> str:
    """A checkpoint's id: it tells of the event that told of it, and never changes."""
    return _id("ftckpt", job_id, number)


def event_id(job_id: str, number: int) -> str:
    """The id of an event, where it must differ from those of all other jobs."""
    return _id("ftevent", job_id, number)


def number_behind(cursor: str | None, kind: str, job_id: str) -> int | None:
    """The number within the job that a page is to begin behind, None for the first page.

    Raises:
        InvalidParameter: It is no id of this kind and job.
    """
    if cursor is None:
        return None
    found = re.fullmatch(re.escape(_id(kind, job_id, 0).removesuffix("0")) + r"(\d{1,9})", cursor)
    if found is None:
        raise InvalidParameter(param="after", reason="it is not the id of anything in this list")
    return int(found[1])


def checkpoint_body(job: Job, checkpoint: CommittedCheckpoint) -> CheckpointBody:
    """One checkpoint as its user sees it."""
    return CheckpointBody(
        id=checkpoint_id(job.id, checkpoint.number),
        job_id=job.id,
        epoch=checkpoint.epoch,
        step=checkpoint.step,
        size=checkpoint.size,
        sha256=checkpoint.sha256,
        created_at=int(checkpoint.created_at.timestamp()),
        is_stored=checkpoint.is_stored,
        metrics=Metrics(train_loss=checkpoint.train_loss, eval_loss=checkpoint.eval_loss),
    )


def page_of(
    checkpoints: Sequence[CommittedCheckpoint], before: int | None, limit: int
) -> tuple[list[CommittedCheckpoint], bool]:
    """The page behind the checkpoint of this number, or the first one; and whether there are more."""
    older = [checkpoint for checkpoint in checkpoints if before is None or checkpoint.number < before]
    return older[:limit], len(older) > limit


def _putting_aside(committed: list[JobEvent], events: Iterable[JobEvent]) -> Iterator[JobEvent]:
    """The events as they pass, of which a long job has more than should be held at once."""
    for event in events:
        if event.type == "checkpoint" and event.data["step"] > 0:
            committed.append(event)
        yield event


def _id(kind: str, job_id: str, number: int) -> str:
    return f"{kind}-{job_id.removeprefix('ftjob-')}-{number}"


def _last_until(step: int, name: str, metrics: JobMetrics) -> float | None:
    series = metrics.series.get(name)
    if series is None:
        return None
    index = bisect.bisect_right(series.steps, step)
    return series.values[index - 1] if index else None

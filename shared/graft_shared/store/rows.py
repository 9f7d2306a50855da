"""Between rows and words: reading a Job from its row, and writing an event beside an edge."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sqlalchemy import ColumnElement, and_, bindparam, insert, select, update
from sqlalchemy.engine import Connection, RowMapping

from graft_shared.errors import JobNotFound, LeaseLost
from graft_shared.jobs import Checkpoint, Job, JobEvent, JobState, Phase, Stage, StoredObject
from graft_shared.store.engine import as_datetime, now
from graft_shared.store.tables import job_events, jobs

# Statements that every request needs are built once: building one takes longer than SQLite takes to run it.
_NEXT_EVENT = (
    update(jobs)
    .where(jobs.c.id == bindparam("event_of"))
    .values(next_event=jobs.c.next_event + 1)
    .returning(jobs.c.next_event)
)
_INSERT_EVENT = insert(job_events).values(created_at=now())
PRIORITY_RANKS = {"low": 0, "normal": 1, "high": 2}
FRESH: dict[str, Any] = {  # what a row begins with, whatever it is
    "state": JobState.QUEUED.value,
    "epoch": 0,
    "attempt": 0,
    "runs_without_progress": 0,
    "cancel_requested": False,
    "pause_requested": False,
    "progress": {},
    "metrics": {},
    "memory": {},
    "next_event": 1,  # that it was submitted
    "created_at": now(),
    "not_before": now(),
}


def is_alive() -> ColumnElement[bool]:
    """It waits or runs."""
    return jobs.c.state.in_([JobState.QUEUED.value, JobState.RUNNING.value])


def is_there() -> ColumnElement[bool]:
    """A fine-tune that was not deleted: what a tenant calls a job."""
    return and_(jobs.c.deleted_at.is_(None), jobs.c.merges.is_(None))


_ONE = select(jobs).where(jobs.c.tenant == bindparam("of"), jobs.c.id == bindparam("job"), is_there())
_ONE_LOCKED = _ONE.with_for_update()


def job_from(row: RowMapping) -> Job:
    """Read one row of `jobs`."""
    return Job(
        id=row["id"],
        tenant=row["tenant"],
        state=JobState(row["state"]),
        stage=Stage(row["stage"]),
        epoch=row["epoch"],
        attempt=row["attempt"],
        runs_without_progress=row["runs_without_progress"],
        spec=row["spec"],
        plan=row["plan"],
        placement=row["placement"],
        gpu_class=row["gpu_class"],
        phase=Phase(row["phase"]) if row["phase"] else None,
        cancel_requested=row["cancel_requested"],
        pause_requested=row["pause_requested"],
        progress=row["progress"],
        metrics=row["metrics"],
        memory=row["memory"],
        warnings=row["warnings"],
        error=row["error"],
        prepared=row["prepared"],
        checkpoint=_checkpoint_from(row["checkpoint"]),
        adapter=row["adapter"],
        worker=row["worker"],
        created_at=as_datetime(row["created_at"]),
        started_at=as_datetime(row["started_at"]) if row["started_at"] else None,
        finished_at=as_datetime(row["finished_at"]) if row["finished_at"] else None,
        claimed_at=as_datetime(row["claimed_at"]) if row["claimed_at"] else None,
        lease_expires_at=as_datetime(row["lease_expires_at"]) if row["lease_expires_at"] else None,
        gpu_seconds=row["gpu_seconds"],
        merges=row["merges"],
        traceparent=row["traceparent"],
        deleted_at=as_datetime(row["deleted_at"]) if row["deleted_at"] else None,
    )


def event_from(row: RowMapping) -> JobEvent:
    """Read one row of `job_events`."""
    return JobEvent(
        id=row["id"],
        job_id=row["job_id"],
        epoch=row["epoch"],
        type=row["type"],
        level=row["level"],
        message=row["message"],
        data=row["data"],
        created_at=as_datetime(row["created_at"]),
    )


def checkpoint_values(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint as its column holds it."""
    return asdict(checkpoint)


def compare_and_set(connection: Connection, job_id: str, epoch: int, state: JobState, /, **values: Any) -> RowMapping:
    """Change one row if it still has this state and epoch; return it as it is now.

    Raises:
        LeaseLost: The row has moved on.
    """
    changed = (
        update(jobs)
        .where(jobs.c.id == job_id, jobs.c.epoch == epoch, jobs.c.state == state.value)
        .values(**values)
        .returning(jobs)
    )
    row = connection.execute(changed).mappings().one_or_none()
    if row is None:
        raise LeaseLost(job_id=job_id, epoch=epoch)
    return row


def add_event(
    connection: Connection,
    job_id: str,
    epoch: int,
    type: str,
    message: str,
    *,
    level: str = "info",
    data: dict[str, Any] | None = None,
) -> None:
    """Append to the job's history, in the transaction of what it tells about; numbers are gapless within the job."""
    number = connection.execute(_NEXT_EVENT, {"event_of": job_id}).scalar_one()
    insert_event(connection, job_id, number, epoch, type, message, level=level, data=data)


def insert_event(
    connection: Connection,
    job_id: str,
    number: int,
    epoch: int,
    type: str,
    message: str,
    *,
    level: str = "info",
    data: dict[str, Any] | None = None,
) -> None:
    """Write the event of a number that the job's row counts already."""
    event = {"job_id": job_id, "id": number, "epoch": epoch, "type": type, "level": level, "message": message}
    connection.execute(_INSERT_EVENT, {**event, "data": data or {}})


def _checkpoint_from(value: dict[str, Any] | None) -> Checkpoint | None:
    if value is None:
        return None
    return Checkpoint(step=value["step"], epoch=value["epoch"], object=StoredObject(**value["object"]))


def job_row(connection: Connection, tenant: str, job_id: str, *, lock: bool = False) -> RowMapping:
    """The row of a tenant's job; raises JobNotFound."""
    this = {"of": tenant, "job": job_id}
    row = connection.execute(_ONE_LOCKED if lock else _ONE, this).mappings().one_or_none()
    if row is None:
        raise JobNotFound(job_id=job_id)
    return row

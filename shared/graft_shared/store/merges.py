"""Merged models: each is made by a row of `jobs` of its own kind, so that all that holds for jobs holds for it.

A tenant sees it through the fine-tune whose adapter it merges, and nowhere else. It has one stage (`Stage.MERGE`), and
points at what it made as a fine-tune does at its adapter.
"""

from __future__ import annotations

from sqlalchemy import and_, insert, select, update
from sqlalchemy.engine import Connection, RowMapping

from graft_shared.errors import AdapterNotReady, MergedModelInUse, MergedModelNotFound
from graft_shared.jobs import Job, JobState, Stage
from graft_shared.specs import JobSpec
from graft_shared.store.engine import Database, now
from graft_shared.store.rows import FRESH, PRIORITY_RANKS, insert_event, is_alive, job_from, job_row
from graft_shared.store.tables import jobs

_INSERT = insert(jobs).values(stage=Stage.MERGE.value, **FRESH).returning(jobs)
_UNDONE = (JobState.FAILED, JobState.CANCELLED)


class Merges:
    """Merged models as their tenants see them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def ask(self, tenant: str, job_id: str, *, id: str) -> tuple[Job, bool]:
        """Return what merges this job's adapter, and whether it is new; one that failed makes room for another.

        Raises:
            JobNotFound: No such job, or another tenant's.
            AdapterNotReady: It has not succeeded.
        """
        with self._database.writing() as connection:
            tuned = job_row(connection, tenant, job_id, lock=True)  # two that ask at once make one
            if tuned["adapter"] is None:
                raise AdapterNotReady(job_id=job_id, status=job_from(tuned).status.value)
            there = _find(connection, job_id)
            if there is not None and JobState(there["state"]) not in _UNDONE:
                return job_from(there), False
            forget_merged(connection, job_id)
            row = _insert(connection, tuned, id)
            insert_event(connection, id, 1, 0, "submitted", "The merged model was asked for.")
            return job_from(row), True

    def get(self, tenant: str, job_id: str) -> Job:
        """Return what merges this job's adapter, or has.

        Raises:
            JobNotFound: No such job, or another tenant's.
            MergedModelNotFound: Nobody has asked for it.
        """
        with self._database.reading() as connection:
            job_row(connection, tenant, job_id)
            return job_from(_require(connection, job_id))

    def delete(self, tenant: str, job_id: str) -> None:
        """Delete a merged model; the adapter stays.

        Raises:
            JobNotFound: No such job, or another tenant's.
            MergedModelNotFound: Nobody has asked for it.
            MergedModelInUse: It is being made.
        """
        with self._database.writing() as connection:
            job_row(connection, tenant, job_id, lock=True)
            _require(connection, job_id)
            forget_merged(connection, job_id)


def _find(connection: Connection, job_id: str) -> RowMapping | None:
    query = select(jobs).where(and_(jobs.c.merges == job_id, jobs.c.deleted_at.is_(None)))
    return connection.execute(query).mappings().one_or_none()


def _require(connection: Connection, job_id: str) -> RowMapping:
    row = _find(connection, job_id)
    if row is None:
        raise MergedModelNotFound(job_id=job_id)
    return row


def forget_merged(connection: Connection, job_id: str) -> None:
    """Give up what merges this job's adapter, if anything does, and what it has made; a sweeper removes its objects.

    Raises:
        MergedModelInUse: It runs.
    """
    this = and_(jobs.c.merges == job_id, jobs.c.deleted_at.is_(None))
    waits = jobs.c.state == JobState.QUEUED.value
    ended = {"state": JobState.CANCELLED.value, "finished_at": now()}
    connection.execute(update(jobs).where(this, waits).values(**ended))
    if connection.execute(select(jobs.c.id).where(this, is_alive())).first() is not None:
        raise MergedModelInUse(job_id=job_id)
    connection.execute(update(jobs).where(this).values(deleted_at=now(), sweep_at=now()))


def _insert(connection: Connection, tuned: RowMapping, id: str) -> RowMapping:
    spec, prepared = tuned["spec"], tuned["prepared"] or {}
    own = JobSpec(
        base_model=spec["base_model"],
        revision=prepared.get("base_commit") or spec["revision"],
        dataset=spec["dataset"],
    )
    values = {
        "id": id,
        "merges": tuned["id"],
        "tenant": tuned["tenant"],
        "max_attempts": own.max_attempts,
        "priority": PRIORITY_RANKS[own.priority.value],
        "gpu_class": "cpu",
        "base_model": own.base_model,
        "request_sha256": tuned["request_sha256"],
        "spec": own.model_dump(mode="json", by_alias=True),
        "plan": {},
        "placement": {},
        "metadata": {},
        "warnings": [],
    }
    return connection.execute(_INSERT, values).mappings().one()

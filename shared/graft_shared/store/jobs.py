"""The tenants' door to jobs: submit, read, list, cancel, pause, resume, delete. Every query takes the tenant."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, and_, bindparam, func, insert, or_, select, true, tuple_
from sqlalchemy.engine import Connection, RowMapping
from sqlalchemy.exc import IntegrityError

from graft_shared.errors import (
    IdempotencyConflict,
    InvalidParameter,
    JobCancelling,
    JobFinished,
    JobInUse,
    JobNotEnded,
    QuotaExceeded,
)
from graft_shared.jobs import TERMINAL_STATES, FailureReason, Job, JobEvent, JobState, JobStatus, Stage
from graft_shared.store.engine import Database, as_datetime, now, one_at_a_time
from graft_shared.store.line import Line, Lines, PlaceInLine, QueueName, queue_of
from graft_shared.store.merges import forget_merged
from graft_shared.store.outbox import put_in_outbox
from graft_shared.store.quotas import NO_QUOTAS, Quotas, own_quotas, require_place
from graft_shared.store.resends import Sending, made_before
from graft_shared.store.rows import (
    FRESH,
    PRIORITY_RANKS,
    add_event,
    compare_and_set,
    event_from,
    insert_event,
    is_alive,
    is_there,
    job_from,
    job_row,
)
from graft_shared.store.tables import files, job_events, jobs


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """What admission decided, ready to be committed."""

    id: str
    tenant: str
    spec: dict[str, Any]
    plan: dict[str, Any]
    placement: dict[str, Any]
    gpu_class: str
    request_sha256: str
    idempotency_key: str | None = None
    warnings: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)  # that it reads, by the parameter that names each
    adapter_of: str | None = None  # the job whose adapter it goes on from
    traceparent: str | None = None  # of the request, where it is traced
    sending: Sending | None = None  # of a request without a key, whose client counts


@dataclass(frozen=True, kw_only=True)
class JobQuery:
    """Which jobs to list, newest first; `after` is the id of the last job of the page before."""

    status: JobStatus | None = None
    base_model: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    created_after: datetime | None = None
    created_before: datetime | None = None
    after: str | None = None
    limit: int = 20


class Jobs:
    """Jobs as their tenants see them; `quotas` are those of a tenant that has none of its own."""

    def __init__(self, database: Database, quotas: Quotas = NO_QUOTAS) -> None:
        self._database = database
        self._quotas = quotas
        self._lines = Lines(quotas)

    def submit(self, new: NewJob) -> tuple[Job, bool]:
        """Commit a job; return it, and whether it is new. From here on it cannot be lost.

        Raises:
            IdempotencyConflict: The key was used with another body.
            InvalidParameter: A file that it reads, or the job whose adapter it goes on from, was deleted meanwhile.
            QuotaExceeded: The tenant may have no further job now.
        """
        try:
            with self._database.writing() as connection:
                if new.sending is not None:
                    one_at_a_time(connection, f"{new.tenant} {new.request_sha256}")
                    made = made_before(connection, new.tenant, new.request_sha256, new.sending)
                    if made is not None:
                        return job_from(made), False
                _hold_files(connection, new)
                _hold_adapter(connection, new)
                row = _insert_job(connection, new)
                require_place(connection, row, self._quotas)
                facts = {"gpu_class": new.gpu_class}
                insert_event(connection, new.id, 1, 0, "submitted", "The job was accepted.", data=facts)
                return job_from(row), True
        except (IntegrityError, QuotaExceeded):  # by a job of the same key, as may be
            if new.idempotency_key is None:
                raise
            earlier = self.find_by_key(new.tenant, new.idempotency_key, new.request_sha256)
            if earlier is None:
                raise
            return earlier, False

    def find_by_key(self, tenant: str, idempotency_key: str, request_sha256: str) -> Job | None:
        """Return the job that this key made before, if any.

        Raises:
            IdempotencyConflict: The key was used with another body.
        """
        with self._database.reading() as connection:
            query = select(jobs).where(jobs.c.tenant == tenant, jobs.c.idempotency_key == idempotency_key)
            row = connection.execute(query).mappings().one_or_none()
        if row is None:
            return None
        if row["request_sha256"] != request_sha256:
            raise IdempotencyConflict(job_id=row["id"])
        return job_from(row)

    def find_sent(self, tenant: str, request_sha256: str, sending: Sending) -> Job | None:
        """Return the job that another sending of this request made before, if any."""
        with self._database.reading() as connection:
            row = made_before(connection, tenant, request_sha256, sending)
        return job_from(row) if row is not None else None

    def get(self, tenant: str, job_id: str) -> Job:
        """Return one job.

        Raises:
            JobNotFound: No such job, or another tenant's.
        """
        with self._database.reading() as connection:
            return job_from(job_row(connection, tenant, job_id))

    def list(self, tenant: str, query: JobQuery) -> tuple[list[Job], bool]:
        """Return one page of jobs, newest first, and whether there are more.

        Raises:
            JobNotFound: `query.after` is no job of this tenant.
        """
        with self._database.reading() as connection:
            conditions = _conditions(query, connection.dialect.name)
            wanted = select(jobs).where(jobs.c.tenant == tenant, is_there(), *conditions)
            if query.after is not None:
                last = job_row(connection, tenant, query.after)
                older = jobs.c.created_at < last["created_at"]
                same_moment = and_(jobs.c.created_at == last["created_at"], jobs.c.id < last["id"])
                wanted = wanted.where(or_(older, same_moment))
            wanted = wanted.order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(query.limit + 1)
            page = connection.execute(wanted).mappings().all()
        return [job_from(row) for row in page[: query.limit]], len(page) > query.limit

    def events(self, tenant: str, job_id: str, *, after: int = 0, limit: int = 100) -> tuple[Sequence[JobEvent], bool]:
        """Return a page of the job's history, oldest first, and whether there is more.

        Raises:
            JobNotFound: No such job, or another tenant's.
        """
        with self._database.reading() as connection:
            job_row(connection, tenant, job_id)
            query = (
                select(job_events)
                .where(job_events.c.job_id == job_id, job_events.c.id > after)
                .order_by(job_events.c.id)
                .limit(limit + 1)
            )
            page = connection.execute(query).mappings().all()
        return [event_from(row) for row in page[:limit]], len(page) > limit

    def newest_events(self, asked: Collection[tuple[str, str]]) -> dict[tuple[str, str], int]:
        """The id of the last event of each of these jobs that there is; a job is asked for as its tenant and its id."""
        query = select(jobs.c.tenant, jobs.c.id, jobs.c.next_event).where(
            tuple_(jobs.c.tenant, jobs.c.id).in_(asked), is_there()
        )
        with self._database.reading() as connection:
            return {(tenant, job_id): last for tenant, job_id, last in connection.execute(query)}

    def latest_events(
        self, tenant: str, job_id: str, *, before: int | None = None, limit: int = 20
    ) -> tuple[Sequence[JobEvent], bool]:
        """Return a page of the job's history, newest first, and whether there is more; `before` is an event's id.

        Raises:
            JobNotFound: No such job, or another tenant's.
        """
        older = job_events.c.id < before if before is not None else true()
        with self._database.reading() as connection:
            job_row(connection, tenant, job_id)
            query = select(job_events).where(job_events.c.job_id == job_id, older)
            query = query.order_by(job_events.c.id.desc()).limit(limit + 1)
            page = connection.execute(query).mappings().all()
        return [event_from(row) for row in page[:limit]], len(page) > limit

    def cancel(self, tenant: str, job_id: str) -> Job:
        """Cancel a queued job at once; ask the worker of a running one to stop. Asking twice is asking once.

        Raises:
            JobNotFound: No such job, or another tenant's.
            JobFinished: It has ended already, and not by a cancel.
        """
        with self._database.writing() as connection:
            row = job_row(connection, tenant, job_id, lock=True)
            state = JobState(row["state"])
            if state is JobState.CANCELLED or (state is JobState.RUNNING and row["cancel_requested"]):
                return job_from(row)
            if state in TERMINAL_STATES:
                raise JobFinished(job_id=job_id, status=state.value)
            if state is JobState.QUEUED:
                ended = {"state": JobState.CANCELLED.value, "finished_at": now(), "phase": None}
                compare_and_set(connection, job_id, row["epoch"], state, cancel_requested=True, **ended)
                add_event(connection, job_id, row["epoch"], "cancelled", "The job was cancelled before it ran.")
                put_in_outbox(connection, row, JobState.CANCELLED)
            else:
                compare_and_set(connection, job_id, row["epoch"], state, cancel_requested=True)
                add_event(connection, job_id, row["epoch"], "cancel_requested", "The worker was asked to stop.")
            return job_from(job_row(connection, tenant, job_id))

    def pause(self, tenant: str, job_id: str) -> Job:
        """Pause a queued job at once; ask the worker of a running one to save and leave. Asking twice is asking once.

        Raises:
            JobNotFound: No such job, or another tenant's.
            JobFinished, JobCancelling: It is too late.
        """
        with self._database.writing() as connection:
            row = job_row(connection, tenant, job_id, lock=True)
            _require_future(row)
            if row["pause_requested"]:
                return job_from(row)
            state = JobState(row["state"])
            row = compare_and_set(connection, job_id, row["epoch"], state, pause_requested=True)
            if state is JobState.QUEUED:
                add_event(connection, job_id, row["epoch"], "paused", "The job was paused; it keeps its place.")
            else:
                add_event(
                    connection, job_id, row["epoch"], "pause_requested", "The worker was asked to save and leave."
                )
            return job_from(row)

    def resume(self, tenant: str, job_id: str) -> Job:
        """Let a paused job go on, in its old place; take back the pause of one whose worker has not left yet.

        The worker may be leaving all the same: then the job goes back to the queue, where it is not paused. A job that
        was never paused is left as it is.

        Raises:
            JobNotFound: No such job, or another tenant's.
            JobFinished, JobCancelling: It is too late.
        """
        with self._database.writing() as connection:
            row = job_row(connection, tenant, job_id, lock=True)
            _require_future(row)
            if not row["pause_requested"]:
                return job_from(row)
            state = JobState(row["state"])
            row = compare_and_set(connection, job_id, row["epoch"], state, pause_requested=False, bell_rung_at=None)
            message = "The job goes on." if state is JobState.QUEUED else "The pause was taken back."
            add_event(connection, job_id, row["epoch"], "resumed", message)
            return job_from(row)

    def delete(self, tenant: str, job_id: str) -> None:
        """Delete a job that has ended: from now on its tenant sees it no more, and its key is free.

        Its row stays, due to be swept, until its objects have gone: while there may be one, the row is all that tells
        whose they are. Whoever dies between this commit and the last object leaves nothing behind that is not found.

        Raises:
            JobNotFound: No such job, or another tenant's.
            JobNotEnded: It waits, runs or is paused.
            JobInUse: A job that goes on from its adapter has not copied it yet.
            MergedModelInUse: Its adapter is being merged.
        """
        with self._database.writing() as connection:
            row = job_row(connection, tenant, job_id, lock=True)
            state = JobState(row["state"])
            if state not in TERMINAL_STATES:
                raise JobNotEnded(job_id=job_id, status=job_from(row).status.value)
            reader = connection.execute(_READER, {"of": tenant, "job": job_id}).scalar_one_or_none()
            if reader is not None:
                raise JobInUse(job_id=job_id, reader_id=reader)
            forget_merged(connection, job_id)
            gone = {"deleted_at": now(), "sweep_at": now(), "idempotency_key": None}
            compare_and_set(connection, job_id, row["epoch"], state, **gone)

    def line(self, name: QueueName) -> Line:
        """All that waits in one queue now."""
        with self._database.reading() as connection:
            return self._lines.look(connection, name)

    def place_in_line(self, job: Job) -> PlaceInLine | None:
        """This job's place among those of its stage and class that wait for a worker; None if it does not."""
        return self.places_in_line([job]).get(job.id)

    def places_in_line(
        self, seen: Sequence[Job], line_of: Callable[[Job], Line] | None = None
    ) -> dict[str, PlaceInLine]:
        """The places of those that wait for a worker, by their ids.

        Args:
            line_of: Where a job's queue was read not long ago; else each is read now.
        """
        look = cache(self.line)
        return {
            job.id: (line_of(job) if line_of else look(queue_of(job))).place(job, PRIORITY_RANKS[job.spec["priority"]])
            for job in seen
            if job.may_be_claimed
        }

    def waits_until(self, job: Job) -> datetime | None:
        """When a job that went back to the queue after a failed run may be tried again; None when it may be now."""
        if job.epoch == 0:
            return None  # it has never run
        query = select(jobs.c.not_before).where(
            jobs.c.id == job.id, jobs.c.state == JobState.QUEUED.value, jobs.c.not_before > now()
        )
        with self._database.reading() as connection:
            moment = connection.execute(query).scalar_one_or_none()
        return as_datetime(moment) if moment is not None else None

    def last_failure(self, job: Job) -> FailureReason | None:
        """Why a job went back to the queue the last time; None where it never did."""
        query = select(job_events.c.data).where(job_events.c.job_id == job.id, job_events.c.type == "requeued")
        with self._database.reading() as connection:
            data = connection.execute(query.order_by(job_events.c.id.desc()).limit(1)).scalar_one_or_none()
        return FailureReason(data["reason"]) if data is not None else None


# Built once, as `rows.py` says.
_INSERT = insert(jobs).values(stage=Stage.PREPARE.value, **FRESH).returning(jobs, *own_quotas())

_READER = (  # the oldest job that has yet to copy the adapter of a job
    select(jobs.c.id)
    .where(
        jobs.c.tenant == bindparam("of"),
        is_alive(),
        jobs.c.stage == Stage.PREPARE.value,
        jobs.c.spec[("adapter", "job")].as_string() == bindparam("job"),
    )
    .order_by(jobs.c.created_at)
    .limit(1)
)


def _insert_job(connection: Connection, new: NewJob) -> RowMapping:
    values = {
        "id": new.id,
        "tenant": new.tenant,
        "max_attempts": new.spec["max_attempts"],
        "priority": PRIORITY_RANKS[new.spec["priority"]],
        "gpu_class": new.gpu_class,
        "base_model": new.spec["base_model"],
        "idempotency_key": new.idempotency_key,
        "request_sha256": new.request_sha256,
        "spec": new.spec,
        "plan": new.plan,
        "placement": new.placement,
        "metadata": new.spec["metadata"],
        "warnings": new.warnings,
        "traceparent": new.traceparent,
        "sent_before": new.sending.sent_before if new.sending is not None else None,
    }
    return connection.execute(_INSERT, values).mappings().one()


def _hold_files(connection: Connection, new: NewJob) -> None:
    """See that the job's files are there, and keep them from being deleted before the job that needs them is known."""
    wanted = select(files.c.id).where(files.c.tenant == new.tenant, files.c.id.in_(new.files.values()))
    there = set(connection.execute(wanted.with_for_update(read=True)).scalars()) if new.files else set()
    for param, file_id in new.files.items():
        if file_id not in there:
            raise InvalidParameter(param=param, reason=f"there is no file '{file_id}' any more; it has been deleted")


def _hold_adapter(connection: Connection, new: NewJob) -> None:
    """See that the earlier job is there, and keep it from being deleted before the new one is known."""
    if new.adapter_of is None:
        return
    there = select(jobs.c.id).where(
        jobs.c.tenant == new.tenant, jobs.c.id == new.adapter_of, jobs.c.deleted_at.is_(None)
    )
    if connection.execute(there.with_for_update(read=True)).scalar_one_or_none() is None:
        reason = f"there is no job '{new.adapter_of}' any more; it has been deleted"
        raise InvalidParameter(param="adapter.job", reason=reason)


def _require_future(row: RowMapping) -> None:
    """Refuse to pause or resume what has ended or is about to."""
    state = JobState(row["state"])
    if state in TERMINAL_STATES:
        raise JobFinished(job_id=row["id"], status=state.value)
    if row["cancel_requested"]:
        raise JobCancelling(job_id=row["id"])


def _conditions(query: JobQuery, dialect: str) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if query.status is not None:
        conditions.append(_has_status(query.status))
    if query.base_model is not None:
        conditions.append(jobs.c.base_model == query.base_model)
    if query.created_after is not None:
        conditions.append(jobs.c.created_at > query.created_after.timestamp())
    if query.created_before is not None:
        conditions.append(jobs.c.created_at < query.created_before.timestamp())
    conditions += [_has_metadata(key, value, dialect) for key, value in query.metadata.items()]
    return conditions


def _has_metadata(key: str, value: str, dialect: str) -> ColumnElement[bool]:
    if dialect != "sqlite":
        own: ColumnElement[bool] = jobs.c.metadata[key].as_string() == value
        return own
    pair = func.json_each(jobs.c.metadata).table_valued("key", "value")  # a path cannot name every key, as it is stored
    return select(pair.c.key).where(pair.c.key == key, pair.c.value == value).exists()


def _has_status(status: JobStatus) -> ColumnElement[bool]:
    """The same reading of state, stage and flags as `Job.status`, in SQL."""
    alive = is_alive()
    if status is JobStatus.CANCELLING:
        return and_(alive, jobs.c.cancel_requested)
    paused_as = {JobStatus.PAUSING: JobState.RUNNING, JobStatus.PAUSED: JobState.QUEUED}
    if status in paused_as:
        return and_(jobs.c.state == paused_as[status].value, ~jobs.c.cancel_requested, jobs.c.pause_requested)
    unflagged = and_(~jobs.c.cancel_requested, ~jobs.c.pause_requested)
    if status is JobStatus.VALIDATING_FILES:
        return and_(alive, unflagged, jobs.c.stage == Stage.PREPARE.value)
    if status in (JobStatus.QUEUED, JobStatus.RUNNING):
        return and_(jobs.c.state == status.value, unflagged, jobs.c.stage == Stage.TRAIN.value)
    return jobs.c.state == status.value

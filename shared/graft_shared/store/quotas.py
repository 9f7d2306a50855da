"""What each tenant may have, what it has had of the workers' time, and who is next by a fair share of it.

A fair share: of two tenants that wait, the one goes first of which less runs, and where that is equal the one that has
used less since yesterday; both by its share, which the operator may raise. So while several tenants wait, as much
runs of each as its share of the workers is, whatever each of them submits; and who gets the odd worker changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    FromClause,
    Label,
    Select,
    Subquery,
    and_,
    bindparam,
    case,
    func,
    literal_column,
    or_,
    select,
    true,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, RowMapping

from graft_shared.errors import QuotaExceeded
from graft_shared.jobs import JobState, Stage
from graft_shared.settings import SharedSettings
from graft_shared.store.engine import as_datetime, day_began, month_began, now, one_at_a_time
from graft_shared.store.tables import files, jobs, tenants, uploads, worker_time
from graft_shared.store.uploads import is_lost

LATELY = timedelta(days=1)  # before the present day: what was used by then counts in a fair share
LONGEST_MONTH = timedelta(days=31)
AGAIN_SECONDS = 30  # after which a full queue may have moved
_INSERTS: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
_OF_ONE_TENANT = select(tenants).where(tenants.c.name == bindparam("tenant"))  # made once: every upload asks


class Quota(StrEnum):
    """What is limited."""

    QUEUED_JOBS = "queued_jobs"  # accepted, not ended, and not in training
    RUNNING_JOBS = "running_jobs"  # in training
    GPU_HOURS = "gpu_hours"  # of training, since the month began (UTC)
    STORED_BYTES = "stored_bytes"  # of uploaded files


@dataclass(frozen=True, kw_only=True)
class Quotas:
    """What one tenant may have; None is no limit."""

    queued_jobs: int | None = None
    running_jobs: int | None = None
    gpu_hours: float | None = None
    stored_bytes: int | None = None

    @classmethod
    def of(cls, settings: SharedSettings) -> Quotas:
        """Those of a tenant of which the operator has said nothing."""
        return cls(
            queued_jobs=settings.quota_queued_jobs,
            running_jobs=settings.quota_running_jobs,
            gpu_hours=settings.quota_gpu_hours,
            stored_bytes=settings.quota_stored_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class Reached:
    """A quota that leaves nothing."""

    quota: Quota
    limit: float
    used: float


NO_QUOTAS = Quotas()


class Standing:
    """The tenants' standing in one stage, as columns of subqueries: to be joined to rows that have a tenant."""

    def __init__(self, stage: Stage, defaults: Quotas) -> None:
        self._running, self._used = _running(stage), _used(stage)
        seconds_now = func.coalesce(self._running.c.seconds, 0.0)
        self.runs = func.coalesce(self._running.c.runs, 0)
        self.lately = func.coalesce(self._used.c.lately, 0.0) + seconds_now
        self.this_month = func.coalesce(self._used.c.this_month, 0.0) + seconds_now
        self.share = func.coalesce(tenants.c.share, 1.0)
        self.most_running = _limit(tenants.c.running_jobs, defaults.running_jobs)
        self.most_seconds = _limit(tenants.c.gpu_hours, defaults.gpu_hours) * 3600.0
        self._is_training = stage is Stage.TRAIN

    def beside(self, rows: FromClause) -> FromClause:
        """The rows with their tenants' standing beside them."""
        found = rows.outerjoin(self._running, self._running.c.tenant == rows.c.tenant)
        found = found.outerjoin(self._used, self._used.c.tenant == rows.c.tenant)
        return found.outerjoin(tenants, tenants.c.name == rows.c.tenant)

    @property
    def order(self) -> tuple[ColumnElement[Any], ...]:
        """Who goes first."""
        return self.runs * 1.0 / self.share, self.lately / self.share

    @property
    def may_begin(self) -> ColumnElement[bool]:
        """Whether the tenant's quotas let another run begin; preparing data needs no GPU and has none."""
        if not self._is_training:
            return jobs.c.tenant.is_not(None)
        return and_(
            or_(self.most_running.is_(None), self.runs < self.most_running),
            or_(self.most_seconds.is_(None), self.this_month < self.most_seconds),
        )


def quotas_of(connection: Connection, tenant: str, defaults: Quotas) -> Quotas:
    """The quotas in force for a tenant."""
    row = connection.execute(_OF_ONE_TENANT, {"tenant": tenant}).mappings().one_or_none()
    if row is None:
        return defaults
    own = {quota.value: row[quota.value] for quota in Quota}
    return Quotas(**{name: getattr(defaults, name) if value is None else value for name, value in own.items()})


def held_seconds() -> ColumnElement[float]:
    """How long the present run of a row in `jobs` has held its worker: to its lease's end, if nobody has noticed that.

    A worker that was lost is no burden to its tenant for as long as the rest was away as well.
    """
    until = case((jobs.c.lease_expires_at < now(), jobs.c.lease_expires_at), else_=now())
    return until - jobs.c.claimed_at


def count_run(connection: Connection, job_id: str, epoch: int) -> None:
    """Add the run whose lease is about to be taken off to what its tenant has had of the workers' time.

    Job and account stay locked, in this order, until the transaction ends, which ends no other run.
    """
    this = and_(jobs.c.id == job_id, jobs.c.epoch == epoch, jobs.c.state == JobState.RUNNING.value)
    run = select(jobs.c.tenant, jobs.c.stage, day_began(), held_seconds()).where(this).with_for_update()
    into = _INSERTS[connection.dialect.name](worker_time)
    added = into.from_select(["tenant", "stage", "day", "seconds"], run)
    key = [worker_time.c.tenant, worker_time.c.stage, worker_time.c.day]
    together = {"seconds": worker_time.c.seconds + added.excluded.seconds}
    connection.execute(added.on_conflict_do_update(index_elements=key, set_=together))


def own_quotas() -> list[Label[Any]]:
    """Columns for whoever writes a row of `jobs`: what `require_place` asks of its tenant, to spare a question."""
    written: ColumnElement[str] = literal_column("jobs.tenant")  # the column itself would be that of any row here
    return [
        select(tenants.c[quota.value]).where(tenants.c.name == written).scalar_subquery().label(f"own_{quota}")
        for quota in (Quota.QUEUED_JOBS, Quota.GPU_HOURS)
    ]


def require_place(connection: Connection, written: RowMapping, defaults: Quotas) -> None:
    """Let a tenant's submissions wait for each other where they are counted, and refuse one that has no place.

    Args:
        written: The job's row, with the columns `own_quotas`; it counts as waiting already.

    Raises:
        QuotaExceeded: As many others wait as may, or the month's GPU-hours are used up.
    """
    tenant, most_hours, most_jobs = written["tenant"], written["own_gpu_hours"], written["own_queued_jobs"]
    most_hours = defaults.gpu_hours if most_hours is None else most_hours
    most_jobs = defaults.queued_jobs if most_jobs is None else most_jobs
    if most_hours is not None:
        moment, hours = _moment_and_gpu_hours(connection, tenant)
        if hours >= most_hours:
            raise _hours_used_up(most_hours, hours, moment)
    if most_jobs is not None:
        one_at_a_time(connection, f"queue of {tenant}")
        others = connection.execute(count_waiting(tenant)).scalar_one() - 1
        if others >= most_jobs:
            raise _queue_full(most_jobs, others)


def require_room(
    connection: Connection,
    tenant: str,
    size: int,
    defaults: Quotas,
    *,
    about_to_add: bool,
    upload_id: str | None = None,
) -> None:
    """Refuse a file for which a tenant has no room. What its links may still bring is counted with what it has.

    Args:
        about_to_add: Its row is written next; until it is committed, no other file of the tenant is counted.
        upload_id: The link that the file came through, which is counted no more.

    Raises:
        QuotaExceeded: It would be more than the tenant may store.
    """
    limit = quotas_of(connection, tenant, defaults).stored_bytes
    if limit is None:
        return
    if about_to_add:
        one_at_a_time(connection, f"files of {tenant}")
    stored = int(connection.execute(count_stored_bytes(tenant)).scalar_one())
    stored += int(connection.execute(_count_awaited_bytes(tenant, upload_id)).scalar_one())
    if stored + size > limit:
        raise _no_room(limit, stored, size)


def count_waiting(tenant: str) -> Select[int]:
    """How many jobs of a tenant count as queued: they neither train nor have ended."""
    being_prepared = and_(jobs.c.state == JobState.RUNNING.value, jobs.c.stage == Stage.PREPARE.value)
    waits = or_(jobs.c.state == JobState.QUEUED.value, being_prepared)
    return select(func.count()).where(jobs.c.tenant == tenant, jobs.c.stage != Stage.MERGE.value, waits)


def count_stored_bytes(tenant: str) -> Select[int]:
    """How many bytes of files a tenant has."""
    return select(func.coalesce(func.sum(files.c.bytes), 0)).where(files.c.tenant == tenant)


def _count_awaited_bytes(tenant: str, but: str | None) -> Select[int]:
    announced = and_(uploads.c.tenant == tenant, uploads.c.file_id.is_(None), ~is_lost())
    others = uploads.c.id != but if but is not None else true()
    return select(func.coalesce(func.sum(uploads.c.bytes), 0)).where(announced, others)


def may_run_another(connection: Connection, tenant: str, limit: int | None) -> bool:
    """Whether fewer jobs of the tenant train than may; once asked, no other can begin before this transaction ends."""
    if limit is None:
        return True
    one_at_a_time(connection, f"training of {tenant}")
    training = and_(jobs.c.state == JobState.RUNNING.value, jobs.c.stage == Stage.TRAIN.value)
    query = select(func.count()).where(jobs.c.tenant == tenant, training)
    return int(connection.execute(query).scalar_one()) < limit


def _limit(own: Column[Any], default: float | None) -> ColumnElement[Any]:
    return func.coalesce(own, default) if default is not None else own


def _running(stage: Stage) -> Subquery:
    running = and_(jobs.c.state == JobState.RUNNING.value, jobs.c.stage == stage.value)
    seconds = func.sum(held_seconds()).label("seconds")
    return (
        select(jobs.c.tenant, func.count().label("runs"), seconds)
        .where(running)
        .group_by(jobs.c.tenant)
        .subquery("running")
    )


def _used(stage: Stage) -> Subquery:
    # Each moment is asked for in a query of its own: PostgreSQL looks nothing up in an index by a clock that runs.
    today, month = select(day_began()).scalar_subquery(), select(month_began()).scalar_subquery()
    day, seconds = worker_time.c.day, worker_time.c.seconds
    lately = func.sum(case((day >= today - LATELY.total_seconds(), seconds), else_=0.0))
    this_month = func.sum(case((day >= month, seconds), else_=0.0))
    return (
        select(worker_time.c.tenant, lately.label("lately"), this_month.label("this_month"))
        .where(worker_time.c.stage == stage.value, day >= today - LONGEST_MONTH.total_seconds())
        .group_by(worker_time.c.tenant)
        .subquery("used")
    )


def _moment_and_gpu_hours(connection: Connection, tenant: str) -> tuple[datetime, float]:
    used, running = _used(Stage.TRAIN), _running(Stage.TRAIN)
    ended = select(used.c.this_month).where(used.c.tenant == tenant).scalar_subquery()
    present = select(running.c.seconds).where(running.c.tenant == tenant).scalar_subquery()
    query = select(now(), func.coalesce(ended, 0.0) + func.coalesce(present, 0.0))
    moment, seconds = connection.execute(query).one()
    return as_datetime(moment), seconds / 3600


def _queue_full(limit: int, waiting: int) -> QuotaExceeded:
    return QuotaExceeded(
        f"{waiting} jobs of this tenant wait already, and its quota is {limit}. Wait until some have begun, cancel "
        "some, or ask the operator for a higher quota.",
        quota=Quota.QUEUED_JOBS.value,
        limit=limit,
        used=waiting,
        retry_after_seconds=AGAIN_SECONDS,
    )


def _hours_used_up(limit: float, hours: float, moment: datetime) -> QuotaExceeded:
    first = moment.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    again = (first + LONGEST_MONTH + timedelta(days=1)).replace(day=1)
    return QuotaExceeded(
        f"This tenant has used {hours:.2f} of the {limit:g} GPU-hours that it has in a month. They begin anew on "
        f"{again:%Y-%m-%d} (UTC); or ask the operator for a higher quota.",
        quota=Quota.GPU_HOURS.value,
        limit=limit,
        used=round(hours, 3),
        retry_after_seconds=int((again - moment).total_seconds()) + 1,
    )


def _no_room(limit: int, stored: int, size: int) -> QuotaExceeded:
    return QuotaExceeded(
        f"A file of {size} bytes has no room: this tenant stores {stored} of the {limit} bytes that it may. Delete "
        "files that no job needs any more, or ask the operator for a higher quota.",
        param="file",
        quota=Quota.STORED_BYTES.value,
        limit=limit,
        used=stored,
    )

"""A job's place among those that wait, in the order in which claims would take them."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import BindParameter, Select, and_, bindparam, case, func, or_, select
from sqlalchemy.engine import Connection, RowMapping

from graft_shared.jobs import Job, JobState, Stage
from graft_shared.store.engine import now
from graft_shared.store.quotas import Quota, Quotas, Reached, Standing
from graft_shared.store.tables import jobs


@dataclass(frozen=True, kw_only=True)
class PlaceInLine:
    """Where a job that waits stands: its place from 1, or the quota of its tenant that keeps it from having one."""

    position: int | None
    held_by: Reached | None = None


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """What waits of one tenant in a job's queue, and the tenant's standing.

    Args:
        higher: Jobs of a higher priority than that job's; `same` of the same, and `older` those of these before it.
        used: Seconds of the workers that the tenant has had lately.
        most_running: How many may run at once; None is no limit.
    """

    higher: int
    same: int
    older: int
    runs: int
    used: float
    share: float = 1.0
    most_running: float | None = None

    def rank(self, number: int) -> tuple[float, float, int]:
        """Where the job of this number, among those of the same priority, comes in the order; they grow with it."""
        runs_then = self.runs + self.higher + number
        return runs_then / self.share, self.used / self.share, 0 if number < self.older else 2

    @property
    def may_go(self) -> float:
        """How many of them quotas let go before something ends."""
        return float("inf") if self.most_running is None else max(0.0, self.most_running - self.runs)


def ahead_of(own: Waiting, others: Sequence[Waiting]) -> int:
    """How many claims come before a job if nothing ends meanwhile and nothing new is submitted.

    Each claim is for the tenant of which less runs, by its share; so a tenant's jobs stand at growing ranks, and the
    claims are all these ranks in order. `own` is the job's own tenant, of which `older` tells the job's number.
    """
    runs_then, used, _ = own.rank(own.older)
    mine = (runs_then, used, 1)
    ahead = own.higher + own.older
    for other in others:
        before = bisect.bisect_left(range(other.same), mine, key=other.rank)
        ahead += int(min(other.may_go, other.higher + before))
    return ahead


class Line:
    """The queues, under these default quotas."""

    def __init__(self, defaults: Quotas) -> None:
        self._queries = {stage: _waiting(stage, Standing(stage, defaults)) for stage in Stage}

    def place(self, connection: Connection, job: Job, priority: int) -> PlaceInLine:
        """Find the place of a job that waits."""
        this = {"job": job.id, "rank": priority, "gpu": job.gpu_class}
        rows = connection.execute(self._queries[job.stage], this).mappings().all()
        own = next((row for row in rows if row["tenant"] == job.tenant), None)
        if own is None:
            return PlaceInLine(position=None)  # it was claimed meanwhile
        if job.stage is Stage.TRAIN and (reached := _reached(own)) is not None:
            return PlaceInLine(position=None, held_by=reached)
        others = [_waiting_of(row, job.stage) for row in rows if row is not own and not _is_used_up(row, job.stage)]
        return PlaceInLine(position=1 + ahead_of(_waiting_of(own, job.stage), others))


def _waiting(stage: Stage, standing: Standing) -> Select[tuple[object, ...]]:
    """By tenant: what waits in a job's queue and may be claimed now, and the tenant's standing."""
    rank: BindParameter[int] = bindparam("rank")
    this: BindParameter[str] = bindparam("job")
    one = jobs.alias()
    created = select(one.c.created_at).where(one.c.id == this).scalar_subquery()
    same = jobs.c.priority == rank
    waits = and_(jobs.c.state == JobState.QUEUED.value, ~jobs.c.pause_requested, jobs.c.stage == stage.value)
    ready = or_(jobs.c.not_before <= now(), jobs.c.id == this)
    before = and_(same, or_(jobs.c.created_at < created, and_(jobs.c.created_at == created, jobs.c.id < this)))
    counts = {"higher": jobs.c.priority > rank, "same": same, "older": before}
    query = (
        select(jobs.c.tenant, *(func.sum(case((which, 1), else_=0)).label(name) for name, which in counts.items()))
        .where(waits, ready, jobs.c.priority >= rank)
        .group_by(jobs.c.tenant)
    )
    if stage is Stage.TRAIN:
        query = query.where(jobs.c.gpu_class == bindparam("gpu"))
    waiting = query.subquery("waiting")
    return select(
        waiting,
        standing.runs.label("runs"),
        standing.lately.label("lately"),
        standing.share.label("share"),
        standing.most_running.label("most_running"),
        standing.this_month.label("this_month"),
        standing.most_seconds.label("most_seconds"),
    ).select_from(standing.beside(waiting))


def _waiting_of(row: RowMapping, stage: Stage) -> Waiting:
    return Waiting(
        higher=row["higher"],
        same=row["same"],
        older=row["older"],
        runs=row["runs"],
        used=row["lately"],
        share=row["share"],
        most_running=row["most_running"] if stage is Stage.TRAIN else None,
    )


def _reached(row: RowMapping) -> Reached | None:
    """The quota that keeps a tenant from training anything more now."""
    if _is_used_up(row, Stage.TRAIN):
        return Reached(quota=Quota.GPU_HOURS, limit=row["most_seconds"] / 3600, used=row["this_month"] / 3600)
    if row["most_running"] is not None and row["runs"] >= row["most_running"]:
        return Reached(quota=Quota.RUNNING_JOBS, limit=row["most_running"], used=row["runs"])
    return None


def _is_used_up(row: RowMapping, stage: Stage) -> bool:
    limit = row["most_seconds"]
    return stage is Stage.TRAIN and limit is not None and row["this_month"] >= limit

"""A job's place among those that wait, in the order in which claims would take them."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import BindParameter, ColumnElement, Select, Subquery, and_, bindparam, case, func, or_, select
from sqlalchemy.engine import Connection, RowMapping

from graft_shared.jobs import Job, JobState, Stage
from graft_shared.store.engine import now_once
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
        self._queues = {stage: _queue(stage, Standing(stage, defaults)) for stage in Stage}

    def place(self, connection: Connection, job: Job, priority: int) -> PlaceInLine:
        """Find the place of a job that waits."""
        this = {"job": job.id, "rank": priority, "gpu": job.gpu_class}
        rows = connection.execute(self._queries[job.stage], this).mappings().all()
        return _place(job, rows)

    def places(
        self, connection: Connection, waiting: Sequence[Job], priorities: Mapping[str, int]
    ) -> list[PlaceInLine]:
        """Find the places of many jobs that wait, in as many queries as they stand in queues.

        Args:
            priorities: The rank of each, by its id.
        """
        queues = {
            (stage, gpu): _Queue(connection.execute(self._queues[stage], {"gpu": gpu}).mappings().all())
            for stage, gpu in set(map(_queue_of, waiting))
        }
        return [_place(job, queues[_queue_of(job)].seen_by(job, priorities[job.id])) for job in waiting]


def _queue_of(job: Job) -> tuple[Stage, str | None]:
    return job.stage, job.gpu_class if job.stage is Stage.TRAIN else None


class _Queue:
    """All that waits in one queue, and the standing of whose it is."""

    def __init__(self, rows: Sequence[RowMapping]) -> None:
        self._at = {row["id"]: (row["created_at"], row["id"]) for row in rows}
        self._standing = {row["tenant"]: row for row in rows}
        self._ready: dict[str, dict[int, list[tuple[float, str]]]] = {tenant: {} for tenant in self._standing}
        for row in rows:  # oldest first
            if row["is_ready"]:
                self._ready[row["tenant"]].setdefault(row["priority"], []).append(self._at[row["id"]])

    def seen_by(self, job: Job, rank: int) -> list[dict[str, Any]]:
        """What `_waiting` would find for this job."""
        at = self._at.get(job.id)
        if at is None:
            return []  # it was claimed meanwhile
        found = []
        for tenant, standing in self._standing.items():
            ready = self._ready[tenant]
            same = ready.get(rank, [])
            older = bisect.bisect_left(same, at)
            is_uncounted = tenant == job.tenant and same[older : older + 1] != [at]  # it is to be tried again later
            counts = {
                "higher": sum(len(those) for other, those in ready.items() if other > rank),
                "same": len(same) + is_uncounted,
                "older": older,
            }
            if counts["higher"] or counts["same"]:
                found.append({**standing, **counts})
        return found


def _place(job: Job, rows: Sequence[Mapping[Any, Any]]) -> PlaceInLine:
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
    ready = or_(jobs.c.not_before <= now_once(), jobs.c.id == this)
    before = and_(same, or_(jobs.c.created_at < created, and_(jobs.c.created_at == created, jobs.c.id < this)))
    counts = {"higher": jobs.c.priority > rank, "same": same, "older": before}
    query = (
        select(jobs.c.tenant, *(func.sum(case((which, 1), else_=0)).label(name) for name, which in counts.items()))
        .where(_waits(stage), ready, jobs.c.priority >= rank)
        .group_by(jobs.c.tenant)
    )
    return _with_standing(query.subquery("waiting"), standing)


def _waits(stage: Stage) -> ColumnElement[bool]:
    """Whether a job stands in a queue of this stage: all preparing has one, training one for each class."""
    waits = and_(jobs.c.state == JobState.QUEUED.value, ~jobs.c.pause_requested, jobs.c.stage == stage.value)
    return and_(waits, jobs.c.gpu_class == bindparam("gpu")) if stage is Stage.TRAIN else waits


def _queue(stage: Stage, standing: Standing) -> Select[tuple[object, ...]]:
    """Each job that waits in a queue, oldest first, and its tenant's standing."""
    is_ready = (jobs.c.not_before <= now_once()).label("is_ready")
    query = select(jobs.c.tenant, jobs.c.id, jobs.c.priority, jobs.c.created_at, is_ready).where(_waits(stage))
    waiting = query.subquery("waiting")
    return _with_standing(waiting, standing).order_by(waiting.c.created_at, waiting.c.id)


def _with_standing(waiting: Subquery, standing: Standing) -> Select[tuple[object, ...]]:
    return select(
        waiting,
        standing.runs.label("runs"),
        standing.lately.label("lately"),
        standing.share.label("share"),
        standing.most_running.label("most_running"),
        standing.this_month.label("this_month"),
        standing.most_seconds.label("most_seconds"),
    ).select_from(standing.beside(waiting))


def _waiting_of(row: Mapping[Any, Any], stage: Stage) -> Waiting:
    return Waiting(
        higher=row["higher"],
        same=row["same"],
        older=row["older"],
        runs=row["runs"],
        used=row["lately"],
        share=row["share"],
        most_running=row["most_running"] if stage is Stage.TRAIN else None,
    )


def _reached(row: Mapping[Any, Any]) -> Reached | None:
    """The quota that keeps a tenant from training anything more now."""
    if _is_used_up(row, Stage.TRAIN):
        return Reached(quota=Quota.GPU_HOURS, limit=row["most_seconds"] / 3600, used=row["this_month"] / 3600)
    if row["most_running"] is not None and row["runs"] >= row["most_running"]:
        return Reached(quota=Quota.RUNNING_JOBS, limit=row["most_running"], used=row["runs"])
    return None


def _is_used_up(row: Mapping[Any, Any], stage: Stage) -> bool:
    limit = row["most_seconds"]
    return stage is Stage.TRAIN and limit is not None and row["this_month"] >= limit

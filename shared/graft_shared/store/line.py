"""A job's place among those that wait, in the order in which claims would take them."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, and_, bindparam, select
from sqlalchemy.engine import Connection, Row

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


QueueName = tuple[Stage, str | None]  # all preparing has one queue, training one for each class


def queue_of(job: Job) -> QueueName:
    """The queue in which a job stands that waits."""
    return job.stage, job.gpu_class if job.stage is Stage.TRAIN else None


class Line:
    """All that waited in one queue at one moment, and the standing of whose it was.

    Args:
        rows: Of `Lines.look`, oldest first.
    """

    def __init__(self, stage: Stage, rows: Sequence[Row[Any]]) -> None:
        self._stage = stage
        self._ready: dict[str, dict[int, list[tuple[float, str]]]] = {}
        self._standing: dict[str, Row[Any]] = {}
        self._at: dict[str, tuple[float, str]] = {}  # a job's own time has lost digits
        for row in rows:
            tenant, job_id, priority, created_at, is_ready = tuple(row)[:5]
            self._at[job_id] = created_at, job_id
            if tenant not in self._standing:
                self._standing[tenant], self._ready[tenant] = row, {}
            if is_ready:
                self._ready[tenant].setdefault(priority, []).append((created_at, job_id))

    def knows(self, tenant: str) -> bool:
        """Whether anything of this tenant waited."""
        return tenant in self._standing

    def place(self, job: Job, rank: int) -> PlaceInLine:
        """The place of a job that waits, if it does so since that moment too."""
        own = self._standing.get(job.tenant)
        if own is None:
            return PlaceInLine(position=None)
        if self._stage is Stage.TRAIN and (reached := _reached(own)) is not None:
            return PlaceInLine(position=None, held_by=reached)
        at = self._at.get(job.id, (job.created_at.timestamp(), job.id))
        others = [
            self._waiting(row, rank, at)
            for tenant, row in self._standing.items()
            if tenant != job.tenant and not _is_used_up(row, self._stage)
        ]
        return PlaceInLine(position=1 + ahead_of(self._waiting(own, rank, at, is_own=True), others))

    def _waiting(self, row: Row[Any], rank: int, at: tuple[float, str], *, is_own: bool = False) -> Waiting:
        ready = self._ready[row.tenant]
        same = ready.get(rank, [])
        older = bisect.bisect_left(same, at)
        is_uncounted = is_own and same[older : older + 1] != [at]  # it is newer, or to be tried again later
        return Waiting(
            higher=sum(len(those) for other, those in ready.items() if other > rank),
            same=len(same) + is_uncounted,
            older=older,
            runs=row.runs,
            used=row.lately,
            share=row.share,
            most_running=row.most_running if self._stage is Stage.TRAIN else None,
        )


class Lines:
    """The queues, under these default quotas."""

    def __init__(self, defaults: Quotas) -> None:
        self._queries = {stage: _queue(stage, Standing(stage, defaults)) for stage in Stage}

    def look(self, connection: Connection, name: QueueName) -> Line:
        """Read all of one queue: a few milliseconds for a thousand jobs, and every place in it can be told."""
        stage, gpu_class = name
        return Line(stage, connection.execute(self._queries[stage], {"gpu": gpu_class}).all())


def _queue(stage: Stage, standing: Standing) -> Select[tuple[object, ...]]:
    """Each job that waits in a queue, oldest first, and its tenant's standing."""
    waits = and_(jobs.c.state == JobState.QUEUED.value, ~jobs.c.pause_requested, jobs.c.stage == stage.value)
    if stage is Stage.TRAIN:
        waits = and_(waits, jobs.c.gpu_class == bindparam("gpu"))
    is_ready = (jobs.c.not_before <= now_once()).label("is_ready")
    query = select(jobs.c.tenant, jobs.c.id, jobs.c.priority, jobs.c.created_at, is_ready).where(waits)
    waiting = query.subquery("waiting")
    return (
        select(
            waiting,
            standing.runs.label("runs"),
            standing.lately.label("lately"),
            standing.share.label("share"),
            standing.most_running.label("most_running"),
            standing.this_month.label("this_month"),
            standing.most_seconds.label("most_seconds"),
        )
        .select_from(standing.beside(waiting))
        .order_by(waiting.c.created_at, waiting.c.id)
    )


def _reached(row: Row[Any]) -> Reached | None:
    """The quota that keeps a tenant from training anything more now."""
    if _is_used_up(row, Stage.TRAIN):
        return Reached(quota=Quota.GPU_HOURS, limit=row.most_seconds / 3600, used=row.this_month / 3600)
    if row.most_running is not None and row.runs >= row.most_running:
        return Reached(quota=Quota.RUNNING_JOBS, limit=row.most_running, used=row.runs)
    return None


def _is_used_up(row: Row[Any], stage: Stage) -> bool:
    limit = row.most_seconds
    return stage is Stage.TRAIN and limit is not None and row.this_month >= limit

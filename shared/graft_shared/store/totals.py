"""Figures over all tenants: how many jobs there are, what waits, and what forecasts were worth. No job is named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import and_, case, false, func, select

from graft_shared.jobs import TERMINAL_STATES, JobState, JobStatus, Stage, status_of
from graft_shared.store.engine import Database, now, now_once
from graft_shared.store.reports import ReportState
from graft_shared.store.tables import jobs, reports
from graft_shared.store.workers import name_of


@dataclass(frozen=True, kw_only=True)
class Backlog:
    """What waits in one queue: that of a GPU class, or of all preparing, which needs no GPU."""

    stage: Stage
    gpu_class: str | None
    length: int
    delayed: int  # of these: failed, and to be tried again later
    oldest_seconds: float  # since the oldest of them was submitted


@dataclass(frozen=True, kw_only=True)
class TrainingNow:
    """How far the job is that a worker trains; None is what it has not told yet."""

    worker: str
    gpu_class: str
    step: int | None
    last_step: int | None
    loss: float | None
    tokens_per_second: float | None
    expected_peak_bytes: int | None


class Totals:
    """Jobs as the operator counts them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def jobs(self) -> Mapping[tuple[JobStatus, str], int]:
        """How many fine-tunes there are by status and GPU class, those that have ended included."""
        tuned = jobs.c.stage != Stage.MERGE.value
        kind = (jobs.c.state, jobs.c.stage, jobs.c.gpu_class)
        ended = jobs.c.state.in_([state.value for state in TERMINAL_STATES])
        alive = jobs.c.state.in_([JobState.QUEUED.value, JobState.RUNNING.value])
        # Two queries: an index alone answers the first, which counts all that ever ran; rows are wide.
        of_ended = select(*kind, false(), false(), func.count()).where(ended, tuned).group_by(*kind)
        flagged = (*kind, jobs.c.cancel_requested, jobs.c.pause_requested)
        of_alive = select(*flagged, func.count()).where(alive, tuned).group_by(*flagged)
        counts: Counter[tuple[JobStatus, str]] = Counter()
        with self._database.reading() as connection:
            for query in (of_ended, of_alive):
                for state, stage, gpu_class, cancel, pause, count in connection.execute(query):
                    flags = {"cancel_requested": cancel, "pause_requested": pause}
                    counts[status_of(JobState(state), Stage(stage), **flags), gpu_class] += count
        return counts

    def backlogs(self) -> list[Backlog]:
        """What waits for a worker in each queue that is not empty; paused jobs do not."""
        gpu_class = case((jobs.c.stage == Stage.TRAIN.value, jobs.c.gpu_class)).label("gpu_class")
        waits = and_(jobs.c.state == JobState.QUEUED.value, ~jobs.c.pause_requested)
        waiting = select(jobs.c.stage, gpu_class, jobs.c.not_before, jobs.c.created_at).where(waits).subquery()
        query = select(
            waiting.c.stage,
            waiting.c.gpu_class,
            func.count().label("length"),
            func.sum(case((waiting.c.not_before > now_once(), 1), else_=0)).label("delayed"),
            (now() - func.min(waiting.c.created_at)).label("oldest_seconds"),
        ).group_by(waiting.c.stage, waiting.c.gpu_class)
        with self._database.reading() as connection:
            rows = connection.execute(query).mappings().all()
        return [Backlog(**{**row, "stage": Stage(row["stage"])}) for row in rows]

    def waiting_reports(self) -> tuple[int, float]:
        """How many reports on files nobody makes yet, and the seconds since the oldest of them was asked for."""
        age = func.coalesce(now() - func.min(reports.c.created_at), 0.0)
        query = select(func.count(), age).where(reports.c.state == ReportState.QUEUED.value)
        with self._database.reading() as connection:
            count, oldest_seconds = connection.execute(query).one()
        return count, oldest_seconds

    def training(self) -> list[TrainingNow]:
        """What trains now, one job for each worker at most."""
        query = select(jobs.c.worker, jobs.c.gpu_class, jobs.c.progress, jobs.c.metrics, jobs.c.placement).where(
            jobs.c.state == JobState.RUNNING.value, jobs.c.stage == Stage.TRAIN.value
        )
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(jobs.c.claimed_at)).all()
        # A worker that was started anew may hold its earlier life's lease for a moment: the later claim counts.
        newest = {name_of(row.worker): row for row in rows}
        return [
            TrainingNow(
                worker=worker,
                gpu_class=row.gpu_class,
                step=row.progress.get("step"),
                last_step=row.progress.get("total_steps"),
                loss=row.metrics.get("train_loss"),
                tokens_per_second=row.progress.get("tokens_per_second"),
                expected_peak_bytes=(row.placement.get("estimate") or {}).get("expected_bytes"),
            )
            for worker, row in sorted(newest.items())
        ]

    def peaks(self, gpu_class: str, *, limit: int) -> Sequence[tuple[int, int]]:
        """Predicted and measured peak, in bytes, of this class's last jobs that were measured on a GPU.

        Predicted is what the trainer expected with the job's data, or what the placement did of one that never said.
        """
        query = (
            select(jobs.c.placement, jobs.c.memory)
            .where(jobs.c.state == JobState.SUCCEEDED.value, jobs.c.gpu_class == gpu_class)
            .order_by(jobs.c.finished_at.desc())
            .limit(limit)
        )
        with self._database.reading() as connection:
            rows = [(row.placement.get("estimate"), row.memory) for row in connection.execute(query)]
        return [
            (memory.get("expected_peak_bytes", estimate["expected_bytes"]), memory["measured_peak_bytes"])
            for estimate, memory in rows
            if estimate and memory.get("measured_on") == "cuda"
        ]

    def gpu_seconds(self, gpu_class: str, *, limit: int) -> Sequence[float]:
        """How long each of this class's last jobs that succeeded held a GPU."""
        query = (
            select(jobs.c.gpu_seconds)
            .where(
                jobs.c.state == JobState.SUCCEEDED.value,
                jobs.c.stage == Stage.TRAIN.value,
                jobs.c.gpu_class == gpu_class,
            )
            .order_by(jobs.c.finished_at.desc())
            .limit(limit)
        )
        with self._database.reading() as connection:
            return connection.execute(query).scalars().all()

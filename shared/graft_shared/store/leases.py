"""The workers' door to jobs: claim, renew, record, settle. Every write but a claim is fenced by the epoch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, and_, bindparam, case, exists, literal, or_, select, true, update
from sqlalchemy.engine import Connection, Row, RowMapping

from graft_shared.capacity import Placement
from graft_shared.errors import LeaseLost, StoreUnavailable
from graft_shared.jobs import (
    REMEDIES,
    Checkpoint,
    Failure,
    FailureReason,
    Job,
    JobState,
    Phase,
    Retry,
    Stage,
    after_failure,
)
from graft_shared.logs import log_event
from graft_shared.store.engine import Database, now, now_once, wait_at_most
from graft_shared.store.outbox import put_in_outbox
from graft_shared.store.quotas import NO_QUOTAS, Quotas, Standing, count_run, held_seconds, may_run_another
from graft_shared.store.rows import add_event, checkpoint_values, compare_and_set, job_from
from graft_shared.store.sweeps import SWEEP_EVERY
from graft_shared.store.tables import jobs, workers
from graft_shared.store.workers import LiveWorker, name_of

logger = logging.getLogger(__name__)

FENCE_WAIT_SECONDS = 1  # for a tenant's account, before the next job's turn; ends of runs hold it for milliseconds
RETRY_DELAY_SECONDS = 5.0  # before the second attempt; doubled for each further one, so that a neighbour can come back


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What the heartbeat's answer tells the worker to do."""

    cancel: bool
    pause: bool


@dataclass(frozen=True, kw_only=True)
class LostBell:
    """A queued job whose doorbell is old or was never rung."""

    job_id: str
    stage: Stage
    gpu_class: str


class Leases:
    """Jobs as workers and reconcilers see them, over all tenants; `quotas` are those of one without its own."""

    def __init__(self, database: Database, lease: timedelta, quotas: Quotas = NO_QUOTAS) -> None:
        self._database = database
        self._lease = lease.total_seconds()
        self._quotas = quotas

    def claim(self, worker: str, *, stage: Stage, gpu_classes: Sequence[str]) -> Job | None:
        """Take the best eligible queued job: a lease and a new epoch. None when there is nothing to do.

        Best means: the worker's own class before smaller ones (`gpu_classes` in that order), higher priority, the
        tenant that is next by a fair share (`quotas.py`), then the oldest job (an interrupted one keeps its place).
        Preparing data needs no GPU, so there classes do not count. A paused job is not eligible, nor is one whose
        tenant's quotas let nothing more begin.
        """
        query, passed_over = _best_queued(stage, tuple(gpu_classes), self._quotas), list[str]()
        while True:
            # Another transaction for each tenant that turns out to be at its quota: a claim that held what it counts
            # runs under for one tenant and waited for another's could wait for a claim that does it the other way.
            with self._database.writing() as connection:
                best = connection.execute(query, {"passed_over": passed_over}).mappings().one_or_none()
                if best is None:
                    return None
                if stage is not Stage.TRAIN or may_run_another(connection, best["tenant"], best["most_running"]):
                    return self._take(connection, best, worker, stage)
                passed_over.append(best["tenant"])

    def _take(self, connection: Connection, best: RowMapping, worker: str, stage: Stage) -> Job:
        epoch = best["epoch"] + 1
        row = compare_and_set(
            connection,
            best["id"],
            best["epoch"],
            JobState.QUEUED,
            state=JobState.RUNNING.value,
            epoch=epoch,
            attempt=best["attempt"] + 1,
            worker=worker,
            phase=Phase.FETCHING.value,
            claimed_at=now(),
            started_at=best["started_at"] or now(),
            lease_expires_at=now() + self._lease,
            sweep_at=now() + SWEEP_EVERY.total_seconds(),
        )
        message = _CLAIMED[stage]
        facts = {"worker": worker, "stage": stage.value, "attempt": row["attempt"]}
        add_event(connection, row["id"], epoch, "claimed", message, data=facts)
        return job_from(row)

    def renew(self, job_id: str, epoch: int) -> Orders:
        """Hold the lease for another full length from now, by the database's clock.

        Raises:
            LeaseLost: Another epoch owns the job, or it has ended.
        """
        with self._database.writing() as connection:
            row = compare_and_set(connection, job_id, epoch, JobState.RUNNING, lease_expires_at=now() + self._lease)
        return _orders(row)

    def orders(self, job_id: str, epoch: int) -> Orders:
        """Look, without renewing, whether the job is to be cancelled or paused.

        Raises:
            LeaseLost: Another epoch owns the job, or it has ended.
        """
        this = {"job": job_id, "by": epoch}
        with self._database.reading() as connection:
            row = connection.execute(_ORDERS, this).mappings().one_or_none()
        if row is None:
            raise LeaseLost(job_id=job_id, epoch=epoch)
        return _orders(row)

    def record_phase(self, job_id: str, epoch: int, phase: Phase) -> None:
        """Say what the epoch is busy with."""
        with self._database.writing() as connection:
            compare_and_set(connection, job_id, epoch, JobState.RUNNING, phase=phase.value)
            add_event(connection, job_id, epoch, "phase", f"Now {phase.value}.", data={"phase": phase.value})

    def record_progress(
        self, job_id: str, epoch: int, *, progress: dict[str, Any], metrics: dict[str, Any], steps: list[dict[str, Any]]
    ) -> None:
        """Show how far the epoch is; `steps` become `metrics` events, oldest first."""
        with self._database.writing() as connection:
            row = compare_and_set(connection, job_id, epoch, JobState.RUNNING, progress=progress)
            compare_and_set(connection, job_id, epoch, JobState.RUNNING, metrics={**row["metrics"], **metrics})
            for step in steps:
                add_event(connection, job_id, epoch, "metrics", f"Step {step['step']}.", data=step)

    def record_warning(self, job_id: str, epoch: int, code: str, message: str) -> None:
        """Tell the user of something that stops nothing; the same warning is told once."""
        warning = {"code": code, "message": message}
        with self._database.writing() as connection:
            row = compare_and_set(connection, job_id, epoch, JobState.RUNNING, epoch=epoch)
            if warning not in row["warnings"]:
                compare_and_set(connection, job_id, epoch, JobState.RUNNING, warnings=[*row["warnings"], warning])
                add_event(connection, job_id, epoch, "warning", message, level="warning", data=warning)

    def record_note(self, job_id: str, epoch: int, message: str) -> None:
        """Tell of something harmless, in the history alone."""
        with self._database.writing() as connection:
            compare_and_set(connection, job_id, epoch, JobState.RUNNING, epoch=epoch)
            add_event(connection, job_id, epoch, "note", message)

    def commit_checkpoint(self, job_id: str, epoch: int, checkpoint: Checkpoint) -> None:
        """Make a checkpoint the one that a later epoch goes on from.

        Raises:
            LeaseLost: Another epoch owns the job, or it has ended.
            ValueError: The checkpoint lies behind the one committed before.
        """
        with self._database.writing() as connection:
            row = compare_and_set(
                connection,
                job_id,
                epoch,
                JobState.RUNNING,
                lease_expires_at=now() + self._lease,
            )
            last = job_from(row).checkpoint
            if last is not None and checkpoint.step < last.step:
                raise ValueError(f"checkpoint of step {checkpoint.step} is behind the committed step {last.step}")
            compare_and_set(connection, job_id, epoch, JobState.RUNNING, checkpoint=checkpoint_values(checkpoint))
            facts = {"step": checkpoint.step, "size": checkpoint.object.size, "sha256": checkpoint.object.sha256}
            add_event(connection, job_id, epoch, "checkpoint", f"Step {checkpoint.step} was saved.", data=facts)

    def hand_to_training(self, job_id: str, epoch: int, prepared: dict[str, Any]) -> Job:
        """Give the prepared job back to the queue, for training; attempts are counted anew.

        Raises:
            LeaseLost: Another epoch owns the job, or it has ended.
        """
        told = {name: found for name, found in prepared["report"].items() if name != "first_rows"}
        with self._database.writing() as connection:
            count_run(connection, job_id, epoch)
            row = compare_and_set(
                connection,
                job_id,
                epoch,
                JobState.RUNNING,
                **_given_back(),
                stage=Stage.TRAIN.value,
                prepared=prepared,
                attempt=0,
                runs_without_progress=0,
            )
            add_event(connection, job_id, epoch, "prepared", "The data is ready for training.", data=told)
            if row["cancel_requested"]:
                row = _end(connection, row, JobState.CANCELLED, "The job was cancelled.")
            elif row["pause_requested"]:
                add_event(connection, job_id, epoch, "paused", "The job was paused before its training.")
            return job_from(row)

    def settle_success(
        self, job_id: str, epoch: int, *, adapter: dict[str, Any], metrics: dict[str, Any], memory: dict[str, Any]
    ) -> None:
        """End the job as succeeded and point it at this epoch's adapter. First commit wins against a cancel's settle.

        Raises:
            LeaseLost: Another epoch owns the job, or it has ended.
        """
        with self._database.writing() as connection:
            count_run(connection, job_id, epoch)
            row = compare_and_set(
                connection,
                job_id,
                epoch,
                JobState.RUNNING,
                state=JobState.SUCCEEDED.value,
                adapter=adapter,
                memory=memory,
                finished_at=now(),
                gpu_seconds=_gpu_seconds(),
                **_no_lease(),
            )
            compare_and_set(connection, job_id, epoch, JobState.SUCCEEDED, metrics={**row["metrics"], **metrics})
            message = "The adapter was stored and proven."
            add_event(connection, job_id, epoch, "succeeded", message, data={"adapter": adapter, "metrics": metrics})
            put_in_outbox(connection, row, JobState.SUCCEEDED)

    def settle_failure(self, job_id: str, epoch: int, failure: Failure, *, replanned: Placement | None = None) -> Job:
        """End this run; the job goes back to the queue, or ends, as `after_failure` decides.

        Args:
            replanned: How the job goes on where its plan ran out of memory.

        Raises:
            LeaseLost: Another epoch owns the job, or it has ended.
        """
        with self._database.writing() as connection:
            count_run(connection, job_id, epoch)
            row = compare_and_set(
                connection, job_id, epoch, JobState.RUNNING, gpu_seconds=_gpu_seconds(), **_no_lease()
            )
            return job_from(_after(connection, row, failure, epoch, replanned))

    def settle_cancelled(self, job_id: str, epoch: int) -> Job:
        """End the job as cancelled, once nothing of it runs any more.

        Raises:
            LeaseLost: Another epoch owns the job, or it has ended.
        """
        with self._database.writing() as connection:
            count_run(connection, job_id, epoch)
            row = compare_and_set(
                connection, job_id, epoch, JobState.RUNNING, gpu_seconds=_gpu_seconds(), **_no_lease()
            )
            return job_from(
                _end(connection, row, JobState.CANCELLED, "The job was cancelled; its training has stopped.")
            )

    def read(self, job_id: str) -> Job | None:
        """Return the row as it is: how a worker learns what became of a commit whose answer was lost."""
        with self._database.reading() as connection:
            row = connection.execute(select(jobs).where(jobs.c.id == job_id)).mappings().one_or_none()
        return job_from(row) if row is not None else None

    def release_of(self, worker: str, place: str) -> list[Job]:
        """Give back the leases of an earlier life of this worker, at once.

        Only what was claimed since the name is this place's: a worker elsewhere that had it before, and is cut off,
        may train until its lease has run out.
        """
        named = exists().where(
            workers.c.name == name_of(worker), workers.c.place == place, workers.c.started_at <= jobs.c.claimed_at
        )
        return self._fence(and_(jobs.c.worker == worker, named), f"Worker {worker} was restarted.")

    def release_expired(self) -> list[Job]:
        """Give back every lease that has run out, by the database's clock."""
        return self._fence(jobs.c.lease_expires_at < now_once(), "The worker was not heard of for a whole lease.")

    def take_lost_bells(self, older_than: timedelta, idle: Sequence[LiveWorker]) -> list[LostBell]:
        """Return queued jobs whose bell is old, at most one for each of these workers, and one that it may take.

        They are marked as rung now, so that of many reconcilers one rings.
        """
        with self._database.writing() as connection:
            due = [row for kind in _kinds_taken(idle) for row in connection.execute(_due(kind, older_than, len(idle)))]
            bells = _one_for_each(sorted(due, key=lambda row: (-row.priority, row.created_at)), idle)
            rung = update(jobs).where(jobs.c.id.in_([bell.job_id for bell in bells])).values(bell_rung_at=now())
            if bells:
                connection.execute(rung)
        return bells

    def mark_rung(self, *job_ids: str) -> None:
        """Remember that the bells of these jobs were rung just now."""
        rung = update(jobs).where(jobs.c.id.in_(sorted(job_ids))).values(bell_rung_at=now())
        with self._database.writing() as connection:
            connection.execute(rung)

    def _fence(self, whose: ColumnElement[bool], message: str) -> list[Job]:
        """Each in a transaction of its own: whoever holds one job, or its tenant's account, holds up no other."""
        failure = Failure(reason=FailureReason.WORKER_LOST, message=message)
        fenced = []
        with self._database.reading() as connection:
            held = select(jobs.c.id).where(jobs.c.state == JobState.RUNNING.value, whose)
            found = connection.execute(held.order_by(jobs.c.lease_expires_at)).scalars().all()
        for job_id in found:
            try:
                fenced += self._fence_one(job_id, whose, failure)
            except StoreUnavailable as error:
                facts = {"job_id": job_id, "reason": error.message}
                log_event(logger, "lease_not_given_back", level=logging.WARNING, **facts)
        return fenced

    def _fence_one(self, job_id: str, whose: ColumnElement[bool], failure: Failure) -> list[Job]:
        """Nothing where somebody else is at it, or was."""
        with self._database.writing() as connection:
            wait_at_most(connection, FENCE_WAIT_SECONDS)
            query = select(jobs.c.epoch).where(jobs.c.id == job_id, jobs.c.state == JobState.RUNNING.value, whose)
            epoch = connection.execute(query.with_for_update(skip_locked=True)).scalar_one_or_none()
            if epoch is None:
                return []
            count_run(connection, job_id, epoch)
            taken_off = {"epoch": epoch + 1, "gpu_seconds": _gpu_seconds(), **_no_lease()}
            row = compare_and_set(connection, job_id, epoch, JobState.RUNNING, **taken_off)
            return [job_from(_after(connection, row, failure, epoch))]


# Built once, as `rows.py` says: every worker asks it each second.
_ORDERS = select(jobs.c.cancel_requested, jobs.c.pause_requested).where(
    jobs.c.id == bindparam("job"), jobs.c.epoch == bindparam("by"), jobs.c.state == JobState.RUNNING.value
)

_CLAIMED = {
    Stage.PREPARE: "Preparing the data began.",
    Stage.TRAIN: "Training was taken up.",
    Stage.MERGE: "Merging began.",
}

_Kind = tuple[Stage, str | None]
"""A queue: a stage, and the class of its jobs where that matters."""


def _kinds_taken(idle: Sequence[LiveWorker]) -> list[_Kind]:
    kinds: set[_Kind] = set()
    for worker in idle:
        kinds.update((stage, None) for stage in worker.stages if stage is not Stage.TRAIN)
        if Stage.TRAIN in worker.stages:
            kinds.update((Stage.TRAIN, gpu_class) for gpu_class in worker.takes_classes)
    return sorted(kinds, key=str)  # in one order, so that two reconcilers do not wait for each other


def _due(kind: _Kind, older_than: timedelta, limit: int) -> Any:
    stage, gpu_class = kind
    due = select(jobs.c.id, jobs.c.stage, jobs.c.gpu_class, jobs.c.priority, jobs.c.created_at).where(
        _may_be_claimed(stage),
        jobs.c.gpu_class == gpu_class if gpu_class is not None else true(),
        or_(jobs.c.bell_rung_at.is_(None), jobs.c.bell_rung_at < now_once() - older_than.total_seconds()),
    )
    due = due.order_by(jobs.c.priority.desc(), jobs.c.created_at).limit(limit)
    return due.with_for_update(skip_locked=True)


def _one_for_each(due: Sequence[Row[Any]], idle: Sequence[LiveWorker]) -> list[LostBell]:
    """Pair jobs with workers, in the jobs' order; one that could take less is chosen before one that could more."""
    free = sorted(idle, key=lambda worker: len(worker.takes_classes))
    bells = []
    for row in due:
        bell = LostBell(job_id=row.id, stage=Stage(row.stage), gpu_class=row.gpu_class)
        able = next((worker for worker in free if worker.takes(bell.stage, bell.gpu_class)), None)
        if able is not None:
            free.remove(able)
            bells.append(bell)
    return bells


@cache
def _best_queued(stage: Stage, gpu_classes: tuple[str, ...], quotas: Quotas) -> Any:
    """What a worker asks of the queue again and again, so that it is built once."""
    standing = Standing(stage, quotas)
    others = jobs.c.tenant.not_in(bindparam("passed_over", expanding=True))
    eligible = and_(_may_be_claimed(stage), standing.may_begin, others)
    order = [jobs.c.priority.desc(), *standing.order, jobs.c.created_at, jobs.c.id]
    if stage is Stage.TRAIN:
        eligible = and_(eligible, jobs.c.gpu_class.in_(gpu_classes))
        ranks = {name: rank for rank, name in enumerate(gpu_classes)}
        order.insert(0, case(ranks, value=jobs.c.gpu_class, else_=literal(len(ranks))))
    facts = (jobs.c.id, jobs.c.tenant, jobs.c.epoch, jobs.c.attempt, jobs.c.started_at)  # rows are wide: no more
    best = select(*facts, standing.most_running.label("most_running")).select_from(standing.beside(jobs))
    return best.where(eligible).order_by(*order).limit(1).with_for_update(skip_locked=True, of=jobs)


def _may_be_claimed(stage: Stage) -> ColumnElement[bool]:
    return and_(
        jobs.c.state == JobState.QUEUED.value,
        jobs.c.stage == stage.value,
        jobs.c.not_before <= now_once(),
        ~jobs.c.pause_requested,
    )


def _given_back() -> dict[str, Any]:
    return {"state": JobState.QUEUED.value, "bell_rung_at": None, **_no_lease()}


def _no_lease() -> dict[str, Any]:
    return {"worker": None, "lease_expires_at": None, "phase": None}


def _orders(row: RowMapping) -> Orders:
    return Orders(cancel=row["cancel_requested"], pause=row["pause_requested"])


def _gpu_seconds() -> ColumnElement[float]:
    """The column with the run that ends here added; to be set once a run, and not by what may be applied twice."""
    held = case((jobs.c.stage == Stage.TRAIN.value, held_seconds()), else_=literal(0.0))
    return jobs.c.gpu_seconds + held


def _after(
    connection: Connection, row: RowMapping, failure: Failure, failed_epoch: int, replanned: Placement | None = None
) -> RowMapping:
    """Carry out what `after_failure` decides for a running row whose lease has been taken off."""
    decided = after_failure(
        failure.reason,
        attempt=row["attempt"],
        max_attempts=row["max_attempts"],
        runs_without_progress=row["runs_without_progress"],
        made_progress=_made_progress(row, failed_epoch),
        cancel_requested=row["cancel_requested"],
        replanned=replanned is not None,
    )
    counts = {"attempt": decided.attempt, "runs_without_progress": decided.runs_without_progress}
    facts = {**failure.facts, "reason": failure.reason.value, "attempt": row["attempt"]}
    if decided.state is JobState.QUEUED:
        facts["epoch"] = row["epoch"]  # the row's from now on: a fenced one is past the epoch that failed
        remedy = REMEDIES[failure.reason]
        is_charged = remedy.retry is Retry.CHARGED and replanned is None
        delays = remedy.delays * 2 ** (row["attempt"] - 1) if is_charged else 0
        values = {**_given_back(), **counts, "not_before": now() + delays * RETRY_DELAY_SECONDS}
        if replanned is not None:
            values |= _replanned(row, replanned)
        before, row = row, compare_and_set(connection, row["id"], row["epoch"], JobState.RUNNING, **values)
        _tell_of_return(connection, row, failure, failed_epoch, facts)
        if replanned is not None:
            changed = {"from": _plan_of(before), "to": _plan_of(row)}
            add_event(
                connection, row["id"], failed_epoch, "replanned", replanned.summary, level="warning", data=changed
            )
        return row
    row = compare_and_set(connection, row["id"], row["epoch"], JobState.RUNNING, **counts)
    if decided.state is JobState.CANCELLED:
        return _end(connection, row, JobState.CANCELLED, "The job was cancelled.", data=facts)
    return _end(connection, row, JobState.FAILED, failure.message, error=_error(failure), data=facts)


def _tell_of_return(
    connection: Connection, row: RowMapping, failure: Failure, failed_epoch: int, facts: dict[str, Any]
) -> None:
    """Say why a job is in the queue again; a pause that its worker obeyed is told as such and as nothing else."""
    is_paused, by_pause = row["pause_requested"], failure.reason is FailureReason.PAUSED
    if not (is_paused and by_pause):
        message = "It was resumed while its worker was leaving." if by_pause else failure.message
        level = "info" if by_pause else "warning"
        add_event(connection, row["id"], failed_epoch, "requeued", message, level=level, data=facts)
    if is_paused:
        add_event(connection, row["id"], failed_epoch, "paused", "The job was paused; no worker is at it.", data=facts)


def _made_progress(row: RowMapping, failed_epoch: int) -> bool:
    """Whether the epoch has brought a checkpoint; the one before the first step proves the bucket, and no more."""
    checkpoint = row["checkpoint"]
    return checkpoint is not None and checkpoint["epoch"] == failed_epoch and checkpoint["step"] > 0


def _replanned(row: RowMapping, placement: Placement) -> dict[str, Any]:
    estimated = {"estimate": placement.estimate.to_dict(), "gpu": placement.gpu_class.facts}
    warning = {"code": "replanned", "message": placement.summary}
    return {
        "plan": placement.plan.to_dict(),
        "gpu_class": placement.gpu_class.name,
        "placement": {**row["placement"], **estimated},
        "warnings": [*row["warnings"], warning],
    }


def _plan_of(row: RowMapping) -> dict[str, Any]:
    predicted = row["placement"].get("estimate", {}).get("expected_bytes")
    return {"gpu_class": row["gpu_class"], "plan": row["plan"], "predicted_peak_bytes": predicted}


def _end(
    connection: Connection,
    row: RowMapping,
    state: JobState,
    message: str,
    *,
    error: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
) -> RowMapping:
    """Move a row that holds no lease to its last state, with its one terminal event."""
    present = JobState(row["state"])
    values = {"state": state.value, "error": error, "finished_at": now()}
    ended = compare_and_set(connection, row["id"], row["epoch"], present, **values)
    level = "error" if state is JobState.FAILED else "info"
    add_event(connection, row["id"], row["epoch"], state.value, message, level=level, data=data)
    put_in_outbox(connection, row, state)
    return ended


def _error(failure: Failure) -> dict[str, Any]:
    remedy = REMEDIES[failure.reason]
    return {
        "code": failure.reason.value,
        "message": f"{failure.message.rstrip('. ')}. {remedy.advice}",
        "category": remedy.fault.value,
        "param": failure.param,
        **({"facts": asdict(failure)["facts"]} if failure.facts else {}),
    }

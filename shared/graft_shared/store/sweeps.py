"""Which jobs may have left something in the bucket that no row needs, and when to look for it next."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import and_, case, delete, exists, null, select, update

from graft_shared.jobs import TERMINAL_STATES, JobState
from graft_shared.store.engine import Database, now
from graft_shared.store.tables import jobs, webhooks

SWEEP_EVERY = timedelta(seconds=60)  # while a job runs, and after a claim: checkpoints come no faster by themselves
SWEEP_AGAIN = timedelta(minutes=5)  # after a sweep that was begun and not finished


@dataclass(frozen=True, kw_only=True)
class DueSweep:
    """One job to look at, taken by one sweeper for a while."""

    job_id: str
    tenant: str
    mark: float  # what its `sweep_at` says while it is taken


class Sweeps:
    """Jobs as sweepers see them: every claim makes one due, and it stays so until long after the job's end."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def take(self, *, limit: int) -> list[DueSweep]:
        """Take the jobs that have been due for longest; whoever dies over one loses it to others after a while."""
        due = select(jobs.c.id).where(jobs.c.sweep_at <= now()).order_by(jobs.c.sweep_at).limit(limit)
        with self._database.writing() as connection:
            ids = connection.execute(due.with_for_update(skip_locked=True)).scalars().all()
            if not ids:
                return []
            taken = (
                update(jobs)
                .where(jobs.c.id.in_(ids))
                .values(sweep_at=now() + SWEEP_AGAIN.total_seconds())
                .returning(jobs.c.id, jobs.c.tenant, jobs.c.sweep_at)
            )
            rows = connection.execute(taken).all()
        return [DueSweep(job_id=row.id, tenant=row.tenant, mark=row.sweep_at) for row in rows]

    def finish(self, sweep: DueSweep, *, grace: timedelta) -> None:
        """Say that a job was swept: a running one is due again soon, one that waits or has just ended after `grace`.

        One that had ended for so long when its sweep began is never due again, and if it was deleted, its row goes: no
        object is left that it would have to tell of, and its webhook was delivered or given up; until then it is due
        after `grace` again. A job that was claimed meanwhile is due when its claim says.
        """
        told = ~exists().where(webhooks.c.job_id == jobs.c.id, webhooks.c.next_try_at.is_not(None))
        was_deleted = jobs.c.deleted_at.is_not(None)
        ended = jobs.c.state.in_([state.value for state in TERMINAL_STATES])
        later = now() + grace.total_seconds()
        last_look_at = jobs.c.finished_at + grace.total_seconds()
        began_at = sweep.mark - SWEEP_AGAIN.total_seconds()
        again_at = case(
            (jobs.c.state == JobState.RUNNING.value, now() + SWEEP_EVERY.total_seconds()),
            (ended, case((last_look_at > began_at, last_look_at), (and_(was_deleted, ~told), later), else_=null())),
            else_=later,
        )
        this = and_(jobs.c.id == sweep.job_id, jobs.c.sweep_at == sweep.mark)
        done_with = delete(jobs).where(this, was_deleted, told, last_look_at <= began_at)
        with self._database.writing() as connection:
            if not connection.execute(done_with).rowcount:
                connection.execute(update(jobs).where(this).values(sweep_at=again_at))

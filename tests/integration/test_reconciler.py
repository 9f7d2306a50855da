"""The reconciler: what time leaves behind is picked up, by whichever of many copies comes first."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path

from sqlalchemy import update

from graft_shared.jobs import JobState, Stage
from graft_shared.reconciler import Reconciler
from graft_shared.store import Database, Jobs, Leases, open_database
from graft_shared.store.engine import now
from graft_shared.store.migrate import migrate
from graft_shared.store.tables import jobs as jobs_table
from tests.fakes.doorbell import FakeDoorbell
from tests.store_factories import a_new_job
from tests.waiting import wait_until


def reconciler(database: Database, bell: FakeDoorbell) -> Reconciler:
    return Reconciler(Leases(database, timedelta(seconds=60)), bell, bell_again=timedelta(seconds=30))


def test_a_job_whose_worker_was_lost_is_queued_again_and_rung(database: Database) -> None:
    jobs, bell = Jobs(database), FakeDoorbell()
    job, _ = jobs.submit(a_new_job())
    Leases(database, timedelta(seconds=60)).claim("w", stage=Stage.PREPARE, gpu_classes=[])
    reconciler(database, bell).reconcile()
    assert (jobs.get("default", job.id).state, bell.rung) == (JobState.RUNNING, [])
    with database.writing() as connection:
        connection.execute(update(jobs_table).values(lease_expires_at=now() - 1))
    reconciler(database, bell).reconcile()
    assert jobs.get("default", job.id).state is JobState.QUEUED
    assert bell.rung == [(job.id, "cpu")]


def test_a_bell_that_was_never_rung_is_rung_once_by_two_reconcilers(database: Database) -> None:
    job, _ = Jobs(database).submit(a_new_job())
    bell = FakeDoorbell()
    for _ in range(2):
        reconciler(database, bell).reconcile()
    assert bell.rung == [(job.id, "cpu")]


def test_a_database_that_is_away_is_waited_for(tmp_path: Path) -> None:
    bell, stop = FakeDoorbell(), threading.Event()
    database = open_database(f"sqlite:///{tmp_path / 'graft.db'}")  # its tables do not exist yet: every pass fails
    running = threading.Thread(target=reconciler(database, bell).run, args=[timedelta(milliseconds=20), stop])
    running.start()
    migrate(database)
    job, _ = Jobs(database).submit(a_new_job())
    wait_until(lambda: bell.rung == [(job.id, "cpu")], seconds=20, what="the bell")
    stop.set()
    running.join(timeout=10)
    assert not running.is_alive()
    database.close()

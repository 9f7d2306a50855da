"""The reconciler: what time leaves behind is picked up, by whichever of many copies comes first."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select, update

from graft_shared.artifacts import prepared_key
from graft_shared.buckets.directory import DirectoryBucket
from graft_shared.jobs import JobState, Stage
from graft_shared.reconciler import Reconciler, run_beside
from graft_shared.store import Database, Jobs, Leases, Workers, open_database
from graft_shared.store.engine import now
from graft_shared.store.migrate import migrate
from graft_shared.store.tables import jobs as jobs_table
from graft_shared.store.tables import workers as workers_table
from tests.fakes.doorbell import FakeDoorbell
from tests.store_factories import a_beat, a_new_job
from tests.waiting import free_port, wait_until


def reconciler(database: Database, bell: FakeDoorbell) -> Reconciler:
    return Reconciler(
        leases=Leases(database, timedelta(seconds=60)),
        workers=Workers(database),
        doorbell=bell,
        bell_again=timedelta(seconds=30),
    )


def test_no_more_bells_are_rung_than_workers_are_idle(database: Database) -> None:
    jobs, workers, bell = Jobs(database), Workers(database), FakeDoorbell()
    for _ in range(6):
        jobs.submit(a_new_job())
    for name in ("a", "b", "c"):
        workers.beat(**a_beat(name, stages=(Stage.PREPARE,)))
    Leases(database, timedelta(seconds=60)).claim("a/prepare", stage=Stage.PREPARE, gpu_classes=[])
    reconciler(database, bell).reconcile()
    assert len(bell.rung) == 2
    reconciler(database, bell).reconcile()
    assert len(bell.rung) == 4, "the next pass goes on with the others"


def queued_for_training(database: Database, *gpu_classes: str) -> list[str]:
    """Jobs that wait for a trainer of these classes, the oldest first."""
    jobs, leases = Jobs(database), Leases(database, timedelta(seconds=60))
    ids = []
    for gpu_class in gpu_classes:
        ids.append(jobs.submit(a_new_job(gpu_class=gpu_class))[0].id)
        prepared = leases.claim("preparer/prepare", stage=Stage.PREPARE, gpu_classes=[])
        assert prepared is not None
        leases.hand_to_training(prepared.id, prepared.epoch, {"report": {}})
    return ids


def test_jobs_of_a_class_that_nobody_serves_keep_no_bell_from_others(database: Database) -> None:
    bell = FakeDoorbell()
    *_, live = queued_for_training(database, *["80gb"] * 5, "24gb")
    Workers(database).beat(**a_beat(gpu_class="24gb"))
    reconciler(database, bell).reconcile()
    assert bell.rung == [(live, "24gb")]


def test_idle_workers_that_prepare_are_rung_for_no_training(database: Database) -> None:
    bell = FakeDoorbell()
    first, *_ = queued_for_training(database, *["24gb"] * 3)
    for number in range(3):
        Workers(database).beat(**a_beat(f"p{number}", stages=(Stage.PREPARE,), takes_classes=("24gb",)))
    reconciler(database, bell).reconcile()
    assert bell.rung == []
    Workers(database).beat(**a_beat(gpu_class="24gb"))
    reconciler(database, bell).reconcile()
    assert bell.rung == [(first, "24gb")]


def test_a_large_gpu_is_left_to_the_job_that_only_it_can_take(database: Database) -> None:
    bell = FakeDoorbell()
    small, large, _ = queued_for_training(database, "24gb", "80gb", "24gb")
    Workers(database).beat(**a_beat("a", gpu_class="80gb", takes_classes=("80gb", "24gb")))
    Workers(database).beat(**a_beat("b", gpu_class="24gb"))
    reconciler(database, bell).reconcile()
    assert bell.rung == [(small, "24gb"), (large, "80gb")]


def test_a_worker_not_seen_for_a_day_is_forgotten(database: Database) -> None:
    for name in ("gone", "here"):
        Workers(database).beat(**a_beat(name))
    with database.writing() as connection:
        connection.execute(update(workers_table).where(workers_table.c.name == "gone").values(seen_at=now() - 90_000))
    reconciler(database, FakeDoorbell()).reconcile()
    with database.reading() as connection:
        assert connection.execute(select(workers_table.c.name)).scalars().all() == ["here"]


def test_a_job_whose_worker_was_lost_is_queued_again_and_rung(database: Database) -> None:
    jobs, bell = Jobs(database), FakeDoorbell()
    job, _ = jobs.submit(a_new_job())
    Workers(database).beat(**a_beat("p", stages=(Stage.PREPARE,)))
    Leases(database, timedelta(seconds=60)).claim("w", stage=Stage.PREPARE, gpu_classes=[])
    reconciler(database, bell).reconcile()
    assert (jobs.get("default", job.id).state, bell.rung) == (JobState.RUNNING, [])
    with database.writing() as connection:
        connection.execute(update(jobs_table).values(lease_expires_at=now() - 1))
    reconciler(database, bell).reconcile()
    assert jobs.get("default", job.id).state is JobState.QUEUED
    assert bell.rung == [(job.id, "prepare")]


def test_a_bell_that_was_never_rung_is_rung_once_by_two_reconcilers(database: Database) -> None:
    job, _ = Jobs(database).submit(a_new_job())
    bell = FakeDoorbell()
    Workers(database).beat(**a_beat("p", stages=(Stage.PREPARE,)))
    for _ in range(2):
        reconciler(database, bell).reconcile()
    assert bell.rung == [(job.id, "prepare")]


def test_a_database_that_is_away_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bell, stop = FakeDoorbell(), threading.Event()
    database = open_database(f"sqlite:///{tmp_path / 'graft.db'}")  # its tables do not exist yet: every pass fails
    passed = tmp_path / "passed"
    running = threading.Thread(target=reconciler(database, bell).run, args=[timedelta(milliseconds=20), stop, passed])
    running.start()
    wait_until(lambda: "reconcile_postponed" in caplog.messages, seconds=20, what="a pass that failed")
    assert not passed.exists()
    migrate(database)
    Workers(database).beat(**a_beat("p", stages=(Stage.PREPARE,)))
    job, _ = Jobs(database).submit(a_new_job())
    wait_until(lambda: bell.rung == [(job.id, "prepare")], seconds=20, what="the bell")
    wait_until(passed.exists, seconds=20, what="the mark of a pass")
    stop.set()
    running.join(timeout=10)
    assert not running.is_alive()
    database.close()


def test_what_ends_one_loop_of_a_reconciler_ends_it_whole() -> None:
    stop = threading.Event()

    def breaks() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_beside(stop, stop.wait, breaks)
    assert stop.is_set()


def test_a_reconciler_sweeps_the_bucket_that_it_is_told_of_and_leaves_when_it_is_told_to(
    sqlite_url: str, tmp_path: Path
) -> None:
    database = open_database(sqlite_url)
    migrate(database)
    bucket = DirectoryBucket(tmp_path / "state" / "bucket")
    Jobs(database).submit(a_new_job())
    job = Leases(database, timedelta(seconds=60)).claim("w", stage=Stage.PREPARE, gpu_classes=[])
    assert job is not None
    bucket.put_bytes(prepared_key(job.tenant, job.id, job.epoch, "train.safetensors"), b"tokens")
    Jobs(database).cancel(job.tenant, job.id)
    Leases(database, timedelta(seconds=60)).settle_cancelled(job.id, job.epoch)
    with database.writing() as connection:
        connection.execute(update(jobs_table).values(sweep_at=now()))
    settings = {"STATE_DIR": str(tmp_path / "state"), "DATABASE_URL": sqlite_url, "SWEEP_SECONDS": "0.1"}
    settings |= {"RECONCILE_SECONDS": "3600", "METRICS_PORT": str(free_port())}
    began = time.time()
    environment = os.environ | {f"GRAFT_{name}": value for name, value in settings.items()}
    with subprocess.Popen([sys.executable, "-m", "graft_shared.reconciler"], env=environment) as process:
        try:
            wait_until(lambda: list(bucket.list("")) == [], what="the sweep")
            shown = httpx.get(f"http://127.0.0.1:{settings['METRICS_PORT']}/metrics").text
            last = re.findall(r'last_pass_timestamp_seconds{kind="reconcile"} (\S+)', shown)
            assert [float(moment) > began for moment in last] == [True], "none was done: it is missed since the start"
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()
    database.close()

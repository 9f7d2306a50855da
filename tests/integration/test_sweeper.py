"""Sweeping: what no row needs leaves the bucket, and nothing else does, whoever sweeps beside whom."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import select, update

from graft_shared.artifacts import adapter_prefix, checkpoint_key, log_key, prepared_key
from graft_shared.buckets import Bucket
from graft_shared.buckets.directory import DirectoryBucket
from graft_shared.errors import BucketUnavailable, FileNotFound, JobNotFound, UploadExpired
from graft_shared.jobs import Checkpoint, Failure, FailureReason, Job, Stage, StoredObject
from graft_shared.store import UPLOAD_LIFE, Database, Files, Jobs, Leases, Outbox, Sweeps
from graft_shared.store.sweeps import SWEEP_AGAIN, SWEEP_EVERY
from graft_shared.store.tables import job_events as events_table
from graft_shared.store.tables import jobs as jobs_table
from graft_shared.store.tables import uploads as uploads_table
from graft_shared.sweeper import OBJECTS_PER_JOB, Sweeper
from tests.store_factories import a_new_job

GRACE = timedelta(hours=1)
LOST = Failure(reason=FailureReason.WORKER_LOST, message="It was lost")
USERS = Failure(reason=FailureReason.LOSS_NOT_FINITE, message="No number")


class Service:
    """A store, a bucket and sweepers; the test is the worker, and moves the clock."""

    def __init__(self, database: Database, bucket: Bucket) -> None:
        self.database, self.bucket = database, bucket
        self.jobs, self.leases, self.files = Jobs(database), Leases(database, timedelta(seconds=60)), Files(database)

    def sweeper(self, bucket: Bucket | None = None) -> Sweeper:
        sweeps = Sweeps(self.database)
        return Sweeper(sweeps=sweeps, leases=self.leases, files=self.files, bucket=bucket or self.bucket, grace=GRACE)

    def sweep(self) -> None:
        self.sweeper().sweep(threading.Event())

    def let_pass(self, time: timedelta) -> None:
        """Move everything that was written down into the past."""
        with self.database.writing() as connection:
            for column in (jobs_table.c.sweep_at, jobs_table.c.finished_at):
                connection.execute(update(jobs_table).values({column: column - time.total_seconds()}))
            earlier = {uploads_table.c.started_at: uploads_table.c.started_at - time.total_seconds()}
            connection.execute(update(uploads_table).values(earlier))

    def due_at(self, job: Job) -> float | None:
        """When the job is swept next, in seconds from now."""
        with self.database.reading() as connection:
            at = connection.execute(select(jobs_table.c.sweep_at).where(jobs_table.c.id == job.id)).scalar_one()
        return None if at is None else at - self.database.now().timestamp()

    def prepared(self) -> Job:
        """A job whose data was prepared by its first epoch: it waits for a trainer."""
        job, _ = self.jobs.submit(a_new_job())
        claimed = self.leases.claim("p", stage=Stage.PREPARE, gpu_classes=[])
        assert claimed is not None and claimed.id == job.id
        train = self.bucket.put_bytes(prepared_key("default", job.id, 1, "train.safetensors"), b"tokens")
        return self.leases.hand_to_training(job.id, 1, {"report": {}, "train": asdict(train)})

    def train(self, job: Job, *steps: int) -> Job:
        """Claim the job and commit these checkpoints; one more lies there, uploaded and not committed."""
        claimed = self.leases.claim("t", stage=Stage.TRAIN, gpu_classes=["cpu"])
        assert claimed is not None and claimed.id == job.id
        self.bucket.put_bytes(log_key("default", job.id, claimed.epoch), b"log")
        for step in steps:
            stored = self.write_checkpoint(claimed, step)
            checkpoint = Checkpoint(step=step, epoch=claimed.epoch, object=stored)
            self.leases.commit_checkpoint(job.id, claimed.epoch, checkpoint)
        self.write_checkpoint(claimed, max(steps) + 1)
        return claimed

    def write_checkpoint(self, job: Job, step: int) -> StoredObject:
        return self.bucket.put_bytes(checkpoint_key("default", job.id, job.epoch, step), b"state")

    def succeed(self, job: Job) -> None:
        prefix = adapter_prefix("default", job.id, job.epoch)
        for name in ("adapter_model.safetensors", "manifest.json"):
            self.bucket.put_bytes(prefix + name, b"bytes")
        self.leases.settle_success(job.id, job.epoch, adapter={"prefix": prefix}, metrics={}, memory={})

    def left(self, job: Job) -> list[str]:
        """What lies under the job, without its prefix."""
        prefix = f"tenants/default/jobs/{job.id}/"
        return [key.removeprefix(prefix) for key in self.bucket.list(prefix)]


@pytest.fixture
def service(database: Database, tmp_path: Path) -> Service:
    return Service(database, DirectoryBucket(tmp_path / "bucket"))


def test_a_running_job_keeps_its_data_its_checkpoint_and_the_one_that_is_being_uploaded(service: Service) -> None:
    job = service.train(service.prepared(), 10, 20, 30)
    service.sweep()
    assert len(service.left(job)) == 6, "it was claimed just now"
    service.let_pass(SWEEP_EVERY)
    service.sweep()
    assert service.left(job) == [
        "e1/prepared/train.safetensors",
        "e2/checkpoints/step-30.tar",
        "e2/checkpoints/step-31.tar",
        "e2/trainer.log",
    ]
    assert service.due_at(job) == pytest.approx(SWEEP_EVERY.total_seconds(), abs=30)


def test_what_lost_epochs_left_goes_and_what_a_resume_needs_stays(service: Service) -> None:
    waiting = service.prepared()
    lost = service.train(waiting, 10)
    service.leases.settle_failure(lost.id, lost.epoch, LOST)
    service.let_pass(SWEEP_EVERY)
    service.sweep()
    kept = ["e1/prepared/train.safetensors", "e2/checkpoints/step-10.tar", "e2/trainer.log"]
    assert service.left(lost) == kept
    service.write_checkpoint(lost, 12)
    running = service.train(waiting, 20)
    service.let_pass(SWEEP_EVERY)
    service.sweep()
    assert service.left(running) == [
        "e1/prepared/train.safetensors",
        "e2/trainer.log",
        "e3/checkpoints/step-20.tar",
        "e3/checkpoints/step-21.tar",
        "e3/trainer.log",
    ], "a worker that was cut off wrote in vain"


def test_a_succeeded_job_keeps_its_adapter_its_last_checkpoint_and_its_last_log(service: Service) -> None:
    waiting = service.prepared()
    lost = service.train(waiting, 10)
    service.leases.settle_failure(lost.id, lost.epoch, LOST)
    done = service.train(waiting, 20, 30)
    service.succeed(done)
    service.let_pass(SWEEP_EVERY)
    service.sweep()
    assert service.left(done) == [
        "e3/adapter/adapter_model.safetensors",
        "e3/adapter/manifest.json",
        "e3/checkpoints/step-30.tar",
        "e3/trainer.log",
    ]


@pytest.mark.parametrize("cancelled", [False, True])
def test_of_a_failed_or_cancelled_job_the_last_checkpoint_and_log_can_be_looked_at(
    service: Service, cancelled: bool
) -> None:
    job = service.train(service.prepared(), 10, 20)
    service.bucket.put_bytes(adapter_prefix("default", job.id, job.epoch) + "adapter_config.json", b"half an adapter")
    if cancelled:
        service.leases.settle_cancelled(job.id, job.epoch)
    else:
        service.leases.settle_failure(job.id, job.epoch, USERS)
    service.let_pass(SWEEP_EVERY)
    service.sweep()
    assert service.left(job) == ["e2/checkpoints/step-20.tar", "e2/trainer.log"]


def test_what_a_zombie_writes_after_the_end_goes_after_the_grace_and_then_nobody_looks_again(
    service: Service,
) -> None:
    job = service.train(service.prepared(), 10)
    service.succeed(job)
    service.let_pass(SWEEP_EVERY)
    service.sweep()
    kept = service.left(job)
    service.write_checkpoint(job, 5)
    service.sweep()
    assert len(service.left(job)) == len(kept) + 1, "it is not due"
    assert service.due_at(job) == pytest.approx(GRACE.total_seconds() - SWEEP_EVERY.total_seconds(), abs=30)
    service.let_pass(GRACE)
    service.sweep()
    assert (service.left(job), service.due_at(job)) == (kept, None)


def test_a_job_that_waits_is_looked_at_after_each_grace(service: Service) -> None:
    job = service.prepared()
    for _ in range(2):
        service.bucket.put_bytes(prepared_key("default", job.id, 1, "validation.safetensors"), b"in vain")
        service.let_pass(GRACE)
        service.sweep()
        assert service.left(job) == ["e1/prepared/train.safetensors"]
        assert service.due_at(job) == pytest.approx(GRACE.total_seconds(), abs=30)


def test_objects_of_jobs_that_no_row_knows_are_left_alone(service: Service) -> None:
    job = service.prepared()
    others = ["tenants/default/jobs/ftjob-other/e1/trainer.log", "tenants/default/files/file-other", "someone/else"]
    odd = f"tenants/default/jobs/{job.id}/notes.txt"
    for key in (*others, odd):
        service.bucket.put_bytes(key, b"not ours")
    service.let_pass(GRACE)
    service.sweep()
    assert set(others) | {odd} < set(service.bucket.list(""))


def test_an_upload_without_its_row_is_removed_after_a_day_and_can_never_get_one(service: Service) -> None:
    stored = {}
    for name in ("done", "lost", "late"):
        service.files.announce(f"tenants/default/files/{name}")
        stored[name] = service.bucket.put_bytes(f"tenants/default/files/{name}", b"rows")
    done = service.files.add(id="done", tenant="default", filename="r", object=stored["done"], report={})
    service.sweep()
    assert len(list(service.bucket.list("tenants/default/files/"))) == 3
    service.let_pass(UPLOAD_LIFE)
    with pytest.raises(UploadExpired):
        service.files.add(id="late", tenant="default", filename="r", object=stored["late"], report={})
    service.sweep()
    assert list(service.bucket.list("tenants/default/files/")) == [done.object.key]
    assert service.files.lost_uploads(limit=10) == []


class AwayBucket(DirectoryBucket):
    """A bucket that goes away after some deletes."""

    def __init__(self, root: Path, deletes: int) -> None:
        super().__init__(root)
        self.deletes = deletes

    def delete(self, key: str) -> None:
        if self.deletes == 0:
            raise BucketUnavailable(reason="away")
        self.deletes -= 1
        super().delete(key)


def test_a_sweep_that_was_cut_short_is_made_up_for_by_another(service: Service, tmp_path: Path) -> None:
    job = service.train(service.prepared(), 10, 20, 30)
    service.let_pass(SWEEP_EVERY)
    with pytest.raises(BucketUnavailable):
        service.sweeper(AwayBucket(tmp_path / "bucket", deletes=1)).sweep(threading.Event())
    service.sweep()
    assert "e2/checkpoints/step-20.tar" in service.left(job), "it is taken for a while"
    service.let_pass(SWEEP_AGAIN)
    service.sweep()
    assert "e2/checkpoints/step-20.tar" not in service.left(job)


def test_a_pass_removes_no_more_than_its_slice(service: Service) -> None:
    job = service.train(service.prepared(), *range(1, OBJECTS_PER_JOB + 4))
    service.let_pass(SWEEP_EVERY)
    before = len(service.left(job))
    service.sweep()
    assert len(service.left(job)) == before - OBJECTS_PER_JOB
    service.let_pass(SWEEP_AGAIN)
    service.sweep()
    assert len(service.left(job)) == 4


class Meddling(DirectoryBucket):
    """A bucket beside which something happens between a sweeper's listing and its look at the row."""

    def __init__(self, root: Path, meddle: Sequence[object]) -> None:
        super().__init__(root)
        self.meddle = list(meddle)

    def list(self, prefix: str):  # type: ignore[no-untyped-def]
        yield from super().list(prefix)
        while self.meddle:
            self.meddle.pop()()  # type: ignore[operator]


def test_what_becomes_the_rows_between_listing_and_reading_is_kept(service: Service, tmp_path: Path) -> None:
    job = service.train(service.prepared(), 10)
    uncommitted = StoredObject(key=checkpoint_key("default", job.id, 2, 11), size=5, sha256="0" * 64)

    def commit() -> None:
        service.leases.commit_checkpoint(job.id, 2, Checkpoint(step=11, epoch=2, object=uncommitted))
        service.succeed(job)

    service.let_pass(SWEEP_EVERY)
    service.sweeper(Meddling(tmp_path / "bucket", [commit])).sweep(threading.Event())
    assert service.left(job) == [
        "e2/adapter/adapter_model.safetensors",
        "e2/adapter/manifest.json",
        "e2/checkpoints/step-11.tar",
        "e2/trainer.log",
    ]
    assert service.due_at(job) == pytest.approx(GRACE.total_seconds(), abs=30), "it ended during its sweep"


def test_a_claim_during_a_sweep_keeps_the_job_due(service: Service, tmp_path: Path) -> None:
    waiting = service.prepared()
    service.let_pass(GRACE)
    service.sweeper(Meddling(tmp_path / "bucket", [lambda: service.train(waiting, 10)])).sweep(threading.Event())
    assert service.due_at(waiting) == pytest.approx(SWEEP_EVERY.total_seconds(), abs=30)
    assert len(service.left(waiting)) == 4


def test_sweepers_side_by_side_take_each_job_once(service: Service) -> None:
    for _ in range(6):
        service.prepared()
    service.let_pass(GRACE)
    sweeps = Sweeps(service.database)
    taken = [due.job_id for _ in range(3) for due in sweeps.take(limit=4)]
    assert len(taken) == len(set(taken)) == 6


def test_a_deleted_jobs_objects_go_at_once_and_its_row_when_no_zombie_can_write_any_more(service: Service) -> None:
    job = service.train(service.prepared(), 10)
    service.succeed(job)
    service.jobs.delete("default", job.id)
    with pytest.raises(JobNotFound):
        service.jobs.get("default", job.id)
    service.sweep()
    assert service.left(job) == []
    assert service.leases.read(job.id) is not None, "what a worker that was cut off still writes must be found"
    service.write_checkpoint(job, 12)
    service.let_pass(GRACE)
    service.sweep()
    assert service.left(job) == []
    assert service.leases.read(job.id) is None
    with service.database.reading() as connection:
        assert connection.execute(select(events_table).where(events_table.c.job_id == job.id)).all() == []


def test_a_deleted_job_stays_until_its_end_was_told(service: Service) -> None:
    job, _ = service.jobs.submit(a_new_job(webhook_url="https://hooks.example.com/"))
    service.jobs.cancel("default", job.id)
    service.jobs.delete("default", job.id)
    outbox = Outbox(service.database)
    for _ in range(2):
        service.let_pass(2 * GRACE)
        service.sweep()
    (waiting,) = outbox.take(limit=10)
    assert service.leases.read(job.id) is not None and waiting.job_id == job.id
    outbox.delivered(waiting)
    service.let_pass(2 * GRACE)
    service.sweep()
    assert service.leases.read(job.id) is None


def test_a_job_that_is_deleted_long_after_its_end_is_gone_after_one_sweep(service: Service) -> None:
    job = service.train(service.prepared(), 10)
    service.succeed(job)
    service.let_pass(2 * GRACE)
    service.sweep()
    assert service.due_at(job) is None
    service.jobs.delete("default", job.id)
    service.sweep()
    assert service.left(job) == []
    assert service.leases.read(job.id) is None


def test_a_deletion_whose_sweep_was_cut_short_is_made_up_for_by_another(service: Service, tmp_path: Path) -> None:
    job = service.train(service.prepared(), 10)
    service.succeed(job)
    service.let_pass(2 * GRACE)
    service.jobs.delete("default", job.id)
    with pytest.raises(BucketUnavailable):
        service.sweeper(Unreachable(tmp_path / "bucket")).sweep(threading.Event())
    assert service.left(job) != [] and service.leases.read(job.id) is not None
    service.let_pass(SWEEP_AGAIN)
    service.sweep()
    assert service.left(job) == [] and service.leases.read(job.id) is None


def test_a_deleted_files_bytes_are_removed_and_no_upload_is_left(service: Service) -> None:
    key = "tenants/default/files/file-1"
    service.files.announce(key)
    stored = service.bucket.put_bytes(key, b"rows")
    service.files.add(id="file-1", tenant="default", filename="rows.jsonl", object=stored, report={})
    service.sweep()
    assert list(service.bucket.list(key)) == [key]
    service.files.delete("default", "file-1")
    with pytest.raises(FileNotFound):
        service.files.get("default", "file-1")
    service.sweep()
    assert list(service.bucket.list(key)) == []
    assert service.files.lost_uploads(limit=10) == []


class Unreachable(DirectoryBucket):
    """Lists, and removes nothing."""

    def delete(self, key: str) -> None:
        raise BucketUnavailable(reason="it is away")

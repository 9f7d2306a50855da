"""The supervisor's promises, with a fake child that keeps the protocol: real store, real bucket, real processes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from sqlalchemy import update

from graft_shared.artifacts import MANIFEST_NAME, AdapterManifest
from graft_shared.buckets import Bucket
from graft_shared.buckets.directory import DirectoryBucket
from graft_shared.catalogue import ModelShape
from graft_shared.clock import boottime
from graft_shared.defaults import load_capacity, load_catalogue
from graft_shared.errors import BucketUnavailable, StoreUnavailable
from graft_shared.jobs import Job, JobState, JobStatus, Phase, Stage, StoredObject
from graft_shared.memory import Recompute, TrainingPlan, estimate
from graft_shared.planner import plans
from graft_shared.specs import JobSpec
from graft_shared.store import Files, Jobs, Leases, Reports, Sweeps, Workers, open_database
from graft_shared.store.migrate import migrate
from graft_shared.store.tables import jobs as jobs_table
from graft_shared.sweeper import Sweeper
from graft_worker.device import Device
from graft_worker.protocol import Event, ProgressEvent
from graft_worker.settings import WorkerSettings
from graft_worker.supervisor import preparation, training_run
from graft_worker.supervisor.bases import BaseModels
from graft_worker.supervisor.cache import HostCache
from graft_worker.supervisor.child import Child, child_environment
from graft_worker.supervisor.folders import store_folder
from graft_worker.supervisor.neighbours import Neighbours
from graft_worker.supervisor.slot import Slot, taken_if_free
from graft_worker.supervisor.spare import SpareTrainer
from graft_worker.tasks import answer_bell, look_for_work, slot_of
from tests.factories import EMPTY_WEIGHTS
from tests.fakes.child import weights_after
from tests.fakes.doorbell import FakeDoorbell
from tests.fakes.forked import forked_process
from tests.store_factories import a_beat, a_new_job
from tests.waiting import free_port, wait_until
from tests.witness import steps_made

SHAPE_FACTS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "tie_word_embeddings", "max_position_embeddings",
)  # fmt: skip
ROOT = Path(__file__).parents[2]


class Worker:
    """One worker over a fresh store and bucket, driven by the test instead of by bells."""

    def __init__(self, folder: Path, bucket: Bucket, **settings: Any) -> None:
        self.folder = folder
        self.bucket = bucket
        self.drain = threading.Event()
        self.database = open_database(f"sqlite:///{folder / 'graft.db'}")
        migrate(self.database)
        times = {"lease_seconds": 20.0, "heartbeat_seconds": 0.1, "orders_seconds": 0.02, "stop_grace_seconds": 0.5}
        self.settings = WorkerSettings(
            state_dir=folder, worker_name="w", **{**times, "upload_patience_seconds": 5.0, **settings}
        )
        self.jobs, self.leases = Jobs(self.database), Leases(self.database, self.settings.lease)
        self.doorbell = FakeDoorbell()
        device = Device(kind="cpu", index=0, name="CPU", gpu_class="cpu", takes_classes=("cpu",), stage=Stage.TRAIN)
        self.neighbours = Neighbours(
            settings=self.settings,
            database=self.database,
            leases=self.leases,
            files=Files(self.database),
            reports=Reports(self.database, self.settings.lease),
            bucket=bucket,
            doorbell=self.doorbell,
            base_models=BaseModels(
                registered_dir=self.settings.registered_models_dir,
                cache=HostCache(folder=self.settings.cache_dir, max_bytes=self.settings.cache_max_bytes),
                hub_token=None,
            ),
            device=device,
            spare=SpareTrainer(
                wanted=self.settings.spare_trainer,
                device=device,
                home=self.settings.spare_dir,
                cache_dir=self.settings.cache_dir,
            ),
            capacity=load_capacity(None),
            place="here",
            open_dataset_bucket=lambda _: bucket,
            draining=self.drain.is_set,
        )

    @property
    def preparing(self) -> Neighbours:
        return replace(self.neighbours, device=replace(self.neighbours.device, stage=Stage.PREPARE))

    def submit(self, **metadata: str) -> Job:
        spec = {"metadata": {"witness": str(self.folder), **metadata}}
        return self.jobs.submit(a_new_job(**spec))[0]

    def work(self) -> None:
        """Look for work once as the host's preparing worker, then as its training one."""
        look_for_work(self.preparing)
        look_for_work(self.neighbours)

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self.work, daemon=True)
        thread.start()
        return thread

    def get(self, job: Job) -> Job:
        return self.jobs.get("default", job.id)

    def events(self, job: Job) -> list[tuple[str, dict[str, Any]]]:
        return [(event.type, event.data) for event in self.jobs.events("default", job.id, limit=1000)[0]]

    def steps(self) -> list[tuple[int, int]]:
        """Every (epoch, step) that a trainer really made."""
        return [(step.epoch, step.number) for step in steps_made(self.folder)]


@pytest.fixture
def make_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Worker]]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.setattr(preparation, "MODULE", "tests.fakes.child")
    monkeypatch.setattr(training_run, "MODULE", "tests.fakes.child")
    base = tmp_path / "models" / "graft" / "tiny"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(EMPTY_WEIGHTS)
    made: list[Worker] = []

    def make(bucket: Bucket | None = None, **settings: Any) -> Worker:
        worker = Worker(tmp_path, bucket or DirectoryBucket(tmp_path / "bucket"), **settings)
        worker.neighbours.files.announce("tenants/default/files/file-rows")
        stored = worker.bucket.put_bytes("tenants/default/files/file-rows", b'{"text": "a"}\n')
        known = StoredObject(key=stored.key, size=stored.size, sha256=stored.sha256)
        worker.neighbours.files.add(id="file-rows", tenant="default", filename="r.jsonl", object=known, report={})
        made.append(worker)
        return worker

    yield make
    for worker in made:
        worker.drain.set()
        worker.neighbours.spare.dismiss()
        worker.database.close()


def no_child_is_left(worker: Worker) -> bool:
    """Whether no child of this worker runs; other tests on this machine may have theirs."""
    commands = [_command(path.name) for path in Path("/proc").iterdir()]
    return not any("tests.fakes.child" in command and str(worker.folder) in command for command in commands)


def _state_of(pid: int | None) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_a_job_is_prepared_trained_and_published_with_its_proof(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()
    job = worker.submit()
    worker.work()
    ended = worker.get(job)
    assert ended.state is JobState.SUCCEEDED
    assert ended.adapter is not None
    manifest = AdapterManifest.model_validate_json(worker.bucket.open(ended.adapter["manifest"]["key"]).read())
    assert [file.name for file in manifest.files] == ["adapter_model.safetensors"]
    assert manifest.base_revision.startswith("sha256-")
    assert worker.bucket.open(ended.adapter["prefix"] + "adapter_model.safetensors").read() == weights_after(5).encode()
    assert ended.adapter["prefix"] == f"tenants/default/jobs/{job.id}/e2/adapter/"
    assert (ended.metrics["train_loss"], ended.memory["measured_peak_bytes"]) == (0.5, 1)
    assert (ended.progress["step"], ended.progress["percent"]) == (5, 100.0)
    assert ended.warnings == [{"code": "fake", "message": "This is no real trainer."}]
    assert [data["step"] for type, data in worker.events(job) if type == "metrics"] == [1, 2, 3, 4, 5]
    assert (job.id, "cpu") in worker.doorbell.rung
    assert list((worker.settings.work_dir / "w" / "train").iterdir()) == []


def test_a_killed_trainer_goes_on_from_its_last_checkpoint_at_no_cost(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()
    job = worker.submit(behaviour="killed once", steps="6")
    worker.work()
    ended = worker.get(job)
    assert (ended.state, ended.attempt, ended.epoch) == (JobState.SUCCEEDED, 1, 3)
    assert worker.steps() == [(2, 1), (2, 2), (2, 3), (3, 3), (3, 4), (3, 5), (3, 6)]
    requeued = [data for type, data in worker.events(job) if type == "requeued"]
    assert [data["reason"] for data in requeued] == ["worker_lost"]


@pytest.mark.parametrize("what", ["child.Child.__init__", "watch.Watch.look_after"])
def test_a_child_that_cannot_be_watched_does_not_stay(
    make_worker: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    worker = make_worker()
    job = worker.submit()
    look_for_work(worker.preparing)

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(f"graft_worker.supervisor.{what}", refuse)
    started: list[int] = []
    popen = subprocess.Popen

    def remember(*args: Any, **kwargs: Any) -> Any:
        process = popen(*args, **kwargs)
        started.append(process.pid)
        return process

    monkeypatch.setattr("graft_worker.supervisor.child.subprocess.Popen", remember)
    look_for_work(worker.neighbours)
    assert [Path(f"/proc/{pid}").exists() for pid in started] == [False]
    assert worker.get(job).attempt == 1
    assert [data["reason"] for type, data in worker.events(job) if type == "requeued"] == ["crash"]


def test_a_crash_is_charged_and_tried_again(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()
    job = worker.submit(behaviour="crash once")
    worker.work()
    waiting = worker.get(job)
    assert (waiting.state, waiting.attempt) == (JobState.QUEUED, 1)
    be_due(worker)
    worker.work()
    assert (worker.get(job).state, worker.get(job).attempt) == (JobState.SUCCEEDED, 2)


def let_the_base_be_a_1b(folder: Path) -> ModelShape:
    """Write another shape into the registered base's config, whose plans differ; returns it."""
    shape = load_catalogue().get("meta-llama/Llama-3.2-1B")
    assert shape is not None
    config = {"model_type": "llama", **{name: getattr(shape, name) for name in SHAPE_FACTS}}
    (folder / "models" / "graft" / "tiny" / "config.json").write_text(json.dumps(config))
    return shape


def test_a_plan_that_runs_out_of_memory_is_followed_by_a_cheaper_one_at_no_charge(
    make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    worker = make_worker()
    shape = let_the_base_be_a_1b(tmp_path)
    new = a_new_job(metadata={"witness": str(tmp_path), "behaviour": "out of memory", "steps": "6"})
    spec = JobSpec.model_validate(new.spec)
    first = plans(shape, spec)[0]
    placement = {**new.placement, "estimate": estimate(shape, spec, first).to_dict()}
    job = worker.jobs.submit(replace(new, plan=first.to_dict(), placement=placement))[0]
    worker.work()
    ended = worker.get(job)
    assert (ended.state, ended.attempt, ended.epoch) == (JobState.SUCCEEDED, 1, 4)
    assert worker.steps() == [(2, 1), (2, 2), (2, 3), (3, 3), (4, 3), (4, 4), (4, 5), (4, 6)]
    steps = [data for type, data in worker.events(job) if type == "replanned"]
    used = [step["from"] for step in steps] + [steps[-1]["to"]]
    assert [plan["plan"] for plan in used][0::2] == [first.to_dict(), ended.plan]
    predicted = [plan["predicted_peak_bytes"] for plan in used]
    assert predicted == [estimate(shape, spec, TrainingPlan.from_dict(plan["plan"])).expected_bytes for plan in used]
    assert predicted[2] < predicted[1] < predicted[0]
    assert ended.placement["estimate"]["expected_bytes"] == predicted[2]
    assert [warning["code"] for warning in ended.warnings].count("replanned") == 2


@pytest.mark.parametrize("content", [True, False])
@pytest.mark.parametrize(
    ("gpu_class", "recompute", "of_the_machine"),
    [("24gb", Recompute.OFFLOAD, "host_held_bytes"), ("cpu", Recompute.NONE, "expected_bytes")],
)
def test_a_plan_that_the_machine_cannot_hold_makes_way_for_one_that_it_can_if_there_is_one(
    make_worker: Callable[..., Worker],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpu_class: str,
    recompute: Recompute,
    of_the_machine: str,
    content: bool,
) -> None:
    worker = make_worker()
    shape = let_the_base_be_a_1b(tmp_path)
    device = replace(worker.neighbours.device, takes_classes=(gpu_class,))
    worker.neighbours = replace(worker.neighbours, device=device)
    new = a_new_job(gpu_class=gpu_class, metadata={"witness": str(tmp_path), "steps": "3"})
    spec = JobSpec.model_validate(new.spec)
    first = next(plan for plan in plans(shape, spec) if plan.recompute is recompute)

    def needed(plan: TrainingPlan) -> int:
        size: int = getattr(estimate(shape, spec, plan), of_the_machine)
        return size

    free = needed(first) - 1 if content else 0
    monkeypatch.setattr(training_run, "free_memory_bytes", lambda: free)
    job = worker.jobs.submit(replace(new, plan=first.to_dict()))[0]
    worker.work()
    ended = worker.get(job)
    assert (ended.state, ended.attempt, ended.epoch) == (JobState.SUCCEEDED, 1, 3 if content else 2)
    assert (needed(TrainingPlan.from_dict(ended.plan)) <= free) is content
    assert (ended.plan == first.to_dict()) is not content
    requeued = [data for type, data in worker.events(job) if type == "requeued"]
    assert [data["reason"] for data in requeued] == ["host_out_of_memory"] * content


def test_without_a_cheaper_plan_and_a_larger_class_running_out_of_memory_is_the_end(
    make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    worker = make_worker()
    job = worker.submit(behaviour="out of memory")
    worker.work()
    error = worker.get(job).error
    assert error is not None
    assert (error["code"], error["facts"]) == ("cuda_out_of_memory", {"reserved_peak_bytes": 7})
    assert "larger 'gpu.class'" in error["message"]


def test_a_users_error_ends_the_job_with_its_reason(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()
    job, bad_data = worker.submit(behaviour="user error"), worker.submit(behaviour="bad data")
    worker.work()
    error, data_error = worker.get(job).error, worker.get(bad_data).error
    assert error is not None
    assert data_error is not None
    assert (error["code"], error["category"]) == ("loss_not_finite", "user")
    assert (data_error["code"], data_error["facts"]) == ("invalid_training_file", {"line": 2})


def test_a_cancelled_job_stops_and_nothing_runs_after_it_is_acknowledged(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()
    job = worker.submit(steps="100000")
    working = worker.start()
    wait_until(lambda: len(worker.steps()) > 3, what="the first steps")
    worker.jobs.cancel("default", job.id)
    wait_until(lambda: worker.get(job).state is JobState.CANCELLED, what="the cancel")
    steps = worker.steps()
    assert no_child_is_left(worker)
    working.join(timeout=20)
    assert worker.steps() == steps
    assert Counter(type for type, _ in worker.events(job))["cancelled"] == 1


def test_a_stubborn_trainer_is_killed_after_its_grace(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()
    job = worker.submit(behaviour="stubborn", steps="100000")
    worker.start()
    wait_until(lambda: len(worker.steps()) > 3, what="the first steps")
    worker.jobs.cancel("default", job.id)
    wait_until(lambda: worker.get(job).state is JobState.CANCELLED, what="the cancel")
    assert no_child_is_left(worker)


def test_a_drained_worker_saves_a_checkpoint_and_gives_the_job_back_uncharged(
    make_worker: Callable[..., Worker],
) -> None:
    worker = make_worker()
    job = worker.submit(steps="100000")
    working = worker.start()
    wait_until(lambda: len(worker.steps()) > 3, what="the first steps")
    worker.drain.set()
    working.join(timeout=20)
    released = worker.get(job)
    assert (released.state, released.attempt) == (JobState.QUEUED, 0)
    assert released.checkpoint is not None
    assert released.checkpoint.step == worker.steps()[-1][1]
    assert worker.doorbell.rung == [(job.id, "cpu")] * 2, "handed over, and given back"


def test_behind_a_slow_bucket_the_newest_checkpoint_is_stored_and_those_before_it_make_way(
    make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    bucket = SlowBucket(tmp_path / "bucket")
    worker = make_worker(bucket, stop_grace_seconds=20.0)
    job = worker.submit(steps="100000", save_steps="1")
    working = worker.start()
    wait_until(lambda: bucket.is_asked.is_set() and len(worker.steps()) > 10, what="more checkpoints than are stored")
    worker.drain.set()
    wait_until(lambda: no_child_is_left(worker), what="the end of the trainer")
    bucket.may_go_on.set()
    working.join(timeout=20)
    steps = [step for _, step in worker.steps()]
    told = worker.events(job)
    stored = [data["step"] for type, data in told if type == "checkpoint"]
    assert (len(stored), stored[-1]) == (2, steps[-1]), "the one that was on its way, and the last"
    assert bucket.on_disk[-1] == 1
    assert [data["step"] for type, data in told if type == "metrics"] == steps
    assert [type for type, _ in told[-2:]] == ["checkpoint", "requeued"], "every measure stands before it"


def test_a_paused_job_leaves_its_worker_with_a_checkpoint_and_goes_on_from_it_when_resumed(
    make_worker: Callable[..., Worker],
) -> None:
    worker = make_worker()
    job = worker.submit(steps="60", save_steps="1000")
    working = worker.start()
    wait_until(lambda: len(worker.steps()) > 3, what="the first steps")
    assert worker.jobs.pause("default", job.id).status is JobStatus.PAUSING
    working.join(timeout=20)
    paused, done = worker.get(job), worker.steps()
    assert (paused.status, paused.attempt, paused.runs_without_progress) == (JobStatus.PAUSED, 0, 0)
    assert paused.checkpoint is not None
    assert (paused.checkpoint.step, no_child_is_left(worker)) == (done[-1][1], True)
    assert worker.doorbell.rung == [(job.id, "cpu")], "for its training; nobody is to take a paused job"
    worker.work()
    assert worker.get(job).status is JobStatus.PAUSED
    worker.jobs.resume("default", job.id)
    worker.work()
    assert worker.get(job).status is JobStatus.SUCCEEDED
    assert [step for _, step in worker.steps()] == list(range(1, 61)), "no step was made twice"
    assert "paused" in [type for type, _ in worker.events(job)]


def test_a_pause_while_data_is_prepared_stops_it_and_it_begins_anew(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()
    job = worker.submit(behaviour="prepares for long")
    working = worker.start()
    wait_until(lambda: worker.get(job).phase is Phase.PREPARING, what="the preparation")
    worker.jobs.pause("default", job.id)
    working.join(timeout=20)
    assert (worker.get(job).status, worker.get(job).attempt) == (JobStatus.PAUSED, 0)
    assert no_child_is_left(worker)
    assert worker.jobs.resume("default", job.id).status is JobStatus.VALIDATING_FILES


def test_a_pause_that_is_taken_back_too_late_costs_a_run_and_nothing_else(
    make_worker: Callable[..., Worker], caplog: pytest.LogCaptureFixture
) -> None:
    worker = make_worker(stop_grace_seconds=5.0)
    job = worker.submit(behaviour="stubborn", steps="100000")
    worker.start()
    wait_until(lambda: len(worker.steps()) > 3, what="the first steps")
    worker.jobs.pause("default", job.id)
    with caplog.at_level("INFO"):
        wait_until(lambda: "child_told_to_stop" in caplog.messages, what="the order to its trainer")
    worker.jobs.resume("default", job.id)
    wait_until(lambda: worker.get(job).epoch == 3, what="the next run")
    edges = ("pause_requested", "paused", "resumed", "requeued", "claimed")
    told = [type for type, _ in worker.events(job) if type in edges]
    assert told == ["claimed", "claimed", "pause_requested", "resumed", "requeued", "claimed"]
    worker.jobs.cancel("default", job.id)
    wait_until(lambda: worker.get(job).state is JobState.CANCELLED, what="the cancel")


def test_a_trainer_whose_lease_was_given_away_is_killed_and_writes_nothing(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()
    Workers(worker.database).beat(**a_beat("w", place="here"))
    job = worker.submit(steps="100000")
    working = worker.start()
    wait_until(lambda: worker.get(job).checkpoint is not None, what="a checkpoint")
    (released,) = worker.leases.release_of("w/train", "here")
    worker.drain.set()
    working.join(timeout=20)
    assert no_child_is_left(worker)
    after = worker.get(job)
    assert (after.state, after.epoch) == (JobState.QUEUED, released.epoch)
    assert after.checkpoint == released.checkpoint


def test_a_job_that_runs_too_long_is_stopped_and_says_so(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()
    new = a_new_job(metadata={"witness": str(worker.folder), "steps": "100000"}, max_duration_seconds=1)
    job, _ = worker.jobs.submit(new)
    worker.work()
    error = worker.get(job).error
    assert error is not None
    assert (error["code"], error["param"]) == ("max_duration_exceeded", "max_duration_seconds")


def with_a_limit(worker: Worker, **earlier: Any) -> Job:
    """A prepared job that may train for 300 seconds, and has this behind it."""
    job, _ = worker.jobs.submit(a_new_job(metadata={"witness": str(worker.folder)}, max_duration_seconds=300))
    look_for_work(worker.preparing)
    with worker.database.writing() as connection:
        connection.execute(update(jobs_table).values(**earlier))
    return job


def test_the_time_of_earlier_runs_counts_for_a_jobs_limit(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()
    job = with_a_limit(worker, gpu_seconds=301.0)
    look_for_work(worker.neighbours)
    assert (worker.get(job).error or {})["code"] == "max_duration_exceeded"


def test_the_time_that_a_job_waits_does_not_count_for_its_limit(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()
    job = with_a_limit(worker, started_at=jobs_table.c.started_at - 1000)
    look_for_work(worker.neighbours)
    assert worker.get(job).state is JobState.SUCCEEDED


def test_the_time_that_preparing_takes_does_not_count_for_a_jobs_limit(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()
    asked = {"witness": str(worker.folder), "behaviour": "prepares for long"}
    job, _ = worker.jobs.submit(a_new_job(metadata=asked, max_duration_seconds=1))
    working = worker.start()
    wait_until(lambda: worker.get(job).phase is Phase.PREPARING, what="the preparation")
    over = boottime() + 1.5
    wait_until(lambda: boottime() > over, what="more time than it may train for")
    assert worker.get(job).phase is Phase.PREPARING
    worker.jobs.cancel("default", job.id)
    working.join(20)


class LeakyBucket(DirectoryBucket):
    """A bucket that gives back other bytes than it was given, for one name."""

    def open(self, key: str) -> Any:
        if key.endswith("adapter_model.safetensors"):
            super().put_bytes(key, b"weighty")
        return super().open(key)


class SpoilingBucket(DirectoryBucket):
    """A bucket that spoils checkpoints."""

    def put_file(self, key: str, path: Path) -> StoredObject:
        stored = super().put_file(key, path)
        if "/checkpoints/" in key:
            super().put_bytes(key, b"spoilt")
        return stored


class SlowBucket(DirectoryBucket):
    """A bucket that takes no checkpoint before it is let, and counts those that lie on the worker's disk meanwhile."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.is_asked, self.may_go_on = threading.Event(), threading.Event()
        self.on_disk: list[int] = []

    def put_file(self, key: str, path: Path) -> StoredObject:
        if "/checkpoints/" in key:
            self.is_asked.set()
            self.may_go_on.wait(60)
            self.on_disk.append(len([folder for folder in path.parent.glob("step-*") if folder.is_dir()]))
        return super().put_file(key, path)


class AbsentBucket(DirectoryBucket):
    """A bucket that is away for the first writes of an adapter."""

    refusals = 3

    def put_file(self, key: str, path: Path) -> StoredObject:
        if "/adapter/" in key and self.refusals:
            self.refusals -= 1
            raise BucketUnavailable(reason="away")
        return super().put_file(key, path)


def test_an_adapter_that_reads_back_differently_is_no_success(
    make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    worker = make_worker(LeakyBucket(tmp_path / "bucket"))
    job = worker.submit()
    worker.work()
    assert worker.get(job).state is JobState.QUEUED
    assert [data["reason"] for type, data in worker.events(job) if type == "requeued"] == ["artifact_corrupt"]
    assert worker.get(job).adapter is None


def test_a_checkpoint_that_reads_back_differently_is_not_the_jobs(
    make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    worker = make_worker(SpoilingBucket(tmp_path / "bucket"))
    job = worker.submit()
    worker.work()
    assert worker.get(job).checkpoint is None
    assert [data["reason"] for type, data in worker.events(job) if type == "requeued"] == ["artifact_corrupt"]


def test_a_checkpoint_that_was_changed_since_is_not_trained_on(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()
    job = worker.submit(behaviour="crash once")
    worker.work()
    saved = worker.get(job).checkpoint
    assert saved is not None
    folder = worker.folder / "changed"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"step": saved.step, "weights": "of somebody else"}))
    store_folder(worker.bucket, saved.object.key, folder)
    be_due(worker)
    worker.work()
    assert [data["reason"] for type, data in worker.events(job) if type == "requeued"] == ["crash", "artifact_corrupt"]
    assert {epoch for epoch, _ in worker.steps()} == {2}


class NotingBucket(DirectoryBucket):
    """A bucket that notes in which order an adapter's objects are written, and the job's state when each is."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.noted: list[tuple[str, JobState]] = []
        self.state: Callable[[], JobState]

    def put_file(self, key: str, path: Path) -> StoredObject:
        self._note(key)
        return super().put_file(key, path)

    def put_bytes(self, key: str, data: bytes) -> StoredObject:
        self._note(key)
        return super().put_bytes(key, data)

    def _note(self, key: str) -> None:
        if "/adapter/" in key:
            self.noted.append((key.rpartition("/")[2], self.state()))


def test_the_manifest_is_written_last_and_only_then_has_the_job_succeeded(
    make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    bucket = NotingBucket(tmp_path / "bucket")
    worker = make_worker(bucket)
    job = worker.submit()
    bucket.state = lambda: worker.get(job).state
    worker.work()
    assert bucket.noted == [("adapter_model.safetensors", JobState.RUNNING), (MANIFEST_NAME, JobState.RUNNING)]
    assert worker.get(job).state is JobState.SUCCEEDED


class LookingDoorbell(FakeDoorbell):
    """A doorbell that looks, when it is rung, at what whoever hears it would find."""

    def __init__(self, jobs: Jobs) -> None:
        super().__init__()
        self.jobs = jobs
        self.found: list[tuple[JobState, Stage]] = []

    def ring(self, job_id: str, queue: str) -> bool:
        job = self.jobs.get("default", job_id)
        self.found.append((job.state, job.stage))
        return super().ring(job_id, queue)


def test_a_bell_is_rung_for_what_can_be_claimed_already(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()
    bell = LookingDoorbell(worker.jobs)
    worker.neighbours = replace(worker.neighbours, doorbell=bell)
    worker.submit(behaviour="killed once")
    worker.work()
    assert bell.found == [(JobState.QUEUED, Stage.TRAIN)] * 2, "handed over, and given back"


def be_due(worker: Worker) -> None:
    """Let the delay of a failed job be over without waiting for it."""
    with worker.database.writing() as connection:
        connection.execute(update(jobs_table).values(not_before=0.0))


def test_a_job_whose_hub_is_away_leaves_its_worker_to_others_for_minutes(
    make_worker: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free_port()}")
    worker = make_worker(upload_patience_seconds=60.0)
    base, dataset = (
        worker.jobs.submit(a_new_job(**of_the_hub))[0]
        for of_the_hub in ({"base_model": "org/base"}, {"dataset": {"hub": "org/rows"}})
    )
    other = worker.submit()
    began = boottime()
    look_for_work(worker.preparing)
    assert boottime() - began < 30, "each would hold it for a minute, were it patient with the hub"
    assert worker.get(other).stage is Stage.TRAIN
    for job in (base, dataset):
        assert [data["reason"] for type, data in worker.events(job) if type == "requeued"] == ["base_model_unavailable"]
        until = worker.jobs.waits_until(worker.get(job))
        assert until is not None
        assert timedelta(seconds=60) < until - worker.database.now() <= timedelta(seconds=90)


def test_a_worker_takes_back_at_once_what_its_earlier_life_left_running(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()
    Workers(worker.database).beat(**a_beat("w", place="here"))
    job = worker.submit()
    look_for_work(worker.preparing)
    left = worker.leases.claim("w/train", stage=Stage.TRAIN, gpu_classes=["cpu"])
    assert left is not None
    look_for_work(worker.neighbours)
    ended = worker.get(job)
    assert (ended.state, ended.attempt) == (JobState.SUCCEEDED, 1)
    assert ended.epoch == left.epoch + 2


def test_what_a_child_started_ends_with_it(tmp_path: Path) -> None:
    script = "sleep 1000 > /dev/null 2>&1 & echo $! > started"
    process = subprocess.Popen(["sh", "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, start_new_session=True)
    assert Child(process).wait() == 0
    started = int((tmp_path / "started").read_text())
    wait_until(lambda: _command(str(started)) == "", seconds=10, what="the end of what it started")


class FullDisk(DirectoryBucket):
    """A machine without room for what is fetched."""

    def open(self, key: str) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_error_of_the_machine_ends_the_run_by_its_name_and_not_the_worker(
    make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    worker = make_worker(FullDisk(tmp_path / "bucket"))
    job = worker.submit()
    worker.work()
    assert [data["reason"] for type, data in worker.events(job) if type == "requeued"] == ["disk_full"]


def test_a_worker_whose_disk_is_full_claims_nothing_until_there_is_room(
    make_worker: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker()
    job = worker.submit()
    with monkeypatch.context() as full:
        full.setattr("graft_worker.tasks.LEAST_FREE_BYTES", shutil.disk_usage(worker.folder).total + 1)
        worker.work()
        answer_bell(worker.preparing, pass_on=lambda: pytest.fail("it would hear its own bell again"))
    assert (worker.get(job).state, worker.get(job).epoch) == (JobState.QUEUED, 0), "no attempt was used up"
    worker.work()
    assert worker.get(job).state is JobState.SUCCEEDED


def test_a_slot_is_free_again_though_a_process_forked_meanwhile_lives_on(tmp_path: Path) -> None:
    slot = Slot(worker="w", stage=Stage.TRAIN, lock_dir=tmp_path)
    with taken_if_free(slot) as free:
        assert free
        forked = forked_process()
    with forked, taken_if_free(slot) as free:
        assert free


def test_a_bucket_that_is_away_for_a_while_is_waited_for(make_worker: Callable[..., Worker], tmp_path: Path) -> None:
    bucket = AbsentBucket(tmp_path / "bucket")
    worker = make_worker(bucket)
    job = worker.submit()
    worker.work()
    assert worker.get(job).state is JobState.SUCCEEDED
    assert bucket.refusals == 0


def test_a_child_gets_no_token_and_no_address_of_a_neighbour(
    make_worker: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "GRAFT_S3_SECRET_ACCESS_KEY",
        "GRAFT_DATABASE_URL",
        "GRAFT_BROKER_URL",
        "HF_TOKEN",
    ):
        monkeypatch.setenv(name, "secret")
    worker = make_worker()
    workdir = worker.folder / "somewhere"
    workdir.mkdir()
    environment = child_environment(workdir, device=worker.neighbours.device, cache_dir=worker.settings.cache_dir)
    assert "secret" not in environment.values()
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment["HOME"] == str(workdir)


def test_a_childs_log_is_without_what_libraries_say_of_their_insides(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()
    workdir = worker.folder / "somewhere"
    workdir.mkdir()
    environment = child_environment(workdir, device=worker.neighbours.device, cache_dir=worker.settings.cache_dir)
    said = (
        "import warnings\n"
        "warnings.warn('`is_gradient_checkpointing` is deprecated and will be removed in v6.', FutureWarning)\n"
        "warnings.warn('Paged optimizers are not supported on CPU. Falling back.', UserWarning)\n"
        "warnings.warn('The data has a hole.', UserWarning)\n"
    )
    done = subprocess.run([sys.executable, "-c", said], env=environment, capture_output=True, text=True, check=True)
    assert "The data has a hole." in done.stderr
    assert "deprecated" not in done.stderr and "Paged" not in done.stderr
    assert environment["HF_HUB_DISABLE_PROGRESS_BARS"] == environment["TQDM_DISABLE"] == "1"


def test_a_registered_base_has_a_revision_by_its_content(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()
    bases = worker.neighbours.base_models
    with bases.whole("graft/tiny", "main") as first, bases.whole("graft/tiny", "main") as second:
        assert second == first
    (first.path / "model.safetensors").write_bytes(EMPTY_WEIGHTS + b"others")
    with bases.whole("graft/tiny", "main") as third:
        assert third.revision != first.revision


@pytest.mark.parametrize(
    ("report", "in_chat"),
    [
        ({"kind": "messages", "warnings": [{"code": "rows_duplicated"}]}, True),
        ({"kind": "sharegpt", "warnings": []}, True),
        ({"kind": "messages", "warnings": [{"code": "plain_chat_template"}]}, False),
        ({"kind": "prompt_completion", "warnings": []}, False),
    ],
)
def test_the_trainer_is_told_whether_the_rows_were_written_in_the_bases_chat_template(
    report: dict[str, Any], in_chat: bool
) -> None:
    assert training_run.was_taught_in_chat(report) == in_chat


def test_the_run_log_reaches_the_bucket(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()
    job = worker.submit()
    worker.work()
    assert f"tenants/default/jobs/{job.id}/e2/trainer.log" in list(worker.bucket.list("tenants/"))
    assert json.loads(json.dumps(worker.get(job).prepared))["report"] == {"rows": 1, "source": {"file": "file-rows"}}


def log_of(worker: Worker, job: Job) -> str:
    """The log of a job's first training run."""
    return bytes(worker.bucket.open(f"tenants/default/jobs/{job.id}/e2/trainer.log").read()).decode()


def test_the_next_job_is_trained_by_the_process_that_waits_for_it(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker(spare_trainer=True)
    spare = worker.neighbours.spare
    first = worker.submit()
    worker.work()
    waiting = spare.waiting_pid
    spare.prepare(training_run.MODULE)
    assert spare.waiting_pid == waiting, "one at a time"
    second = worker.submit()
    worker.work()
    assert [worker.get(job).state for job in (first, second)] == [JobState.SUCCEEDED] * 2
    assert waiting is not None
    workdir = worker.settings.work_dir / "w" / "train" / f"{second.id}-e2"
    assert f"{waiting} waits in {worker.settings.spare_dir}\n" in log_of(worker, second), "what it said before its job"
    assert json.loads(log_of(worker, second).splitlines()[-1]) == {
        "pid": waiting,
        "folder": str(workdir),
        "HOME": str(workdir),
        "TMPDIR": str(workdir / "tmp"),
        "temporary": str(workdir / "tmp"),
        "stdin": "/dev/null",
    }
    assert str(waiting) not in log_of(worker, first)
    assert spare.waiting_pid not in (None, waiting)


def has_trained(worker: Worker, epoch: int) -> bool:
    """Whether the run of this epoch has made some steps."""
    return [of_run for of_run, _ in worker.steps()].count(epoch) > 5


def test_a_job_that_is_interrupted_again_and_again_beside_a_sweeper_has_all_it_needs(
    make_worker: Callable[..., Worker],
) -> None:
    worker, done = make_worker(), threading.Event()
    sweeper = Sweeper(
        sweeps=Sweeps(worker.database),
        leases=worker.leases,
        files=worker.neighbours.files,
        bucket=worker.bucket,
        grace=timedelta(0),
    )

    def sweep() -> None:
        with worker.database.writing() as connection:
            connection.execute(update(jobs_table).values(sweep_at=0.0))
        sweeper.sweep(threading.Event())

    def sweep_on() -> None:
        while not done.wait(0.1):
            sweep()

    with ThreadPoolExecutor(1) as beside, ExitStack() as ended_first:
        sweeping = beside.submit(sweep_on)
        ended_first.callback(done.set)
        job = worker.submit(steps="150", save_steps="1")
        for epoch in (2, 3, 4, 5):
            working = worker.start()
            wait_until(partial(has_trained, worker, epoch), what="steps of this run")
            worker.jobs.pause("default", job.id)
            working.join(timeout=20)
            worker.jobs.resume("default", job.id)
        worker.work()
    sweeping.result()
    ended = worker.get(job)
    assert (ended.state, ended.epoch) == (JobState.SUCCEEDED, 6)
    assert ended.adapter is not None and ended.checkpoint is not None
    trained = worker.bucket.open(ended.adapter["prefix"] + "adapter_model.safetensors").read()
    assert trained == weights_after(150).encode()
    assert [step for _, step in worker.steps()] == list(range(1, 151))
    sweep()
    checkpoints = [key for key in worker.bucket.list(f"tenants/default/jobs/{job.id}/") if "/checkpoints/" in key]
    assert checkpoints == [ended.checkpoint.object.key]


def lose(worker: Worker) -> None:
    """Kill the process that waits."""
    pid = worker.neighbours.spare.waiting_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: _state_of(pid) == "Z", seconds=10, what="its end")


def test_a_waiting_process_that_died_costs_time_only(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker(spare_trainer=True)
    worker.neighbours.spare.prepare(training_run.MODULE)
    lose(worker)
    job = worker.submit()
    worker.work()
    ended = worker.get(job)
    assert (ended.state, ended.attempt, ended.epoch) == (JobState.SUCCEEDED, 1, 2), "no run was lost to it"
    assert worker.neighbours.spare.waiting_pid is not None, "there is one again"


def test_a_waiting_process_that_cannot_be_started_ends_no_job(
    make_worker: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker(spare_trainer=True)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SpareTrainer, "_start", full)
    job = worker.submit()
    worker.work()
    assert (worker.get(job).state, worker.get(job).epoch) == (JobState.SUCCEEDED, 2)
    assert worker.neighbours.spare.waiting_pid is None


def test_what_a_waiting_process_dies_of_after_it_was_given_a_job_is_in_the_jobs_log(
    make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    worker = make_worker(spare_trainer=True)
    broken = tmp_path / "library" / "broken_trainer.py"
    broken.parent.mkdir()
    broken.write_text("import sys, time\nsys.stdin.readline()\nraise ImportError('libcuda is missing')\n")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(broken.parent))
        worker.neighbours.spare.prepare("broken_trainer")
    job = worker.submit()
    worker.work()
    assert (worker.get(job).state, worker.get(job).epoch) == (JobState.QUEUED, 2)
    assert "ImportError: libcuda is missing" in log_of(worker, job)


def test_a_waiting_process_can_be_dismissed(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker(spare_trainer=True)
    worker.neighbours.spare.prepare(training_run.MODULE)
    pid = worker.neighbours.spare.waiting_pid
    worker.neighbours.spare.dismiss()
    assert not Path(f"/proc/{pid}").exists()
    assert worker.neighbours.spare.waiting_pid is None


@pytest.mark.parametrize(("kind", "stage", "wanted", "waits"), [
    ("cuda", Stage.TRAIN, None, True), ("cuda", Stage.TRAIN, False, False), ("cuda", Stage.PREPARE, True, False),
    ("cpu", Stage.TRAIN, None, False), ("cpu", Stage.TRAIN, True, True),
])  # fmt: skip
def test_a_process_waits_where_jobs_train_on_a_gpu_or_where_it_is_wanted(
    tmp_path: Path, kind: Literal["cpu", "cuda"], stage: Stage, wanted: bool | None, waits: bool
) -> None:
    device = Device(kind=kind, index=0, name="", gpu_class="cpu", takes_classes=("cpu",), stage=stage)
    spare = SpareTrainer(wanted=wanted, device=device, home=tmp_path / "spare", cache_dir=tmp_path)
    spare.prepare("this")
    assert (spare.waiting_pid is not None) == waits
    spare.dismiss()


def test_nothing_waits_where_nothing_is_trained_on_a_gpu(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()
    job = worker.submit()
    worker.work()
    assert worker.get(job).state is JobState.SUCCEEDED
    assert worker.neighbours.spare.waiting_pid is None


def test_a_bell_heard_while_the_worker_is_busy_is_passed_on_and_then_answered(
    make_worker: Callable[..., Worker],
) -> None:
    worker = make_worker()
    passed_on = threading.Event()
    with taken_if_free(slot_of(worker.neighbours)):
        heard = threading.Thread(target=answer_bell, args=[worker.neighbours, passed_on.set], daemon=True)
        heard.start()
        assert passed_on.wait(10)
        job = worker.submit()
        look_for_work(worker.preparing)
        look_for_work(worker.neighbours)
        assert worker.get(job).state is JobState.QUEUED, "the slot is taken"
    heard.join(30)
    assert worker.get(job).state is JobState.SUCCEEDED


def test_a_bell_that_an_idle_worker_hears_is_not_passed_on(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()
    job = worker.submit()
    look_for_work(worker.preparing)
    answer_bell(worker.neighbours, pass_on=lambda: pytest.fail("nobody else is needed"))
    assert worker.get(job).state is JobState.SUCCEEDED


def test_a_bell_that_a_leaving_worker_hears_is_passed_on(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()
    job = worker.submit()
    look_for_work(worker.preparing)
    worker.drain.set()
    passed_on: list[str] = []
    answer_bell(worker.neighbours, pass_on=lambda: passed_on.append(job.id))
    assert passed_on == [job.id]
    assert worker.get(job).state is JobState.QUEUED


class AbsentStore(Leases):
    """A store that is away for the first claim."""

    refusals = 1

    def claim(self, worker: str, *, stage: Stage, gpu_classes: Sequence[str]) -> Job | None:
        if self.refusals:
            self.refusals -= 1
            raise StoreUnavailable(reason="away")
        return super().claim(worker, stage=stage, gpu_classes=gpu_classes)


def test_a_bell_heard_while_the_store_is_away_is_passed_on_and_answered_once_it_is_back(
    make_worker: Callable[..., Worker],
) -> None:
    worker = make_worker()
    job = worker.submit()
    look_for_work(worker.preparing)
    absent = replace(worker.neighbours, leases=AbsentStore(worker.database, worker.settings.lease))
    passed_on: list[str] = []
    answer_bell(absent, pass_on=lambda: passed_on.append(job.id))
    assert passed_on == [job.id]
    assert worker.get(job).state is JobState.SUCCEEDED


def leftover(worker: Worker, name: str, stage: str) -> Path:
    """A folder as a killed worker leaves it."""
    folder = worker.settings.work_dir / name / stage / "ftjob-gone-e1"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"gigabytes")
    return folder


def test_what_killed_workers_of_this_host_left_is_removed_and_what_a_live_one_works_on_is_not(
    make_worker: Callable[..., Worker],
) -> None:
    worker = make_worker()
    own, dead = leftover(worker, "w", "train"), leftover(worker, "dead", "prepare")
    live = leftover(worker, "live", "train")
    with taken_if_free(Slot(worker="live", stage=Stage.TRAIN, lock_dir=worker.settings.lock_dir)):
        look_for_work(worker.neighbours)
    assert [own.exists(), dead.exists(), live.exists()] == [False, False, True]


def test_a_worker_without_its_slot_removes_nothing(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()
    own = leftover(worker, "w", "train")
    with taken_if_free(slot_of(worker.neighbours)):
        look_for_work(worker.neighbours)
    assert own.exists()


def test_a_cancel_reaches_a_run_that_waits_for_the_bucket(make_worker: Callable[..., Worker], tmp_path: Path) -> None:
    bucket = AbsentBucket(tmp_path / "bucket")
    worker = make_worker(bucket, upload_patience_seconds=120.0)
    job = worker.submit()
    look_for_work(worker.preparing)
    bucket.refusals = 10**6
    running = threading.Thread(target=look_for_work, args=[worker.neighbours], daemon=True)
    running.start()
    wait_until(lambda: worker.get(job).phase is Phase.PUBLISHING, what="the first write of the adapter")
    worker.jobs.cancel("default", job.id)
    running.join(20)
    assert worker.get(job).state is JobState.CANCELLED


def test_a_drain_while_the_bucket_is_away_costs_no_attempt(make_worker: Callable[..., Worker], tmp_path: Path) -> None:
    bucket = AbsentBucket(tmp_path / "bucket")
    bucket.refusals = 10**6
    worker = make_worker(bucket, upload_patience_seconds=120.0)
    job = worker.submit()
    working = worker.start()
    wait_until(lambda: worker.get(job).phase is Phase.PUBLISHING, what="the first write of the adapter")
    worker.drain.set()
    working.join(20)
    released = worker.get(job)
    assert (released.state, released.attempt) == (JobState.QUEUED, 0)
    assert [data["reason"] for type, data in worker.events(job) if type == "requeued"] == ["drained"]


class Heard:
    """What somebody is told of a run."""

    def __init__(self, told: list[str]) -> None:
        self._told = told

    def began(self, phase: Phase) -> None:
        self._told.append(phase.value)

    def heard(self, event: Event) -> None:
        if isinstance(event, ProgressEvent):
            self._told.append(f"step {event.step}")

    def ended(self, outcome: str) -> None:
        self._told.append(outcome)


def test_a_runs_audience_is_told_its_phases_its_steps_and_its_end(make_worker: Callable[..., Worker]) -> None:
    worker, told = make_worker(), list[str]()
    worker.neighbours = replace(worker.neighbours, invite=lambda _job: [Heard(told)])
    worker.submit(behaviour="crash once", steps="4")
    worker.work()
    assert told == ["fetching", "preparing", "done", "fetching", "training", "step 1", "step 2", "crash"]


def test_a_cancelled_run_is_told_to_have_been_cancelled(make_worker: Callable[..., Worker]) -> None:
    worker, told = make_worker(), list[str]()
    worker.neighbours = replace(worker.neighbours, invite=lambda _job: [Heard(told)])
    job = worker.submit(steps="1000", step_seconds="0.05")
    thread = worker.start()
    wait_until(lambda: "step 1" in told, what="a first step")
    worker.jobs.cancel("default", job.id)
    thread.join(30)
    assert told[-1] == "cancelled"

"""What MLflow and TensorBoard are told of a run, read back by their own means; and that neither can hold a run up."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from tensorboardX.proto.event_pb2 import Event as TensorBoardEvent

from graft_shared.jobs import Job, Stage
from graft_shared.settings import SharedSettings
from graft_shared.store import Jobs, Leases, open_database
from graft_worker import trackers
from graft_worker.protocol import EvaluationEvent, ProgressEvent
from graft_worker.supervisor.audience import DONE
from graft_worker.trackers import MOST_WAITING, Reporter, reporters_of
from tests.api_service import ApiService
from tests.store_factories import a_new_job
from tests.waiting import wait_until

PATIENCE_SECONDS = 120.0


def a_step(step: int) -> ProgressEvent:
    figures = {"grad_norm": 1.0, "learning_rate": 1e-4, "tokens_per_second": 10.0, "epoch": 0.5}
    return ProgressEvent(step=step, total_steps=20, tokens_seen=10 * step, loss=3.0 / step, **figures)


def training(api: ApiService, **changes: Any) -> Job:
    job_id = api.new_job(**changes)["id"]
    return api.train(job_id)


def tell(reporters: list[Reporter], *, first: int, last: int) -> None:
    """A run from one step to another, and an evaluation."""
    for reporter in reporters:
        for step in range(first, last + 1):
            reporter.heard(a_step(step))
        reporter.heard(EvaluationEvent(step=last, eval_loss=0.25))
        reporter.ended(DONE)
        reporter.thread.join(PATIENCE_SECONDS)
        assert not reporter.thread.is_alive()


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """Every point of TensorBoard's event files: records of length, its checksum, an event, and its checksum."""
    found = {}
    for path in sorted(folder.glob("events.*")):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = TensorBoardEvent.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found[value.tag, event.step] = value.simple_value
    return found


def test_tensorboards_files_hold_every_step(api: ApiService, tmp_path: Path) -> None:
    job = training(api)
    settings = SharedSettings(report_to=("tensorboard",), tensorboard_dir=tmp_path / "boards")
    tell(reporters_of(job, settings, api.leases), first=1, last=3)
    points = scalars(tmp_path / "boards" / "default" / job.id / "e2")
    assert [points["train/loss", step] for step in (1, 2, 3)] == pytest.approx([3.0, 1.5, 1.0])
    assert points["eval/loss", 3] == 0.25
    assert ("train/learning_rate", 1) in points


def test_in_mlflow_a_job_is_one_run_over_its_epochs(api: ApiService, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    job = training(api, name="mine")
    settings = SharedSettings(report_to=("mlflow",), mlflow_tracking_uri=uri)
    tell(reporters_of(job, settings, api.leases), first=1, last=3)
    tell(reporters_of(replace(job, epoch=3), settings, api.leases), first=3, last=5)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("graft/default")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert run.data.tags["graft.job_id"] == job.id
    assert run.data.params["base_model"] == job.spec["base_model"]
    assert {point.step for point in client.get_metric_history(run.info.run_id, "train/loss")} == {1, 2, 3, 4, 5}
    assert run.data.metrics["eval/loss"] == 0.25


def test_a_job_is_told_only_to_trackers_that_it_or_the_operator_asks_for(api: ApiService, tmp_path: Path) -> None:
    job = training(api)
    set_up = {"mlflow_tracking_uri": str(tmp_path), "tensorboard_dir": tmp_path}
    assert reporters_of(job, SharedSettings(**set_up), api.leases) == []
    assert reporters_of(job, SharedSettings(report_to=("mlflow", "tensorboard")), api.leases) == []
    asking = replace(job, spec={**job.spec, "training": {**job.spec["training"], "report_to": ["tensorboard"]}})
    (one,) = reporters_of(asking, SharedSettings(**set_up), api.leases)
    one.ended(DONE)
    one.thread.join(PATIENCE_SECONDS)
    assert reporters_of(replace(asking, stage=Stage.PREPARE), SharedSettings(**set_up), api.leases) == []


class Stuck:
    """A tracker that does not come back."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.steps: list[int] = []
        self.outcomes: list[str] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.let_go.wait(PATIENCE_SECONDS)
        self.steps.append(step)

    def end(self, outcome: str) -> None:
        self.outcomes.append(outcome)


def test_a_tracker_that_is_stuck_holds_nothing_up_and_is_told_the_end_once_it_comes_back() -> None:
    stuck, warnings = Stuck(), list[str]()
    reporter = Reporter("Stuck", lambda: stuck, warnings.append)
    began = time.monotonic()
    for step in range(1, 3 * MOST_WAITING):
        reporter.heard(a_step(step))
    reporter.ended(DONE)
    assert time.monotonic() - began < 10
    assert stuck.steps == []
    (warning,) = warnings
    assert "Stuck does not keep up" in warning
    stuck.let_go.set()
    reporter.thread.join(PATIENCE_SECONDS)
    assert (len(stuck.steps), stuck.outcomes) in ((MOST_WAITING, [DONE]), (MOST_WAITING + 1, [DONE]))


def test_a_tracker_that_stands_still_is_a_warning_long_before_its_queue_is_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers, "STILL_SECONDS", 0.5)
    stuck, warnings = Stuck(), list[str]()
    reporter = Reporter("Stuck", lambda: stuck, warnings.append)
    wait_until(lambda: reporter.heard(a_step(1)) or warnings, seconds=10, what="the warning", every=0.1)
    reporter.heard(a_step(2))
    assert [warning.partition(":")[0] for warning in warnings] == ["Stuck has stood still for 0 s"]
    stuck.let_go.set()
    reporter.ended(DONE)
    assert stuck.outcomes == [DONE]


def test_a_tracker_is_told_all_of_a_run_by_the_time_that_it_is_over() -> None:
    prompt = Stuck()
    prompt.let_go.set()
    reporter = Reporter("Prompt", lambda: prompt, pytest.fail)
    for step in range(1, 100):
        reporter.heard(a_step(step))
    reporter.ended(DONE)
    assert (prompt.steps, prompt.outcomes) == ([*range(1, 100)], [DONE])


def test_a_tracker_that_fails_is_one_warning_of_the_job(tmp_path: Path, template: Path) -> None:
    path = tmp_path / "jobs.db"
    path.write_bytes(template.read_bytes())
    database = open_database(f"sqlite:///{path}")
    leases = Leases(database, timedelta(seconds=60))
    Jobs(database).submit(a_new_job())
    job = leases.claim("w/prepare", stage=Stage.PREPARE, gpu_classes=[])
    assert job is not None
    asked = {"report_to": ["tensorboard"]}
    trained = replace(job, stage=Stage.TRAIN, spec={**job.spec, "training": asked})
    (tmp_path / "file").touch()
    (reporter,) = reporters_of(trained, SharedSettings(tensorboard_dir=tmp_path / "file"), leases)
    for step in range(1, 2 * MOST_WAITING):
        reporter.heard(a_step(step))
    reporter.ended(DONE)
    reporter.thread.join(PATIENCE_SECONDS)
    read = leases.read(job.id)
    assert read is not None
    (warning,) = read.warnings
    assert warning["code"] == "tracker_failed" and "TensorBoard" in warning["message"]
    database.close()


def test_what_opens_mlflow_is_told_to_no_tenant_and_to_no_log(
    api: ApiService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    job = training(api)
    settings = SharedSettings(report_to=("mlflow",), mlflow_tracking_uri="http://graft:hunter2@127.0.0.1:1")
    tell(reporters_of(job, settings, api.leases), first=1, last=1)
    read = api.leases.read(job.id)
    assert read is not None
    (warning,) = read.warnings
    assert "MLflow" in warning["message"] and "(MlflowException)" in warning["message"]
    (record,) = (record for record in caplog.records if record.msg == "tracker_failed")
    assert "127.0.0.1:1" in record.__dict__["facts"]["reason"]
    assert "hunter2" not in f"{warning} {record.__dict__}"


@pytest.mark.parametrize(
    ("name", "needs"), [("mlflow", "MLFLOW_TRACKING_URI"), ("tensorboard", "GRAFT_TENSORBOARD_DIR")]
)
def test_a_job_that_asks_for_what_is_not_set_up_is_told_what_to_set(api: ApiService, name: str, needs: str) -> None:
    answer = api.post(api.spec(training={"report_to": [name]}))
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["param"] == "training.report_to"
    assert needs in answer.json()["error"]["message"]


def test_an_unknown_tracker_is_refused_with_those_that_are_known(api: ApiService) -> None:
    answer = api.post(api.spec(training={"report_to": ["wandb"]}))
    assert answer.status_code == 422, answer.text
    assert "mlflow" in answer.json()["error"]["message"] and "tensorboard" in answer.json()["error"]["message"]

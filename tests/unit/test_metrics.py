"""Every figure of every process is in docs/observability.md, with its type and labels, and nothing else is."""

# ruff: noqa: N802 (NVML's own names)

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from graft_api.metrics import figures_of
from graft_shared.errors import StoreUnavailable
from graft_shared.jobs import Checkpoint, FailureReason, Job, Phase, Stage, StoredObject
from graft_shared.metrics import RECONCILER, counted_pass
from graft_shared.store import Jobs, open_database
from graft_worker import metrics as worker_metrics
from graft_worker.device import Device
from graft_worker.gpu import Gpu
from graft_worker.metrics import OWN, RunFigures
from graft_worker.protocol import CheckpointEvent, ProgressEvent, TrainedEvent
from graft_worker.settings import WorkerSettings
from graft_worker.supervisor.audience import DONE, OUTCOMES, Audience
from tests.api_service import ApiService, make_service, migrated_database
from tests.store_factories import a_new_job

DOCS = Path(__file__).parents[2] / "docs" / "observability.md"
ROW = re.compile(r"^\| `(graft_\w+)` \| (\w+) \|([^|]*)\|", re.MULTILINE)
GPU = Device(kind="cuda", index=1, name="Card", gpu_class="80gb", takes_classes=("80gb",), stage=Stage.TRAIN)


class FakeNvml:
    """A driver that knows one card and does not tell its energy."""

    class NVMLError(Exception):
        pass

    NVML_TEMPERATURE_GPU = 0

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index != 1:
            raise self.NVMLError
        return index

    def nvmlDeviceGetMemoryInfo(self, _card: int) -> Any:
        return SimpleNamespace(used=3 * 1024**3, total=80 * 1024**3)

    def nvmlDeviceGetUtilizationRates(self, _card: int) -> Any:
        return SimpleNamespace(gpu=75)

    def nvmlDeviceGetTemperature(self, _card: int, _sensor: int) -> int:
        return 55

    def nvmlDeviceGetPowerUsage(self, _card: int) -> int:
        return 312_500

    def nvmlDeviceGetTotalEnergyConsumption(self, _card: int) -> int:
        return 5000


def values(registry: CollectorRegistry | Gpu) -> dict[tuple[str, ...], float]:
    """Every sample by its name and label values."""
    samples = (sample for family in registry.collect() for sample in family.samples)
    return {(sample.name, *sample.labels.values()): sample.value for sample in samples}


def grown(before: dict[tuple[str, ...], float], *key: str) -> float:
    """What a counter of the worker has counted since."""
    return values(OWN).get(key, 0.0) - before.get(key, 0.0)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiService]:
    service = make_service(tmp_path, migrated_database(tmp_path))
    yield service
    service.database.close()


def described(families: Iterable[Metric]) -> dict[str, str]:
    """The type of each family under the name that is queried."""
    return {family.name + ("_total" if family.type == "counter" else ""): family.type for family in families}


def test_the_documents_table_is_what_is_registered(api: ApiService, tmp_path: Path) -> None:
    figures = figures_of(api.http.app.state.neighbours)
    place = worker_metrics.figures_of(WorkerSettings(state_dir=tmp_path), replace(GPU, kind="cpu"))
    (tmp_path / "work").mkdir()
    told = [*figures.collect(), *RECONCILER.collect(), *place.collect(), *Gpu(FakeNvml(), 1).collect()]
    written = {name: kind for name, kind, _ in ROW.findall(DOCS.read_text())}
    assert written == described(told)


def test_labels_are_as_written(api: ApiService, tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    api.succeed(api.new_job()["id"])
    api.train(api.new_job()["id"])
    with counted_pass("reconcile"):
        pass
    a_run(tmp_path).ended(DONE)
    written = {name: set(re.findall(r"`(\w+)`", labels)) for name, _, labels in ROW.findall(DOCS.read_text())}
    place = worker_metrics.figures_of(WorkerSettings(state_dir=tmp_path), replace(GPU, kind="cpu"))
    sources = [figures_of(api.http.app.state.neighbours), RECONCILER, place, Gpu(FakeNvml(), 1)]
    seen: dict[str, set[str]] = {}
    for family in (family for source in sources for family in source.collect()):
        name = family.name + ("_total" if family.type == "counter" else "")
        for sample in family.samples:
            seen[name] = set(sample.labels) - {"le"}
    assert seen == {name: written[name] for name in seen}
    assert len(seen) > 30


def test_names_keep_the_conventions() -> None:
    for name, kind, _ in ROW.findall(DOCS.read_text()):
        assert name.endswith("_total") == (kind == "counter"), name
        assert not re.search(r"_(ms|milliseconds|minutes|hours|kib|mib|gib|mb|gb|percent)(_|$)", name), name


def test_a_route_is_counted_by_its_template_and_an_unknown_address_makes_no_series(api: ApiService) -> None:
    job = api.new_job()
    for path in (f"/jobs/{job['id']}", "/jobs/ftjob-unknown", "/nowhere/1", "/nowhere/2"):
        api.http.get(path)
    api.http.request("BREW", "/coffee")
    counted = values(figures_of(api.http.app.state.neighbours))
    keys = {key[1:] for key in counted if key[0] == "graft_http_requests_total"}
    assert {("GET", "/jobs/{job_id}", "200"), ("GET", "/jobs/{job_id}", "404"), ("GET", "none", "404")} <= keys
    assert {key[0] for key in keys} <= {"GET", "POST", "PUT", "DELETE", "other"}
    assert not any("nowhere" in part for key in keys for part in key)


def test_what_trains_is_told_of_its_worker(api: ApiService) -> None:
    job = api.new_job()
    api.train(job["id"])
    counted = values(figures_of(api.http.app.state.neighbours))
    here = ("worker-1", job["gpu_class"])
    assert counted["graft_training_step", *here] == 3
    assert counted["graft_training_last_step", *here] == 10
    assert counted["graft_training_loss", *here] == 1.0
    assert counted["graft_training_expected_peak_bytes", *here] == job["memory"]["predicted_peak_bytes"]
    api.leases.settle_cancelled(job["id"], 2)
    assert not any(key[0].startswith("graft_training") for key in values(figures_of(api.http.app.state.neighbours)))


def test_reports_that_wait_are_counted(api: ApiService) -> None:
    file_id = api.upload().json()["id"]
    api.http.get(f"/files/{file_id}/report", params={"base_model": api.spec()["base_model"]})
    counted = values(figures_of(api.http.app.state.neighbours))
    assert counted["graft_waiting_reports",] == 1
    assert 0 <= counted["graft_oldest_waiting_report_age_seconds",] < 60
    assert counted["graft_waiting_merges",] == 0


def test_a_card_tells_in_base_units_and_what_it_does_not_tell_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: FakeNvml, _card: int) -> int:
        raise self.NVMLError

    monkeypatch.setattr(FakeNvml, "nvmlDeviceGetTotalEnergyConsumption", refuse)
    assert values(Gpu(FakeNvml(), 1)) == {
        ("graft_gpu_memory_used_bytes", "1"): 3 * 1024**3,
        ("graft_gpu_memory_total_bytes", "1"): 80 * 1024**3,
        ("graft_gpu_utilization_ratio", "1"): 0.75,
        ("graft_gpu_temperature_celsius", "1"): 55,
        ("graft_gpu_power_watts", "1"): 312.5,
    }


def test_a_worker_without_a_gpu_or_a_driver_has_no_card() -> None:
    assert Gpu.of(replace(GPU, kind="cpu")) is None
    assert Gpu.of(replace(GPU, index=99)) is None, "NVML is installed here and finds no such card"


def a_run(tmp_path: Path, checkpoint: Checkpoint | None = None) -> RunFigures:
    database = open_database(f"sqlite:///{migrated_database(tmp_path / 'jobs')}")
    job: Job = replace(Jobs(database).submit(a_new_job())[0], stage=Stage.TRAIN, checkpoint=checkpoint)
    database.close()
    return RunFigures(job)


def a_step(step: int, tokens_seen: int) -> ProgressEvent:
    figures = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-4, "tokens_per_second": 10.0, "epoch": 0.5}
    return ProgressEvent(step=step, total_steps=20, tokens_seen=tokens_seen, **figures)


def test_a_run_that_goes_on_counts_what_it_does_itself(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    before = values(OWN)
    stored = StoredObject(key="k", size=1, sha256="0" * 64)
    run = a_run(tmp_path, Checkpoint(step=10, epoch=1, object=stored))
    run.began(Phase.FETCHING)
    run.began(Phase.TRAINING)
    run.heard(a_step(12, 1200))
    run.heard(a_step(14, 1400))
    run.heard(CheckpointEvent(step=14, path="/nowhere"))
    memory = {"expected_peak_bytes": 100, "measured_peak_bytes": 97, "measured_on": "cuda"}
    run.heard(TrainedEvent(proof={}, metrics={}, memory=memory, versions={}))
    run.ended(FailureReason.DRAINED.value)
    assert grown(before, "graft_worker_trained_steps_total") == 4
    assert grown(before, "graft_worker_trained_tokens_total") == 400
    assert grown(before, "graft_worker_checkpoints_total") == 1
    assert grown(before, "graft_worker_runs_total", "train", "drained") == 1
    assert grown(before, "graft_worker_run_duration_seconds_count", "train") == 1
    assert grown(before, "graft_worker_phase_seconds_total", "train", "training") > 0
    assert grown(before, "graft_worker_memory_forecast_ratio_count") == 1


def test_a_worker_tells_of_every_outcome_before_its_first_run(tmp_path: Path) -> None:
    merger = replace(GPU, kind="cpu", stage=Stage.MERGE)
    told = values(worker_metrics.figures_of(WorkerSettings(state_dir=tmp_path), merger))
    runs = {key[1:]: value for key, value in told.items() if key[0] == "graft_worker_runs_total" and key[1] == "merge"}
    assert runs == {("merge", outcome): 0 for outcome in OUTCOMES}


def test_a_listener_that_fails_is_told_no_more_and_the_others_are() -> None:
    told: list[str] = []

    class Broken:
        def began(self, phase: Phase) -> None:
            told.append(f"broken {phase}")
            raise ValueError

        heard = ended = began  # type: ignore[assignment]

    class Sound:
        def began(self, phase: Phase) -> None:
            told.append(f"sound {phase}")

        def heard(self, _event: object) -> None: ...

        def ended(self, outcome: str) -> None:
            told.append(outcome)

    audience = Audience([Broken(), Sound()])
    audience.began(Phase.LOADING)
    audience.ended(DONE)
    assert told == ["broken loading", "sound loading", DONE]


def test_a_pass_that_is_postponed_is_counted_as_such() -> None:
    before = values(RECONCILER)
    with pytest.raises(StoreUnavailable), counted_pass("sweep"):
        raise StoreUnavailable(reason="away")
    with counted_pass("sweep"):
        pass
    after = values(RECONCILER)
    for outcome in ("done", "postponed"):
        key = ("graft_reconciler_passes_total", "sweep", outcome)
        assert after[key] - before.get(key, 0) == 1
    assert after["graft_reconciler_last_pass_timestamp_seconds", "sweep"] > 1e9

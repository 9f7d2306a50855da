"""The real app over real SQLite and a real directory bucket, with a doorbell that remembers; spoken to in-process."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from sqlalchemy import create_engine
from starlette.testclient import TestClient

from graft_api.app import create_app, neighbours_of
from graft_api.models.bases import HubConfigs
from graft_api.settings import ApiSettings
from graft_shared.artifacts import MANIFEST_NAME, AdapterManifest, FileProof, adapter_prefix
from graft_shared.buckets.directory import DirectoryBucket
from graft_shared.defaults import load_capacity, load_catalogue
from graft_shared.jobs import Job, Stage
from graft_shared.store import Database, Files, Jobs, Leases, Workers, open_database
from graft_shared.store.migrate import migrate
from tests.factories import EMPTY_WEIGHTS
from tests.fakes.doorbell import FakeDoorbell
from tests.store_factories import a_beat

LLAMA = "meta-llama/Llama-2-7b-hf"
ROWS = b'{"text": "one"}\n{"text": "two"}\n'
ADAPTER = {"adapter_config.json": b'{"r": 8}', "adapter_model.safetensors": bytes(range(256)) * 5000}


A_REPORT: dict[str, Any] = {
    "kind": "text",
    "rows": 2,
    "max_length": 1024,
    "train": {"rows": 2, "tokens": 6, "trained_tokens": 4},
    "validation": None,
    "truncated_rows": 0,
    "truncated_share": 0.0,
    "duplicate_rows": 0,
    "nothing_to_learn_rows": 0,
    "lengths": {"percentiles": {"50": 3}, "histogram": {"edges": [3, 4], "counts": [2]}},
    "first_rows": [],
    "warnings": [],
}

capacity_table = functools.cache(load_capacity)
catalogue = functools.cache(load_catalogue)


def migrated_database(folder: Path) -> Path:
    """A SQLite file with our tables, to be copied: a migration takes longer than most tests."""
    path = folder / "template.db"
    database = open_database(f"sqlite:///{path}")
    migrate(database)
    database.close()
    return path


@dataclass
class ApiService:
    """What a test of the API holds in its hands: the client, and the neighbours behind its back."""

    http: Any  # a TestClient, or a client of a real process
    settings: ApiSettings
    database: Database
    bucket: Any
    doorbell: FakeDoorbell

    @property
    def jobs(self) -> Jobs:
        return Jobs(self.database)

    @property
    def files(self) -> Files:
        return Files(self.database)

    @property
    def leases(self) -> Leases:
        return Leases(self.database, timedelta(seconds=60))

    @property
    def workers(self) -> Workers:
        return Workers(self.database)

    def upload(self, content: bytes = ROWS, name: str = "rows.jsonl") -> Any:
        return self.http.post("/files", files={"file": (name, content)})

    def spec(self, **changes: Any) -> dict[str, Any]:
        """A body that is accepted."""
        return {"base_model": LLAMA, "dataset": {"file": self.upload().json()["id"]}, **changes}

    def post(self, spec: dict[str, Any] | None = None, **headers: str) -> Any:
        return self.http.post("/jobs", json=spec or self.spec(), headers=headers)

    def idle_workers(self, stage: Stage = Stage.PREPARE, count: int = 10) -> None:
        """Have workers of this stage be alive, which bells are rung for."""
        for number in range(count):
            self.workers.beat(**a_beat(f"{stage}-{number}", stages=(stage,)))

    def let_bells_ring(self) -> None:
        """Wait until the bells of all jobs so far are rung and marked, which changes their rows."""
        bells = self.http.app.state.neighbours.bells
        for thread in (bells._ringer, bells._marker):
            thread.submit(int).result()

    def new_job(self, **changes: Any) -> dict[str, Any]:
        answer = self.post(self.spec(**changes))
        assert answer.status_code == 202, answer.text
        job: dict[str, Any] = answer.json()
        return job

    def claim(self, job_id: str, stage: Stage = Stage.PREPARE) -> Job:
        """Take a job as a worker would; it must be the one that is next."""
        classes = [gpu.name for gpu in capacity_table().classes]
        job = self.leases.claim("worker-1", stage=stage, gpu_classes=classes)
        assert job is not None and job.id == job_id
        return job

    def train(self, job_id: str, steps: int = 3) -> Job:
        """Bring a job to the middle of its training."""
        prepared = self.claim(job_id)
        self.leases.hand_to_training(job_id, prepared.epoch, {"report": A_REPORT})
        job = self.claim(job_id, Stage.TRAIN)
        lines = [{"step": n, "loss": 3.0 / n, "grad_norm": 1.0, "learning_rate": 1e-4} for n in range(1, steps + 1)]
        progress = {"step": steps, "total_steps": 10, "percent": 10.0 * steps, "eta_seconds": 70.0}
        self.leases.record_progress(
            job_id, job.epoch, progress=progress, metrics={"train_loss": 3.0 / steps}, steps=lines
        )
        return job

    def succeed(
        self,
        job_id: str,
        files: dict[str, bytes] | None = None,
        *,
        measured_peak_bytes: int = 5 * 1024**3,
        **memory: int,
    ) -> Job:
        """Bring a job to its end, with an adapter in the bucket; `memory` is what else its trainer says of it."""
        job = self.train(job_id)
        prefix = adapter_prefix(job.tenant, job.id, job.epoch)
        stored = [self.bucket.put_bytes(prefix + name, data) for name, data in (files or ADAPTER).items()]
        manifest = AdapterManifest(
            job_id=job.id,
            epoch=job.epoch,
            base_model=LLAMA,
            base_revision="abc",
            files=tuple(FileProof(name=s.key.removeprefix(prefix), size=s.size, sha256=s.sha256) for s in stored),
            proof={"finite": True},
            versions={"torch": "2"},
        )
        written = self.bucket.put_bytes(prefix + MANIFEST_NAME, manifest.to_bytes())
        adapter = {
            "uri": self.bucket.uri(prefix.rstrip("/")),
            "epoch": job.epoch,
            "prefix": prefix,
            "manifest": {"key": written.key, "size": written.size, "sha256": written.sha256},
        }
        measured = {"measured_peak_bytes": measured_peak_bytes, "measured_on": "cuda", **memory}
        self.leases.settle_success(job_id, job.epoch, adapter=adapter, metrics={"eval_loss": 0.5}, memory=measured)
        return job


def make_service(
    folder: Path, template: Path, *, classes: list[str] | None = None, hub: HubConfigs | None = None, **settings: Any
) -> ApiService:
    """A service on a folder of its own; `classes` restricts the fleet's table."""
    shutil.copy(template, folder / "graft.db")
    chosen = ApiSettings(state_dir=folder, **settings)
    table = capacity_table()
    database = open_database(chosen.database)
    bucket, doorbell = DirectoryBucket(folder / "bucket"), FakeDoorbell()
    app = _app()
    app.state.neighbours = neighbours_of(
        settings=chosen,
        database=database,
        bucket=bucket,
        doorbell=doorbell,
        catalogue=catalogue(),
        capacity=table.restricted_to(classes) if classes else table,
        hub=hub,
    )
    http = TestClient(app, base_url="http://localhost")
    return ApiService(http=http, settings=chosen, database=database, bucket=bucket, doorbell=doorbell)


@functools.cache
def _app() -> FastAPI:
    """One app for all tests, given other neighbours for each: its routes and their document take long to make."""
    nowhere = Path("/nonexistent")
    neighbours = neighbours_of(
        settings=ApiSettings(state_dir=nowhere),
        database=Database(create_engine("sqlite://")),
        bucket=DirectoryBucket(nowhere),
        doorbell=FakeDoorbell(),
        catalogue=catalogue(),
        capacity=capacity_table(),
    )
    return create_app(neighbours)


def register_base(folder: Path, config: dict[str, Any]) -> None:
    """What the API looks at of a registered base: its config, and weights that are none."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(EMPTY_WEIGHTS)


def error_of(answer: Any, status: int) -> dict[str, Any]:
    """The error of an answer, which must have this status and the one shape."""
    assert answer.status_code == status, (answer.status_code, answer.text)
    assert answer.headers["x-request-id"]
    body = json.loads(answer.content)
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    return error

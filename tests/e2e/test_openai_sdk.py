"""The unmodified `openai` package against a running service: only its base_url is changed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from tests.factories import make_tiny_base
from tests.fleet import OnThisMachine
from tests.servers import RedisServer
from tests.waiting import free_port, wait_until

ROOT = Path(__file__).parents[2]
RED, BLUE = "r" * 24, "b" * 24
ROWS = b'{"prompt": "What does the cat say?", "completion": "cat"}\n' * 4
TERMINAL = ("succeeded", "failed", "cancelled")


@dataclass
class Members(OnThisMachine):
    """API, reconciler and workers whose children keep the protocol without torch; SQLite, Redis and a folder."""

    state_dir: Path
    redis: RedisServer
    port: int = field(default_factory=free_port)
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:  # type: ignore[override]
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Members:
        make_tiny_base(self.models_dir / "graft" / "tiny")
        subprocess.run(
            [sys.executable, "-m", "graft_shared.store.migrate"], env=self._environment(), check=True, timeout=60
        )
        self._run("graft_api", "--port", str(self.port))
        self._run("graft_shared.reconciler")
        for stage in ("prepare", "train"):
            self._run("tests.fakes.worker", GRAFT_WORKER_NAME=stage, GRAFT_WORKER_STAGE=stage)
        wait_until(self._ready, what=f"the service; its logs are under {self.state_dir}")
        return self

    def stop(self) -> None:
        for process in self.running:
            process.send_signal(signal.SIGTERM)
        for process in self.running:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _run(self, module: str, *arguments: str, **more: str) -> None:
        with (self.state_dir / f"{module}{len(self.running)}.log").open("ab") as log:
            command = [sys.executable, "-m", module, *arguments]
            environment = self._environment() | more
            self.running.append(
                subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
            )

    def _environment(self) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")},
            "PYTHONPATH": str(ROOT),
            "GRAFT_STATE_DIR": str(self.state_dir),
            "GRAFT_BROKER_URL": self.redis.url,
            "GRAFT_API_KEYS": f"red={RED},blue={BLUE}",
            "GRAFT_WORKER_DEVICE": "cpu",
            "GRAFT_LEASE_SECONDS": "8",
            "GRAFT_HEARTBEAT_SECONDS": "1",
            "GRAFT_RECONCILE_SECONDS": "1",
            "GRAFT_LOOK_SECONDS": "2",
            "GRAFT_HUB_ALLOWED": "away/*",
            "HF_ENDPOINT": "http://127.0.0.1:9",  # the hub of these tests answers nobody
        }

    def _ready(self) -> bool:
        assert all(process.poll() is None for process in self.running), self.log()
        try:
            answer = httpx2.get(f"{self.url}/capacity", headers={"authorization": f"Bearer {RED}"}, timeout=5)
        except httpx2.TransportError:
            return False
        return answer.status_code == 200 and len(answer.json()["workers"]) == 2


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer) -> Iterator[Members]:
    members = Members(tmp_path_factory.mktemp("members"), redis_server)
    try:
        yield members.start()
    finally:
        members.stop()


@pytest.fixture
def client(service: Members) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=RED) as opened:
        yield opened


def upload(client: openai.OpenAI, content: bytes = ROWS) -> str:
    return client.files.create(file=("rows.jsonl", content), purpose="fine-tune").id


def create(client: openai.OpenAI, folder: Path, steps: int = 5, seconds: float = 0.02, **more: Any) -> FineTuningJob:
    """A job of the toy trainer, which reads in the metadata how it is to behave."""
    asked = {"steps": str(steps), "step_seconds": str(seconds), "witness": str(folder)}
    asked |= more.pop("metadata", {})
    return client.fine_tuning.jobs.create(
        model="graft/tiny", training_file=more.pop("training_file", None) or upload(client), metadata=asked, **more
    )


def ended(client: openai.OpenAI, job_id: str) -> FineTuningJob:
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job_id).status in TERMINAL, what=f"the end of {job_id}")
    return client.fine_tuning.jobs.retrieve(job_id)


def events_of(client: openai.OpenAI, job_id: str) -> list[str]:
    """What has happened, oldest first, by the native words."""
    events = list(client.fine_tuning.jobs.list_events(job_id, limit=3))
    return [event.data["event"] for event in reversed(events) if event.type == "message"]  # type: ignore[index]


def native(service: Members, path: str, method: str = "GET") -> httpx2.Response:
    return httpx2.request(method, f"{service.url}{path}", headers={"authorization": f"Bearer {RED}"}, timeout=30)


def test_files_are_uploaded_listed_read_and_deleted(client: openai.OpenAI) -> None:
    made = [client.files.create(file=(f"{n}.jsonl", ROWS), purpose="fine-tune") for n in range(5)]
    assert (made[0].object, made[0].bytes, made[0].filename, made[0].status) == (
        "file",
        len(ROWS),
        "0.jsonl",
        "processed",
    )
    assert client.files.retrieve(made[0].id) == made[0]
    assert client.files.wait_for_processing(made[0].id).status == "processed"
    assert client.files.content(made[0].id).read() == ROWS
    ids = [file.id for file in made]
    assert [file.id for file in client.files.list(limit=2, order="asc") if file.id in ids] == ids
    assert [file.id for file in client.files.list(limit=2, purpose="fine-tune") if file.id in ids] == ids[::-1]
    assert client.files.delete(ids[0]).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(ids[0])
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.files.create(file=ROWS, purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600})
    assert refused.value.param == "expires_after"


def test_a_job_runs_from_its_file_to_its_model(client: openai.OpenAI, service: Members, tmp_path: Path) -> None:
    validation_file = upload(client)
    method: Any = {
        "type": "supervised",
        "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 6, "learning_rate_multiplier": "auto"}},
    }
    job = create(client, tmp_path, seconds=0.2, suffix="bot", seed=7, validation_file=validation_file, method=method)
    assert (job.object, job.model, job.seed, job.organization_id) == ("fine_tuning.job", "graft/tiny", 7, "red")
    assert job.status in ("validating_files", "queued", "running")
    assert (job.fine_tuned_model, job.trained_tokens, job.result_files) == (None, None, [])
    assert job.method is not None and job.method.supervised is not None
    assert job.method.supervised.hyperparameters is not None
    assert job.method.supervised.hyperparameters.to_dict() == job.hyperparameters.to_dict()
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, 6)
    assert job.hyperparameters.learning_rate_multiplier == 1
    done = ended(client, job.id)
    assert (done.status, done.error, done.trained_tokens) == ("succeeded", None, 50), service.log()
    assert done.fine_tuned_model == f"ft:graft/tiny:red:bot:{job.id.removeprefix('ftjob-')}"
    assert native(service, f"/jobs/{job.id}").json()["status"] == "succeeded"
    assert client.models.retrieve(done.fine_tuned_model).owned_by == "red"
    assert client.models.retrieve("graft/tiny").owned_by == "graft"
    assert {"graft/tiny", done.fine_tuned_model} <= {model.id for model in client.models.list()}
    assert events_of(client, job.id)[0] == "submitted" and events_of(client, job.id)[-1] == "succeeded"
    metrics = [event for event in client.fine_tuning.jobs.list_events(job.id, limit=100) if event.type == "metrics"]
    assert [event.data["train_loss"] for event in metrics][-1] == 1.0  # type: ignore[index]
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    assert [checkpoint.step_number for checkpoint in checkpoints] == [4, 2]
    assert checkpoints[0].fine_tuned_model_checkpoint == f"{done.fine_tuned_model}:ckpt-step-4"
    assert checkpoints[1].metrics.train_loss == 0.5
    assert [each.id for each in client.fine_tuning.jobs.checkpoints.list(job.id)] == [each.id for each in checkpoints]


def test_a_job_is_paused_resumed_and_cancelled(client: openai.OpenAI, service: Members, tmp_path: Path) -> None:
    job = create(client, tmp_path, steps=100_000, seconds=0.05)

    def saved() -> bool:
        return len(client.fine_tuning.jobs.checkpoints.list(job.id).data) > 0

    wait_until(saved, what="a checkpoint")
    with pytest.raises(openai.ConflictError):
        client.with_options(base_url=service.url).delete(f"/jobs/{job.id}", cast_to=object)
    assert client.fine_tuning.jobs.pause(job.id).status in ("running", "queued")
    wait_until(lambda: "paused" in events_of(client, job.id), what="the pause")
    assert client.fine_tuning.jobs.retrieve(job.id).status == "queued"
    assert client.fine_tuning.jobs.resume(job.id).status in ("queued", "running")
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "running", what="the second run")
    assert client.fine_tuning.jobs.cancel(job.id).status in ("running", "cancelled")
    done = ended(client, job.id)
    assert (done.status, done.fine_tuned_model) == ("cancelled", None)
    told = events_of(client, job.id)
    assert told.index("paused") < told.index("resumed") < told.index("cancelled")
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled", "asking twice is asking once"


def test_pages_of_jobs_hold_every_job_once_and_filter_by_metadata(client: openai.OpenAI, tmp_path: Path) -> None:
    training_file = upload(client)
    made = [
        create(client, tmp_path, training_file=training_file, metadata={"pages": "yes", "number": str(number)}).id
        for number in range(5)
    ]
    everything = [job.id for job in client.fine_tuning.jobs.list(limit=2)]
    assert len(everything) == len(set(everything)) and [each for each in everything if each in made] == made[::-1]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2, metadata={"pages": "yes"})] == made[::-1]
    third = [job.id for job in client.fine_tuning.jobs.list(metadata={"pages": "yes", "number": "3"})]
    assert third == [made[3]]


def test_a_failed_job_says_why(client: openai.OpenAI, tmp_path: Path) -> None:
    failed = ended(client, create(client, tmp_path, metadata={"behaviour": "bad data"}).id)
    assert failed.status == "failed" and failed.error is not None
    assert (failed.error.code, failed.error.param) == ("invalid_training_file", "training_file")


def test_a_deleted_job_takes_its_artifacts_along(client: openai.OpenAI, service: Members, tmp_path: Path) -> None:
    done = ended(client, create(client, tmp_path).id)

    def stored() -> list[Path]:
        return [path for path in (service.state_dir / "bucket").rglob("*") if done.id in str(path) and path.is_file()]

    assert stored()
    assert native(service, f"/jobs/{done.id}", "DELETE").json()["deleted"]
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.retrieve(done.id)
    wait_until(lambda: not stored(), seconds=120, what="the sweep")


def test_every_refusal_has_the_clients_own_class(client: openai.OpenAI, service: Members, tmp_path: Path) -> None:
    jobs = client.with_options(max_retries=0).fine_tuning.jobs
    file_id = upload(client)

    def refused(kind: type[openai.APIStatusError], **body: Any) -> openai.APIStatusError:
        with pytest.raises(kind) as caught:
            jobs.create(**{"model": "graft/tiny", "training_file": file_id, **body})
        assert type(caught.value) is kind and caught.value.request_id
        return caught.value

    assert refused(openai.BadRequestError, extra_body={"sufix": "x"}).code == "unknown_parameter"
    assert refused(openai.UnprocessableEntityError, model="no/such").param == "model"
    dpo = refused(openai.UnprocessableEntityError, method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 1}}})
    assert dpo.param == "method.type"
    wandb = refused(openai.UnprocessableEntityError, integrations=[{"type": "wandb", "wandb": {"project": "p"}}])
    assert wandb.param == "integrations"
    assert refused(openai.InternalServerError, model="away/model").code == "base_model_unavailable"
    with pytest.raises(openai.NotFoundError) as unknown:
        jobs.retrieve("ftjob-nothing")
    assert (unknown.value.code, unknown.value.type) == ("job_not_found", "not_found_error")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="x" * 24).files.list()
    with pytest.raises(openai.NotFoundError):
        client.with_options(api_key=BLUE).files.retrieve(file_id)
    link = f"/objects/key?expires=1&signature={'0' * 64}"
    with pytest.raises(openai.PermissionDeniedError):
        client.with_options(base_url=service.url).get(link, cast_to=object)


class Counting(httpx2.BaseTransport):
    """Passes requests on, and loses the answers that it is told to lose, after the service has given them."""

    def __init__(self, lose: int = 0) -> None:
        self.lose, self.requests, self.statuses = lose, list[httpx2.Request](), list[int]()
        self._inner = httpx2.HTTPTransport()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        answer = self._inner.handle_request(request)
        answer.read()
        self.statuses.append(answer.status_code)
        if self.lose:
            self.lose -= 1
            raise httpx2.ReadTimeout("the answer was lost", request=request)
        return answer


def over(service: Members, transport: Counting) -> openai.OpenAI:
    http_client = httpx2.Client(transport=transport)
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key=RED, http_client=http_client)


def test_what_the_client_sends_again_by_itself_makes_no_second_job(
    client: openai.OpenAI, service: Members, tmp_path: Path
) -> None:
    training_file = upload(client)
    transport = Counting()
    lossy = over(service, transport)
    ids = []
    for lost in range(lossy.max_retries + 1):
        transport.lose = lost
        ids.append(create(lossy, tmp_path, training_file=training_file, metadata={"resent": "yes"}).id)
    assert len(transport.requests) == 1 + 2 + 3
    assert not any("idempotency-key" in request.headers for request in transport.requests), "else use the key"
    made = [job.id for job in client.fine_tuning.jobs.list(metadata={"resent": "yes"})]
    assert made == ids[::-1], "three calls with equal bodies are three jobs, whatever was lost"


def test_a_conflict_is_not_tried_again(client: openai.OpenAI, service: Members, tmp_path: Path) -> None:
    done = ended(client, create(client, tmp_path).id)
    transport = Counting()
    with pytest.raises(openai.ConflictError) as refused:
        over(service, transport).fine_tuning.jobs.pause(done.id)
    assert (refused.value.code, len(transport.requests)) == ("job_finished", 1)
    assert refused.value.response.headers["x-should-retry"] == "false"
    file_id = upload(client)
    waiting = create(client, tmp_path, training_file=file_id, metadata={"behaviour": "prepares for long"})
    with pytest.raises(openai.ConflictError):
        client.files.delete(file_id)
    client.fine_tuning.jobs.cancel(waiting.id)
    ended(client, waiting.id)
    assert client.files.delete(file_id).deleted

"""Reports on files: their life in the store, the worker that makes them, and what their tenants see."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select, update

from graft_client import GraftClient
from graft_client.transport import Transport
from graft_shared.defaults import load_capacity
from graft_shared.errors import BucketUnavailable, FileNotFound, LeaseLost, TooManyReports
from graft_shared.jobs import Failure, FailureReason, Stage, StoredObject
from graft_shared.store import Database, Files, Leases, Report, Reports, ReportState
from graft_shared.store.reports import KEPT_FOR_A_FILE, LIFE, MAX_ATTEMPTS, MOST_WAITING, TRIED_AGAIN_AFTER
from graft_shared.store.tables import reports as table
from graft_worker.device import Device
from graft_worker.settings import WorkerSettings
from graft_worker.supervisor.bases import BaseModels
from graft_worker.supervisor.cache import HostCache
from graft_worker.supervisor.neighbours import Neighbours
from graft_worker.supervisor.spare import SpareTrainer
from graft_worker.tasks import look_for_work
from tests.api_service import ApiService, error_of, make_service, migrated_database, register_base
from tests.factories import make_tokenizer
from tests.waiting import wait_until

SPEC = {"base_model": "graft/tiny", "max_length": 64, "validation": None}
LEASE = timedelta(seconds=60)
USERS = Failure(reason=FailureReason.INVALID_PARAMETER, message="Too few rows", param="validation.split")
SERVERS = Failure(reason=FailureReason.CRASH, message="It crashed")


class Store:
    """Reports over a few files."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.files, self.reports = Files(database), Reports(database, LEASE)
        for tenant, file_id in (("t", "file-a"), ("t", "file-b"), ("u", "file-c")):
            key = f"tenants/{tenant}/files/{file_id}"
            self.files.announce(key)
            stored = StoredObject(key=key, size=1, sha256="s")
            self.files.add(id=file_id, tenant=tenant, filename="r.jsonl", object=stored, report={})

    def ask(self, id: str, *, tenant: str = "t", file_id: str = "file-a", **spec: Any) -> Report:
        return self.reports.ask(id, tenant, file_id, {**SPEC, **spec})

    def claimed(self) -> Report:
        report = self.reports.claim()
        assert report is not None
        return report

    def age(self, by: timedelta) -> None:
        """Let so much time pass for every report."""
        columns = (table.c.created_at, table.c.claimed_at, table.c.lease_expires_at, table.c.finished_at)
        with self.database.writing() as connection:
            earlier = {column.name: column - by.total_seconds() for column in columns}
            connection.execute(update(table).values(**earlier))

    def ids(self) -> list[str]:
        with self.database.reading() as connection:
            return list(connection.execute(select(table.c.id).order_by(table.c.id)).scalars())


@pytest.fixture
def store(database: Database) -> Store:
    return Store(database)


def test_a_report_is_made_once_for_a_file_and_its_settings(store: Store) -> None:
    first = store.ask("report-1")
    assert (first.id, first.state) == ("report-1", ReportState.QUEUED)
    assert store.ask("report-2").id == "report-1"
    assert store.ask("report-3", max_length=128).id == "report-3"
    claimed = store.claimed()
    assert (claimed.id, claimed.epoch, store.ask("report-4").state) == ("report-1", 1, ReportState.RUNNING)
    store.reports.settle("report-1", 1, {"rows": 2})
    made = store.ask("report-5")
    assert (made.id, made.state, made.report) == ("report-1", ReportState.DONE, {"rows": 2})


def test_asked_for_by_many_at_once_it_is_one_report(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(store.ask, [f"report-{number}" for number in range(8)]))
    assert len({report.id for report in found}) == len(store.ids()) == 1


def test_two_workers_never_make_the_same_report(store: Store) -> None:
    for number in range(4):
        store.ask(f"report-{number}", seed=number)
    with ThreadPoolExecutor(8) as pool:
        claimed = [report for report in pool.map(lambda _: store.reports.claim(), range(8)) if report is not None]
    assert sorted(report.id for report in claimed) == store.ids()


def test_the_tenant_that_was_served_longest_ago_goes_first(store: Store) -> None:
    for number in range(3):
        store.ask(f"report-{number}", seed=number)
    store.ask("report-u", tenant="u", file_id="file-c")
    assert [store.claimed().id for _ in range(4)] == ["report-0", "report-u", "report-1", "report-2"]


def test_a_lost_worker_is_fenced_off_and_a_report_that_kills_them_all_has_failed(store: Store) -> None:
    store.ask("report-1")
    for epoch in range(1, MAX_ATTEMPTS + 1):
        assert store.claimed().epoch == epoch
        assert store.reports.claim() is None
        store.reports.renew("report-1", epoch)
        store.age(LEASE + timedelta(seconds=1))
    assert store.reports.claim() is None
    failed = store.ask("report-2")
    assert (failed.state, failed.error and failed.error["reason"]) == (ReportState.FAILED, "worker_lost")
    for late in (
        lambda: store.reports.renew("report-1", MAX_ATTEMPTS),
        lambda: store.reports.orders("report-1", MAX_ATTEMPTS),
        lambda: store.reports.settle("report-1", MAX_ATTEMPTS, {"rows": 1}),
        lambda: store.reports.fail("report-1", MAX_ATTEMPTS, SERVERS),
    ):
        with pytest.raises(LeaseLost):
            late()


def test_a_worker_that_has_to_leave_costs_no_attempt(store: Store) -> None:
    store.ask("report-1")
    for epoch in range(1, MAX_ATTEMPTS + 3):
        assert store.claimed().epoch == epoch
        store.reports.give_back("report-1", epoch)
    assert store.ask("report-2").state is ReportState.QUEUED


def test_what_failed_by_no_fault_of_its_tenant_is_tried_again_when_asked_later(store: Store) -> None:
    store.ask("report-1")
    store.reports.fail("report-1", store.claimed().epoch, SERVERS)
    assert store.ask("report-2").state is ReportState.FAILED
    store.age(TRIED_AGAIN_AFTER + timedelta(seconds=1))
    again = store.ask("report-3")
    assert (again.id, again.state, again.error) == ("report-3", ReportState.QUEUED, None)
    store.reports.fail("report-3", store.claimed().epoch, USERS)
    store.age(TRIED_AGAIN_AFTER + timedelta(seconds=1))
    refused = store.ask("report-4")
    assert (refused.id, refused.error and refused.error["param"]) == ("report-3", "validation.split")
    store.age(LIFE)
    assert store.ask("report-5").id == "report-5", "by now the base may have another tokenizer"


def test_a_deleted_file_takes_its_reports_along_also_those_that_are_being_made(store: Store) -> None:
    store.ask("report-1")
    store.ask("report-2", validation={"file": "file-b"})
    store.ask("report-3", file_id="file-b")
    assert store.claimed().id == "report-1"
    store.files.delete("t", "file-b")
    assert store.ids() == ["report-1"]
    store.files.delete("t", "file-a")
    with pytest.raises(LeaseLost):
        store.reports.settle("report-1", 1, {"rows": 2})
    assert store.reports.claim() is None


def test_another_tenants_file_is_as_unknown_as_one_that_never_was(store: Store) -> None:
    store.ask("report-1")
    for asked in (
        {"tenant": "u"},
        {"file_id": "file-none"},
        {"validation": {"file": "file-c"}},
        {"validation": {"file": "file-none"}},
    ):
        with pytest.raises(FileNotFound):
            store.ask("report-2", **asked)
    assert store.ids() == ["report-1"]


def test_a_tenant_cannot_fill_the_queue_nor_a_file_the_table(store: Store) -> None:
    for number in range(MOST_WAITING):
        store.ask(f"report-{number}", seed=number)
    with pytest.raises(TooManyReports):
        store.ask("report-more", seed=MOST_WAITING)
    assert store.ask("report-u", tenant="u", file_id="file-c").state is ReportState.QUEUED
    while (report := store.reports.claim()) is not None:
        store.reports.settle(report.id, report.epoch, {})
    for number in range(MOST_WAITING, KEPT_FOR_A_FILE + 5):
        store.ask(f"report-{number}", seed=number)
        report = store.claimed()
        store.reports.settle(report.id, report.epoch, {})
    assert len(store.ids()) == KEPT_FOR_A_FILE + 1


ROWS = [{"prompt": f"What does the {name} say?", "completion": f" {name}"} for name in ("cat", "dog", "hen", "cow")]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
    "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return migrated_database(tmp_path_factory.mktemp("template"))


@pytest.fixture
def api(tmp_path: Path, template: Path) -> Iterator[ApiService]:
    """A service with two registered bases: one with a tokenizer, one without."""
    for name in ("graft/tiny", "graft/mute"):
        folder = tmp_path / "models" / name
        register_base(folder, CONFIG)
    make_tokenizer().save_pretrained(tmp_path / "models" / "graft/tiny")
    service = make_service(tmp_path, template)
    yield service
    service.database.close()


def preparing_worker(api: ApiService, draining: Callable[[], bool] = lambda: False) -> Neighbours:
    """A worker of the stage `prepare` beside the API, over the same database and bucket; its child is the real one."""
    settings = WorkerSettings(
        state_dir=api.settings.state_dir, worker_name="w", worker_device="cpu", orders_seconds=0.1
    )
    device = Device(kind="cpu", index=0, name="CPU", gpu_class="cpu", takes_classes=("cpu",), stage=Stage.PREPARE)
    cache = HostCache(folder=settings.cache_dir, max_bytes=settings.cache_max_bytes)
    return Neighbours(
        settings=settings,
        database=api.database,
        leases=Leases(api.database, settings.lease),
        files=api.files,
        reports=Reports(api.database, settings.lease),
        bucket=api.bucket,
        doorbell=api.doorbell,
        base_models=BaseModels(registered_dir=settings.registered_models_dir, cache=cache, hub_token=None),
        device=device,
        spare=SpareTrainer(wanted=False, device=device, home=settings.spare_dir, cache_dir=settings.cache_dir),
        capacity=load_capacity(None),
        place="here",
        open_dataset_bucket=lambda _: api.bucket,
        draining=draining,
    )


def ask(api: ApiService, file_id: str, **query: Any) -> Any:
    return api.http.get(f"/files/{file_id}/report", params={"base_model": "graft/tiny", "max_length": 64, **query})


def test_a_report_can_be_had_before_any_job_and_a_job_gives_the_same(api: ApiService) -> None:
    file_id = api.upload(JSONL).json()["id"]
    waiting = ask(api, file_id, validation_split=0.5)
    assert (waiting.status_code, waiting.headers["retry-after"]) == (202, "1")
    assert (waiting.json()["status"], waiting.json()["report"]) == ("queued", None)
    wait_until(lambda: api.doorbell.rung == [(waiting.json()["id"], "prepare")], what="the bell")
    look_for_work(preparing_worker(api))
    ready = ask(api, file_id, validation_split=0.5)
    body = ready.json()
    assert (ready.status_code, body["status"], body["id"]) == (200, "ready", waiting.json()["id"])
    report = body["report"]
    assert (report["kind"], report["rows"], report["train"]["rows"]) == ("prompt_completion", 4, 2)
    assert [(span["text"], span["trained"]) for span in report["first_rows"][0]["spans"]] == [
        ("What does the cat say?", False),
        (" cat", True),
        ("</s>", True),
    ]
    job = api.post(
        {
            "base_model": "graft/tiny",
            "dataset": {"file": file_id},
            "validation": {"split": 0.5},
            "training": {"max_length": 64},
        }
    ).json()
    assert error_of(api.http.get(f"/jobs/{job['id']}/report"), 409)["code"] == "report_not_ready"
    look_for_work(preparing_worker(api))
    of_job = api.http.get(f"/jobs/{job['id']}/report").json()["report"]
    assert of_job == {**report, "source": {"file": file_id}}
    events = api.http.get(f"/jobs/{job['id']}/events").json()["data"]
    (prepared,) = [event["data"] for event in events if event["type"] == "prepared"]
    assert prepared["train"] == report["train"] and "first_rows" not in prepared


def test_a_report_holds_against_a_validation_file(api: ApiService) -> None:
    train, held_out = api.upload(JSONL).json()["id"], api.upload(JSONL.splitlines(keepends=True)[0]).json()["id"]
    ask(api, train, validation_file=held_out)
    look_for_work(preparing_worker(api))
    report = ask(api, train, validation_file=held_out).json()["report"]
    assert report["validation"]["overlap_rows"] == report["validation"]["rows"] == 1


@pytest.mark.parametrize(
    ("query", "code", "param"),
    [
        ({"base_model": "graft/mute"}, "unsupported_base_model", "base_model"),
        ({"completion_only_loss": "true"}, "invalid_parameter", "training.completion_only_loss"),
        ({"validation_split": 0.5}, "invalid_parameter", "validation.split"),
    ],
)
def test_what_a_job_would_fail_of_is_the_reports_refusal(
    api: ApiService, query: dict[str, Any], code: str, param: str
) -> None:
    file_id = api.upload(b'{"text": "one row"}\n').json()["id"]
    assert ask(api, file_id, **query).status_code == 202
    look_for_work(preparing_worker(api))
    error = error_of(ask(api, file_id, **query), 422)
    assert (error["code"], error["param"]) == (code, param)


@pytest.mark.parametrize(
    ("query", "status", "code", "param"),
    [
        ({"base_model": "graft/none"}, 422, "unknown_base_model", "base_model"),
        ({"base_model": "../../etc"}, 422, "invalid_parameter", "base_model"),
        ({"max_length": 513}, 422, "invalid_parameter", "max_length"),
        ({"max_length": 7}, 422, "invalid_parameter", "max_length"),
        ({"validation_split": 1}, 422, "invalid_parameter", "validation_split"),
        ({"validation_split": 0.1, "validation_file": "file-a"}, 422, "invalid_parameter", "validation_split"),
        ({"validation_file": "file-none"}, 404, "file_not_found", None),
        ({"max_lenght": 8}, 400, "unknown_parameter", "max_lenght"),
    ],
)
def test_what_cannot_be_asked_is_refused_at_once(
    api: ApiService, query: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    error = error_of(ask(api, api.upload(JSONL).json()["id"], **query), status)
    assert (error["code"], error["param"]) == (code, param)
    assert error_of(api.http.get("/files/file-none/report"), 422)["param"] == "base_model"
    assert error_of(ask(api, "file-none"), 404)["code"] == "file_not_found"


def test_the_longest_length_is_the_bases_where_nobody_chose_one(api: ApiService) -> None:
    file_id = api.upload(JSONL).json()["id"]
    body = api.http.get(f"/files/{file_id}/report", params={"base_model": "graft/tiny"}).json()
    assert body["settings"]["max_length"] == 512


def test_a_report_that_no_worker_could_make_is_no_users_fault(api: ApiService, monkeypatch: pytest.MonkeyPatch) -> None:
    file_id = api.upload(JSONL).json()["id"]
    ask(api, file_id)

    def away(*_: Any) -> Any:
        raise BucketUnavailable(reason="no route")

    worker = preparing_worker(api)
    monkeypatch.setattr("graft_worker.supervisor.report_run.FETCH_PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(api.bucket, "open", away)
    look_for_work(worker)
    answer = ask(api, file_id)
    error = error_of(answer, 503)
    assert (error["code"], answer.headers["retry-after"]) == ("report_unavailable", "5")


def test_a_file_that_is_deleted_while_its_report_is_made_leaves_nothing(api: ApiService) -> None:
    file_id = api.upload(b'{"text": "cat dog"}\n' * 200_000).json()["id"]
    ask(api, file_id)
    worker = preparing_worker(api)
    at_work = threading.Thread(target=look_for_work, args=[worker])
    at_work.start()
    wait_until(lambda: ask(api, file_id).json()["status"] == "running", what="the report's run")
    assert api.http.delete(f"/files/{file_id}").status_code == 200
    at_work.join(timeout=60)
    assert not at_work.is_alive()
    assert error_of(ask(api, file_id), 404)["code"] == "file_not_found"
    assert [path for path in worker.settings.work_dir.rglob("*") if path.is_file()] == []


def test_a_worker_that_is_told_to_leave_gives_its_report_back(api: ApiService) -> None:
    file_id = api.upload(b'{"text": "cat dog"}\n' * 200_000).json()["id"]
    ask(api, file_id)
    drain = threading.Event()
    at_work = threading.Thread(target=look_for_work, args=[preparing_worker(api, drain.is_set)])
    at_work.start()
    wait_until(lambda: ask(api, file_id).json()["status"] == "running", what="the report's run")
    drain.set()
    at_work.join(timeout=60)
    assert not at_work.is_alive()
    assert ask(api, file_id).json()["status"] == "queued"


class InProcess(httpx.BaseTransport):
    """The SDK's way to an app that is not served."""

    def __init__(self, api: ApiService) -> None:
        self._api = api

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        headers = dict(request.headers)
        answer = self._api.http.request(request.method, str(request.url), content=request.read(), headers=headers)
        return httpx.Response(answer.status_code, headers=dict(answer.headers), content=answer.content)


def test_the_sdk_sends_a_file_to_the_bucket_and_waits_for_its_report(api: ApiService, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(JSONL)
    worker = preparing_worker(api)
    transport = Transport(
        str(api.http.base_url),
        api_key=None,
        timeout=30,
        patience_seconds=0,
        transport=InProcess(api),
        sleep=lambda _: look_for_work(worker),
    )
    with GraftClient(transport=transport) as client:
        file = client.upload_directly(path)
        assert file["report"] == {"rows": 4, "kind": "prompt_completion", "bytes": len(JSONL)}
        report = client.report(file["id"], base_model="graft/tiny", max_length=64, validation_split=0.5)
        assert (report["status"], report["report"]["train"]["rows"]) == ("ready", 2)

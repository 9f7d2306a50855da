"""What the SDK promises over a bad connection, and what it never lets through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from graft_client import (
    DownloadCorrupt,
    GraftAPIError,
    GraftClient,
    Job,
    ServiceUnreachable,
    TargetNotEmpty,
    WaitedTooLong,
)
from graft_client.errors import NotJson
from graft_client.transport import Transport
from tests.fakes.service import ADAPTER, FakeService, error

SPEC = {"base_model": "a/b", "dataset": {"file": "file-1"}}


class Time:
    """A clock that only waiting moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def client(service: FakeService, time: Time) -> GraftClient:
    return a_client(service, time)


def a_client(
    service: FakeService, time: Time, patience_seconds: float = 30.0, api_key: str = "graft_secret"
) -> GraftClient:
    return GraftClient(
        transport=Transport(
            "http://graft.test/",
            api_key=api_key,
            timeout=5,
            patience_seconds=patience_seconds,
            transport=httpx.MockTransport(service),
            sleep=time.sleep,
            clock=lambda: time.now,
        )
    )


def test_a_submit_whose_answer_was_lost_makes_one_job(client: GraftClient, service: FakeService) -> None:
    service.answers["POST /jobs"] = [httpx.ReadError("reset"), httpx.ConnectError("refused")]
    assert client.submit(SPEC)["id"] == "ftjob-1"
    requests = service.heard("POST", "/jobs")
    assert len(requests) == 3
    assert len({request.headers["idempotency-key"] for request in requests}) == 1
    assert json.loads(requests[-1].content) == SPEC


def test_two_submits_are_two_jobs_unless_the_caller_says_otherwise(client: GraftClient) -> None:
    assert client.submit(SPEC)["id"] != client.submit(SPEC)["id"]
    assert client.submit(SPEC, idempotency_key="k")["id"] == client.submit(SPEC, idempotency_key="k")["id"]


def test_a_busy_service_says_when_to_come_back(client: GraftClient, service: FakeService, time: Time) -> None:
    busy = error(503, "store_unavailable", "away", {"retry-after": "7"})
    service.answers["POST /jobs"] = [busy, error(429, "quota_exceeded", "slow down", {"retry-after": "3"})]
    client.submit(SPEC)
    assert time.pauses == [7.0, 3.0]


def test_patience_ends(client: GraftClient, service: FakeService, time: Time) -> None:
    service.answers["POST /jobs"] = [error(503, "store_unavailable", "away", {"retry-after": "31"})]
    with pytest.raises(GraftAPIError, match="away"):
        client.submit(SPEC)
    assert time.pauses == []
    service.answers["GET /capacity"] = [httpx.ConnectError("refused")] * 100
    with pytest.raises(ServiceUnreachable, match=r"http://graft.test \(refused\).*graft up"):
        client.capacity()
    assert 20 < time.now <= 30


def test_a_cancel_that_may_have_arrived_is_not_sent_again(client: GraftClient, service: FakeService) -> None:
    service.answers["POST /jobs/ftjob-1/cancel"] = [httpx.ReadError("reset")]
    with pytest.raises(ServiceUnreachable):
        client.cancel("ftjob-1")
    assert len(service.requests) == 1


@pytest.mark.parametrize("status", [502, 504])
def test_after_a_proxys_word_only_what_is_done_once_is_sent_again(
    client: GraftClient, service: FakeService, tmp_path: Path, status: int
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    for route in ("POST /jobs", "GET /jobs/ftjob-1/logs", "POST /files", "DELETE /files/file-1"):
        service.answers[route] = [httpx.Response(status), httpx.Response(200, json={"id": "ftjob-1"})]
    client.submit(SPEC)
    client.logs("ftjob-1")
    for call in (lambda: client.upload(rows), lambda: client.delete_file("file-1")):
        with pytest.raises(GraftAPIError, match=str(status)):
            call()
    heard = [request.method + request.url.path for request in service.requests]
    assert [heard.count(route) for route in ("POST/jobs", "GET/jobs/ftjob-1/logs")] == [2, 2]
    assert [heard.count(route) for route in ("POST/files", "DELETE/files/file-1")] == [1, 1]


def test_an_answer_that_forbids_another_try_gets_none(client: GraftClient, service: FakeService, time: Time) -> None:
    finished = error(409, "job_finished", "over", {"x-should-retry": "false", "retry-after": "1"})
    service.answers["POST /jobs/ftjob-1/cancel"] = [finished]
    with pytest.raises(GraftAPIError) as caught:
        client.cancel("ftjob-1")
    assert (caught.value.status, caught.value.code, time.pauses) == (409, "job_finished", [])


def test_a_refusal_keeps_its_numbers(client: GraftClient, service: FakeService) -> None:
    refusal = error(422, "vram_capacity_exceeded", "too big", needed_bytes=10, facts={"available_bytes": 5})
    service.answers["POST /jobs"] = [refusal]
    with pytest.raises(GraftAPIError, match="too big") as caught:
        client.submit(SPEC)
    assert caught.value.facts == {"needed_bytes": 10, "available_bytes": 5}
    assert caught.value.request_id == "req-1"
    assert caught.value.is_users


def test_a_proxys_html_is_still_an_error_with_a_code(client: GraftClient, service: FakeService) -> None:
    service.answers["GET /models"] = [httpx.Response(500, content=b"<html>")]
    with pytest.raises(GraftAPIError) as caught:
        client.models()
    assert caught.value.code == "http_500"
    assert not caught.value.is_users


def test_a_list_goes_through_every_page_only_as_far_as_it_is_read(client: GraftClient, service: FakeService) -> None:
    service.jobs = [{"id": f"ftjob-{n}", "status": "queued"} for n in range(7)]
    jobs = client.list(status="queued", metadata={"team": "search"}, page_size=3)
    assert next(jobs)["id"] == "ftjob-0"
    assert len(service.requests) == 1
    assert len(list(jobs)) == 6
    assert [request.url.params.get("after") for request in service.requests] == [None, "ftjob-2", "ftjob-5"]
    assert {request.url.params["metadata[team]"] for request in service.requests} == {"search"}


def test_what_a_user_typed_stays_inside_its_part_of_the_path(client: GraftClient, service: FakeService) -> None:
    with pytest.raises(GraftAPIError):
        client.get("../models?x=1")
    assert service.requests[0].url.raw_path == b"/jobs/..%2Fmodels%3Fx%3D1"


def test_what_is_blank_around_a_key_is_not_sent(service: FakeService, time: Time) -> None:
    client = a_client(service, time, api_key=" graft_secret\r\n")
    client.submit(SPEC)
    assert service.requests[0].headers["authorization"] == "Bearer graft_secret"


def test_an_upload_is_sent_whole_again_after_a_refused_connection(
    client: GraftClient, service: FakeService, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b'{"text": "x"}\n' * 1000)
    service.answers["POST /files"] = [httpx.ConnectError("refused"), httpx.Response(200, json={"id": "file-1"})]
    assert client.upload(rows) == {"id": "file-1"}
    for request in service.heard("POST", "/files"):
        assert request.content.count(rows.read_bytes()) == 1
        assert b'name="file"; filename="rows.jsonl"' in request.content


def test_a_download_is_the_manifests_bytes_and_links_never_see_the_key(
    client: GraftClient, service: FakeService, tmp_path: Path
) -> None:
    folder = client.download("ftjob-1", tmp_path / "deep" / "adapter")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in ADAPTER} == ADAPTER
    assert "url" not in json.loads((folder / "manifest.json").read_text())["files"][0]
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
    for request in service.requests:
        assert ("authorization" in request.headers) == (request.url.host == "graft.test")


def test_an_expired_link_is_replaced_by_a_fresh_one(client: GraftClient, service: FakeService, tmp_path: Path) -> None:
    service.answers["GET /1/adapter_config.json"] = [httpx.Response(403)]
    client.download("ftjob-1", tmp_path / "adapter")
    assert len(service.heard("GET", "/jobs/ftjob-1/adapter")) >= 2
    assert not service.heard("GET", "/jobs/ftjob-1/adapter/archive")


def test_links_that_lead_nowhere_from_here_are_replaced_by_the_archive(
    client: GraftClient, service: FakeService, tmp_path: Path
) -> None:
    for generation in range(1, 4):
        service.answers[f"GET /{generation}/adapter_config.json"] = [httpx.ConnectError("no route")]
    folder = client.download("ftjob-1", tmp_path / "adapter")
    assert sorted(path.name for path in folder.iterdir()) == [*sorted(ADAPTER), "manifest.json"]
    assert (folder / "adapter_model.safetensors").read_bytes() == ADAPTER["adapter_model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("wrong", [b"weights", b"weightz" * 1000, b"weights" * 2000])
def test_wrong_bytes_leave_no_folder_behind(
    client: GraftClient, service: FakeService, tmp_path: Path, wrong: bytes
) -> None:
    service.files["adapter_model.safetensors"] = wrong
    with pytest.raises(DownloadCorrupt, match=r"adapter_model.safetensors: .* the manifest promises"):
        client.download("ftjob-1", tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_cannot_write_outside_its_folder(client: GraftClient, service: FakeService, tmp_path: Path) -> None:
    evil = {"files": [{"name": "../evil", "size": 0, "sha256": "", "url": "http://store.test/1/evil"}]}
    service.answers["GET /jobs/ftjob-1/adapter"] = [httpx.Response(200, json=evil)]
    with pytest.raises(DownloadCorrupt, match="outside"):
        client.download("ftjob-1", tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_download_writes_over_nothing(client: GraftClient, service: FakeService, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(TargetNotEmpty):
        client.download("ftjob-1", tmp_path)
    assert service.requests == []


def test_updates_bring_every_event_once_and_end_with_the_job(client: GraftClient, service: FakeService) -> None:
    seen: list[Any] = []
    service.jobs = [{"id": "ftjob-1", "status": "running"}]
    service.events = [{"id": 1, "message": "claimed"}, {"id": 2, "message": "loading"}]
    for update in client.updates("ftjob-1"):
        seen += [event["id"] for event in update.events]
        service.events.append({"id": len(service.events) + 1, "message": "more"})
        if len(service.events) == 5:
            service.jobs[0]["status"] = "succeeded"
    assert seen == [1, 2, 3, 4, 5]
    assert update.is_last


def test_a_watcher_outlives_a_restart_of_the_service(service: FakeService, time: Time) -> None:
    service.jobs = [{"id": "ftjob-1", "status": "running"}]
    updates = a_client(service, time, patience_seconds=1).updates("ftjob-1")
    next(updates)
    service.answers["GET /jobs/ftjob-1"] = [httpx.ConnectError("refused")] * 8
    service.jobs[0]["status"] = "failed"
    assert next(updates).is_last


@pytest.mark.parametrize("route", ["events", "logs"])
def test_who_follows_a_log_outlives_a_restart_between_two_requests(
    service: FakeService, time: Time, route: str
) -> None:
    service.jobs = [{"id": "ftjob-1", "status": "succeeded"}]
    service.answers["GET /jobs/ftjob-1/logs"] = [httpx.Response(200, text="step 1\n")]
    refused = [httpx.ConnectError("refused")] * 8
    service.answers[f"GET /jobs/ftjob-1/{route}"] = [*refused, *service.answers.get(f"GET /jobs/ftjob-1/{route}", [])]
    assert list(a_client(service, time, patience_seconds=1).follow_logs("ftjob-1")) == ["step 1\n"]


def test_waiting_ends_with_the_job_or_with_patience(client: GraftClient, service: FakeService) -> None:
    service.jobs = [{"id": "ftjob-1", "status": "queued"}]
    with pytest.raises(WaitedTooLong, match="still 'queued' after 5 s"):
        client.wait("ftjob-1", timeout_seconds=5)
    service.jobs[0]["status"] = "cancelled"
    assert client.wait("ftjob-1")["status"] == "cancelled"


@pytest.mark.parametrize("method", ["submit", "estimate"])
def test_a_number_that_json_does_not_have_is_refused_before_anything_is_sent(method: str) -> None:
    with GraftClient("http://127.0.0.1:1") as client, pytest.raises(NotJson, match="NaN or Infinity"):
        getattr(client, method)({"training": {"learning_rate": float("nan")}})


def test_a_job_in_ones_hand_is_its_document_and_can_be_waited_for(client: GraftClient, service: FakeService) -> None:
    service.jobs = [{"id": "ftjob-1", "status": "running"}]
    job = client.submit(SPEC)
    assert job == {"id": "ftjob-1", "status": "queued"} and json.loads(json.dumps(job)) == job
    assert (job.id, job.status, job.has_ended) == ("ftjob-1", "queued", False)
    assert job.refresh().status == "running"
    with pytest.raises(WaitedTooLong):
        job.wait(timeout_seconds=3)
    service.events = [
        {"id": 1, "type": "claimed", "data": {}},
        {"id": 2, "type": "metrics", "data": {"step": 1, "loss": 2.0}},
    ]
    service.jobs[0]["status"] = "succeeded"
    assert list(job.measures()) == [{"step": 1, "loss": 2.0}]
    assert [event["type"] for event in job.events()] == ["claimed", "metrics"]
    assert [update.is_last for update in job.updates()] == [True]
    assert job.wait().has_ended and [type(listed) for listed in client.list()] == [Job]

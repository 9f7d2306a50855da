"""The API as a process: live streams, broken answers, signals; and the same on PostgreSQL, Redis and S3."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from graft_shared.artifacts import adapter_prefix
from graft_shared.store import Keys, open_database
from graft_shared.store.migrate import migrate
from tests.api_process import ApiProcess
from tests.api_service import ADAPTER, LLAMA, ROWS, ApiService, error_of
from tests.servers import SWIFT_KEY, SWIFT_USER, RedisServer, SwiftServer
from tests.waiting import wait_until


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., ApiProcess]]:
    """Starts processes that a failed test does not leave behind."""
    started: list[ApiProcess] = []

    def start(**environment: str) -> ApiProcess:
        started.append(ApiProcess(tmp_path, **environment))
        return started[-1].start()

    yield start
    for process in started:
        process.child.kill()
        process.child.wait()


@pytest.fixture
def process(start: Callable[..., ApiProcess]) -> ApiProcess:
    return start()


@pytest.fixture
def api(process: ApiProcess) -> Iterator[ApiService]:
    service = process.service()
    migrate(service.database)
    yield service
    service.database.close()
    service.http.close()


def test_readiness_follows_the_migration(process: ApiProcess) -> None:
    api = process.service()
    before = api.http.get("/readyz")
    assert (before.status_code, before.json()["status"]) == (503, "unavailable")
    migrate(api.database)
    after = api.http.get("/readyz").json()
    assert (after["status"], after["checks"]["broker"]["ok"]) == ("degraded", False), "no broker runs here"
    api.database.close()


PEPPER = "p" * 24


def key_of(process: ApiProcess, tenant: str, *arguments: str) -> str:
    """A key that the operator makes beside the process."""
    command = [sys.executable, "-m", "graft_api.keys", "create", tenant, *arguments]
    made = subprocess.run(command, env={**os.environ, **process.own}, capture_output=True, text=True, check=True)
    return made.stdout.strip()


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_two_apis_know_the_same_keys_and_hold_the_same_quotas(
    request: pytest.FixtureRequest, start: Callable[..., ApiProcess], monkeypatch: pytest.MonkeyPatch, database: str
) -> None:
    url = request.getfixturevalue(f"{database}_url")
    opened = open_database(url)
    migrate(opened)
    quotas = {"GRAFT_QUOTA_QUEUED_JOBS": "5", "GRAFT_QUOTA_STORED_BYTES": "100"}
    apis = [start(GRAFT_DATABASE_URL=url, GRAFT_KEY_PEPPER=PEPPER, **quotas) for _ in range(2)]
    keys = {tenant: key_of(apis[0], tenant) for tenant in ("red", "blue")}
    http = [httpx.Client(base_url=f"http://127.0.0.1:{api.port}", timeout=60) for api in apis]
    bearer = {tenant: {"authorization": f"Bearer {key}"} for tenant, key in keys.items()}

    def upload(number: int) -> int:
        rows = {"file": ("rows.jsonl", ROWS)}
        return http[number % 2].post("/files", files=rows, headers=bearer["red"]).status_code

    def submit(number: int) -> int:
        return http[number % 2].post("/jobs", json=spec, headers=bearer["red"]).status_code

    with ThreadPoolExecutor(16) as pool:
        assert Counter(pool.map(upload, range(8))) == {201: 3, 429: 5}, "32 bytes each, 100 in all"
        file_id = http[1].get("/files", headers=bearer["red"]).json()["data"][0]["id"]
        spec = {"base_model": LLAMA, "dataset": {"file": file_id}}
        assert Counter(pool.map(submit, range(16))) == {202: 5, 429: 11}
    events = f"/jobs/{http[0].get('/jobs', headers=bearer['red']).json()['data'][0]['id']}/events"
    with http[0].stream("GET", events, headers={"accept": "text/event-stream", **bearer["red"]}) as live:
        Keys(opened).revoke(keys["red"].split("_")[1])
        revoked_at = time.monotonic()
        for each in http:
            wait_until(
                lambda each=each: each.get("/jobs", headers=bearer["red"]).status_code == 401, every=0.05, what="401"
            )
        assert time.monotonic() < revoked_at + 4
        assert [line for line in live.iter_lines() if line.startswith("event: ")] == ["event: submitted"], "it ends too"
    assert [each.get("/jobs", headers=bearer["blue"]).status_code for each in http] == [200, 200]
    for each in http:
        each.close()
    opened.close()
    log = apis[0].log_path.read_text()
    assert not any(key in log for key in keys.values())


def test_a_live_stream_shows_events_as_they_come_and_ends_with_the_job(api: ApiService) -> None:
    job_id = api.new_job()["id"]
    seen: list[str] = []
    opened = threading.Event()

    def listen() -> None:
        headers = {"accept": "text/event-stream"}
        with api.http.stream("GET", f"/jobs/{job_id}/events", headers=headers) as answer:
            for line in answer.iter_lines():
                opened.set()
                if line.startswith("event: "):
                    seen.append(line.removeprefix("event: "))

    listener = threading.Thread(target=listen)
    listener.start()
    assert opened.wait(30)
    wait_until(lambda: seen == ["submitted"], what="the first event", every=0.05)
    api.train(job_id)
    wait_until(lambda: seen.count("metrics") == 3, what="the steps", every=0.05)
    api.http.post(f"/jobs/{job_id}/cancel")
    running = api.jobs.get("default", job_id)
    api.leases.settle_cancelled(job_id, running.epoch)
    listener.join(timeout=30)
    assert not listener.is_alive(), "the stream ends by itself"
    assert seen[-2:] == ["cancel_requested", "cancelled"]


def test_an_open_stream_does_not_hold_up_the_end(process: ApiProcess, api: ApiService) -> None:
    job_id = api.new_job()["id"]
    with api.http.stream("GET", f"/jobs/{job_id}/events", headers={"accept": "text/event-stream"}) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("retry: ")
        assert process.stop() in (0, -signal.SIGTERM)
    log = process.log_path.read_text()
    assert "Traceback" not in log and "exceeded" not in log, "a stream that is open at the end is no error"


def test_an_archive_of_changed_bytes_reaches_nobody_whole(api: ApiService) -> None:
    job_id = api.new_job()["id"]
    job = api.succeed(job_id)
    whole = api.http.get(f"/jobs/{job_id}/adapter/archive")
    assert whole.status_code == 200
    changed = bytes(len(ADAPTER["adapter_model.safetensors"]))
    api.bucket.put_bytes(adapter_prefix("default", job_id, job.epoch) + "adapter_model.safetensors", changed)
    with pytest.raises(httpx.TransportError):
        api.http.get(f"/jobs/{job_id}/adapter/archive")
    assert api.http.get("/healthz").status_code == 200


def test_one_key_posted_many_times_at_once_makes_one_job(api: ApiService) -> None:
    spec = api.spec()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: api.post(spec, **{"idempotency-key": "k"}), range(16)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(api.http.get("/jobs").json()["data"]) == 1


def test_a_large_upload_is_refused_while_it_arrives(start: Callable[..., ApiProcess]) -> None:
    process = start(GRAFT_MAX_FILE_BYTES="100000")
    api = process.service()
    migrate(api.database)
    head = b"POST /files HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n"
    head += b"content-type: multipart/form-data; boundary=b\r\n\r\n"
    part = b'--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n' + b"x" * 200_000
    with socket.create_connection(("127.0.0.1", process.port), timeout=30) as connection:
        connection.sendall(head + f"{len(part):x}\r\n".encode() + part + b"\r\n")
        answer = connection.recv(65_536)
    assert answer.startswith(b"HTTP/1.1 413 "), "it is answered before its end"
    api.database.close()
    assert process.stop() in (0, -signal.SIGTERM)


def test_no_line_of_the_log_holds_a_signature(process: ApiProcess, api: ApiService) -> None:
    job_id = api.new_job()["id"]
    api.succeed(job_id)
    (link, *_) = [file["url"] for file in api.http.get(f"/jobs/{job_id}/adapter").json()["files"]]
    assert api.http.get(link).status_code == 200
    wait_until(lambda: "/objects/" in process.log_path.read_text(), what="the log line", every=0.05)
    log = process.log_path.read_text()
    assert link.split("signature=")[1] not in log
    lines = [json.loads(line) for line in log.splitlines() if '"request_answered"' in line]
    assert any(line["path"] == "/jobs" and line["status"] == 202 and line["request_id"] for line in lines)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_the_process_refuses_to_be_reached_by_strangers(host: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "graft_api", "--host", host], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert "it has no key" in done.stderr and "Traceback" not in done.stderr


def test_the_process_refuses_keys_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_API_KEYS", " , ")
    done = subprocess.run(
        [sys.executable, "-m", "graft_api", "--host", "0.0.0.0"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert "GRAFT_API_KEYS: it is set and holds no key" in done.stderr and "Traceback" not in done.stderr


def test_the_same_service_runs_on_postgres_redis_and_s3(
    start: Callable[..., ApiProcess],
    postgres_url: str,
    redis_server: RedisServer,
    swift: SwiftServer,
) -> None:
    environment = {
        "GRAFT_DATABASE_URL": postgres_url,
        "GRAFT_BROKER_URL": redis_server.url,
        "GRAFT_S3_BUCKET": "graft-api",
        "GRAFT_S3_ENDPOINT_URL": swift.endpoint_url,
        "GRAFT_S3_ACCESS_KEY_ID": SWIFT_USER,
        "GRAFT_S3_SECRET_ACCESS_KEY": SWIFT_KEY,
    }
    process = start(**environment)
    api = process.service()
    _before_the_migration(api)
    migrate(api.database)
    assert api.http.get("/readyz").json()["status"] == "ready"
    _one_job_whole(api, redis_server.url)
    api.database.close()
    assert process.stop() in (0, -signal.SIGTERM)


def _before_the_migration(api: ApiService) -> None:
    answer = api.http.get("/readyz")
    assert answer.status_code == 503
    assert "does not exist" in answer.json()["checks"]["database"]["reason"]


def _one_job_whole(api: ApiService, broker_url: str) -> None:
    api.idle_workers(count=1)
    job = api.new_job(metadata={"team": "search"})
    with redis.Redis.from_url(broker_url) as broker:
        wait_until(lambda: broker.llen("prepare") == 1, what="the bell, in Celery's list of that queue")
    found: dict[str, Any] = api.http.get("/jobs", params={"metadata[team]": "search"}).json()
    assert [listed["id"] for listed in found["data"]] == [job["id"]]
    assert api.http.get("/jobs", params={"metadata[team]": "\u00fc"}).json()["data"] == []
    api.succeed(job["id"])
    files = api.http.get(f"/jobs/{job['id']}/adapter").json()["files"]
    assert {file["name"]: httpx.get(file["url"]).content for file in files} == ADAPTER
    assert api.http.get("/objects/any?expires=1&signature=" + "0" * 64).status_code == 404
    content = api.http.get(f"/files/{job['spec']['dataset']['file']}/content")
    assert content.status_code == 200


def test_postgres_is_spared_what_it_cannot_hold(start: Callable[..., ApiProcess], postgres_url: str) -> None:
    process = start(GRAFT_DATABASE_URL=postgres_url)
    api = process.service()
    migrate(api.database)
    assert api.http.get("/jobs/ftjob-%00").status_code == 404
    assert api.http.get("/files/%00").status_code == 404
    assert error_of(api.http.get("/jobs?after=%00"), 400)["param"] == "after"
    api.database.close()
    assert process.stop() in (0, -signal.SIGTERM)

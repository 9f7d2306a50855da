"""Files, events, adapters, capacity, health and the frame of every exchange; the real app in-process."""

from __future__ import annotations

import io
import json
import re
import tarfile
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from graft_api.__main__ import Exposed, check_exposure
from graft_api.jobs import service as jobs_service
from graft_api.settings import ApiSettings
from graft_shared.artifacts import adapter_prefix, log_key
from graft_shared.errors import BucketUnavailable
from graft_shared.store import open_database
from tests.api_service import ADAPTER, LLAMA, ROWS, ApiService, error_of, make_service
from tests.store_factories import a_beat


@pytest.fixture
def api(tmp_path: Path, template: Path) -> Iterator[ApiService]:
    service = make_service(tmp_path, template, max_file_bytes=200_000)
    yield service
    service.database.close()


def test_an_uploaded_file_is_checked_stored_and_given_back(api: ApiService) -> None:
    answer = api.http.post("/files", files={"file": ("C:\\data\\rows.jsonl", ROWS)}, data={"purpose": "fine-tune"})
    assert answer.status_code == 201
    file = answer.json()
    assert (file["object"], file["filename"], file["bytes"]) == ("file", "rows.jsonl", len(ROWS))
    assert file["report"] == {"rows": 2, "kind": "text", "bytes": len(ROWS)}
    assert api.http.get(f"/files/{file['id']}").json() == file
    content = api.http.get(f"/files/{file['id']}/content")
    assert (content.content, content.headers["content-length"]) == (ROWS, str(len(ROWS)))
    assert list(api.settings.upload_dir.iterdir()) == []


def test_files_are_listed_page_by_page(api: ApiService) -> None:
    ids = [api.upload(name=f"{number}.jsonl").json()["id"] for number in range(3)]
    page = api.http.get("/files", params={"limit": 2}).json()
    rest = api.http.get("/files", params={"limit": 2, "after": page["last_id"]}).json()
    assert (page["has_more"], rest["has_more"]) == (True, False)
    assert sorted(file["id"] for file in page["data"] + rest["data"]) == sorted(ids)


@pytest.mark.parametrize(
    ("content", "line", "word"),
    [
        (b"", 1, "no rows"),
        (b"\n\n", 1, "no rows"),
        (b'{"text": "a"}\n{"text": \n', 2, "not valid JSON"),
        (b'{"text": "a"}\n{"text": NaN}\n', 2, "NaN"),
        (b'{"text": "a"}\n{"prompt": "a", "completion": "b"}\n', 2, "kind"),
        (b'{"text": "\xff"}\n', 1, "UTF-8"),
        (b'{"question": "a"}\n', 1, "question"),
    ],
)
def test_a_file_that_cannot_be_trained_on_is_refused_with_its_line(
    api: ApiService, content: bytes, line: int, word: str
) -> None:
    error = error_of(api.upload(content), 422)
    assert (error["code"], error["line"]) == ("invalid_training_file", line)
    assert word in error["message"]
    assert api.http.get("/files").json()["data"] == []
    assert list(api.bucket.list("")) == []


@pytest.mark.parametrize("declares_its_length", [True, False])
def test_a_file_over_the_limit_is_refused(api: ApiService, declares_its_length: bool) -> None:
    part = b'--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n'
    body = part + b"x" * 300_000 + b"\r\n--b--\r\n"
    content: Any = body if declares_its_length else iter([body[:100_000], body[100_000:]])
    answer = api.http.post("/files", content=content, headers={"content-type": "multipart/form-data; boundary=b"})
    error = error_of(answer, 413)
    assert (error["code"], error["limit_bytes"]) == ("file_too_large", 200_000)


def test_a_file_just_over_the_limit_is_refused_and_one_just_under_it_taken(api: ApiService) -> None:
    row = b'{"text": "' + b"x" * 100 + b'"}\n'
    many = 200_000 // len(row)
    assert api.upload(row * many).status_code == 201
    assert error_of(api.upload(row * (many + 1)), 413)["code"] == "file_too_large"


def test_a_line_without_an_end_is_not_held_whole(tmp_path: Path, template: Path) -> None:
    api = make_service(tmp_path, template)
    error = error_of(api.upload(b'{"text": "' + b"x" * (11 * 1024 * 1024) + b'"}'), 422)
    assert (error["line"], "more than 10485760 bytes" in error["message"]) == (1, True)
    api.database.close()


def test_a_form_that_is_not_ours_is_refused(api: ApiService) -> None:
    post = api.http.post
    assert error_of(post("/files", json={}), 415)["code"] == "unsupported_media_type"
    assert error_of(post("/files", files={"upload": ROWS}), 400)["param"] == "upload"
    assert error_of(post("/files", files={"file": ROWS}, data={"purpose": "batch"}), 422)["param"] == "purpose"
    missing = error_of(post("/files", files={"purpose": (None, b"fine-tune")}), 422)
    assert (missing["code"], missing["param"]) == ("invalid_parameter", "file")
    form = {"content-type": "multipart/form-data; boundary=b"}
    broken = b'--b\r\ncontent-disposition: form-data; name="file"\r\n\r\n{}'
    assert error_of(post("/files", content=broken, headers=form), 400)["code"] == "malformed_body"
    assert error_of(post("/files", content=b"rubbish", headers=form), 400)["code"] == "malformed_body"


def test_an_unknown_file_is_not_found(api: ApiService) -> None:
    for route in ("/files/file-nope", "/files/file-nope/content"):
        assert error_of(api.http.get(route), 404)["code"] == "file_not_found"


def test_events_are_paged_in_order(api: ApiService) -> None:
    job_id = api.new_job()["id"]
    api.train(job_id)
    seen: list[dict[str, Any]] = []
    page: dict[str, Any] = {"has_more": True, "last_id": 0}
    while page["has_more"]:
        page = api.http.get(f"/jobs/{job_id}/events", params={"after": page["last_id"], "limit": 2}).json()
        seen += page["data"]
    assert [event["id"] for event in seen] == list(range(1, len(seen) + 1))
    assert [event["type"] for event in seen] == ["submitted", "claimed", "prepared", "claimed", *["metrics"] * 3]
    assert seen[0]["created_at"] > 1_600_000_000


def test_a_stream_replays_from_the_last_event_and_ends_with_the_job(api: ApiService) -> None:
    job_id = api.new_job()["id"]
    api.succeed(job_id)
    stream = {"accept": "text/event-stream"}
    whole = _events(api.http.get(f"/jobs/{job_id}/events", headers=stream))
    assert [event["type"] for event in whole][-1] == "succeeded"
    assert [event["id"] for event in whole] == list(range(1, len(whole) + 1))
    replay = _events(api.http.get(f"/jobs/{job_id}/events", headers={**stream, "last-event-id": "3"}))
    assert replay == whole[3:]
    assert _events(api.http.get(f"/jobs/{job_id}/events?after=4", headers=stream)) == whole[4:]
    done = api.http.get(f"/jobs/{job_id}/events", headers={**stream, "last-event-id": str(len(whole))})
    assert done.status_code == 204, "204 tells an EventSource not to come back"
    ahead = api.http.get(f"/jobs/{job_id}/events", headers={**stream, "last-event-id": "999"})
    assert ahead.status_code == 204, "nor one that saw more, of which a restored backup knows nothing"


def test_a_stream_from_beyond_the_last_event_ends_with_the_job(api: ApiService) -> None:
    job_id = api.new_job()["id"]
    cancelling = threading.Timer(0.3, lambda: api.http.post(f"/jobs/{job_id}/cancel").raise_for_status())
    cancelling.start()
    headers = {"accept": "text/event-stream", "last-event-id": "999"}
    (last,) = _events(api.http.get(f"/jobs/{job_id}/events", headers=headers))
    cancelling.join()
    assert last["type"] == "cancelled"


def test_a_last_event_id_that_is_no_number_is_refused(api: ApiService) -> None:
    job_id = api.new_job()["id"]
    headers = {"accept": "text/event-stream", "last-event-id": "x"}
    assert error_of(api.http.get(f"/jobs/{job_id}/events", headers=headers), 422)["param"] == "last-event-id"


def test_metrics_are_series_by_step_and_a_redone_step_stands_once(api: ApiService) -> None:
    job_id = api.new_job()["id"]
    job = api.train(job_id)
    redone = [{"step": 3, "loss": 0.9}, {"step": 3, "eval_loss": 0.7}]
    api.leases.record_progress(job_id, job.epoch, progress={}, metrics={}, steps=redone)
    series = api.http.get(f"/jobs/{job_id}/metrics").json()["series"]
    assert series["loss"] == {"steps": [1, 2, 3], "values": [3.0, 1.5, 0.9]}
    assert series["eval_loss"] == {"steps": [3], "values": [0.7]}
    assert series["learning_rate"]["values"] == [1e-4] * 3


def test_logs_are_those_of_the_latest_run_that_left_some(api: ApiService) -> None:
    job_id = api.new_job()["id"]
    assert error_of(api.http.get(f"/jobs/{job_id}/logs"), 404)["code"] == "log_not_found"
    api.train(job_id)
    api.bucket.put_bytes(log_key("default", job_id, 1), b"preparing\n")
    assert api.http.get(f"/jobs/{job_id}/logs").text == "preparing\n"
    api.bucket.put_bytes(log_key("default", job_id, 2), "training µ\n".encode())
    assert api.http.get(f"/jobs/{job_id}/logs").text == "training µ\n"


def test_the_manifest_gives_a_link_per_file_that_works_without_more(api: ApiService) -> None:
    job_id = api.new_job()["id"]
    api.succeed(job_id)
    manifest = api.http.get(f"/jobs/{job_id}/adapter").json()
    assert {file["name"] for file in manifest["files"]} == set(ADAPTER)
    for file in manifest["files"]:
        answer = api.http.get(file["url"])
        assert answer.content == ADAPTER[file["name"]]
        assert answer.headers["content-length"] == str(file["size"])
    job = api.http.get(f"/jobs/{job_id}").json()
    assert job["adapter"]["manifest"] == f"/jobs/{job_id}/adapter"
    assert job["memory"]["measured_peak_bytes"] == 5 * 1024**3


def test_a_link_that_has_expired_or_was_changed_opens_nothing(api: ApiService) -> None:
    stored = api.bucket.put_bytes("tenants/default/files/file-a", b"secret")
    base = str(api.http.base_url)
    old = api.bucket.presign(stored.key, expires=timedelta(seconds=-1), base_url=base)
    assert error_of(api.http.get(old), 403)["code"] == "link_expired"
    good = api.bucket.presign(stored.key, expires=timedelta(minutes=1), base_url=base)
    assert api.http.get(good).content == b"secret"
    assert error_of(api.http.get(good.replace("file-a", "file-b")), 403)["code"] == "link_expired"
    later = good.replace("expires=1", "expires=2")
    assert error_of(api.http.get(later), 403)["code"] == "link_expired"
    assert error_of(api.http.get(good.split("?")[0]), 422)["code"] == "invalid_parameter"


def test_the_archive_holds_exactly_the_adapter(api: ApiService) -> None:
    job_id = api.new_job()["id"]
    files = {**ADAPTER, "a" * 150 + ".txt": b"a name that needs a header of its own", "empty": b""}
    api.succeed(job_id, files)
    answer = api.http.get(f"/jobs/{job_id}/adapter/archive")
    assert len(answer.content) == int(answer.headers["content-length"])
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        found = {member.name: tar.extractfile(member) for member in tar}
        contents = {name: part.read() for name, part in found.items() if part is not None}
    manifest = contents.pop(f"{job_id}/manifest.json")
    assert contents == {f"{job_id}/{name}": data for name, data in files.items()}
    assert json.loads(manifest)["job_id"] == job_id


def test_an_archive_of_changed_bytes_breaks_off(api: ApiService) -> None:
    job_id = api.new_job()["id"]
    job = api.succeed(job_id)
    key = adapter_prefix("default", job_id, job.epoch) + "adapter_model.safetensors"
    api.bucket.put_bytes(key, bytes(len(ADAPTER["adapter_model.safetensors"])))
    with pytest.raises(RuntimeError, match="response already started"):
        api.http.get(f"/jobs/{job_id}/adapter/archive")
    api.bucket.put_bytes(key, b"short")
    assert error_of(api.http.get(f"/jobs/{job_id}/adapter/archive"), 500)["code"] == "artifact_corrupt"
    api.bucket.delete(key)
    assert error_of(api.http.get(f"/jobs/{job_id}/adapter/archive"), 500)["code"] == "artifact_corrupt"


def test_there_is_no_adapter_before_the_job_has_succeeded(api: ApiService) -> None:
    job_id = api.new_job()["id"]
    for route in ("adapter", "adapter/archive"):
        error = error_of(api.http.get(f"/jobs/{job_id}/{route}"), 409)
        assert (error["code"], error["status"]) == ("adapter_not_ready", "validating_files")


def test_capacity_tells_how_far_its_forecasts_were_off(api: ApiService) -> None:
    def shown(name: str) -> Any:
        classes = api.http.get("/capacity").json()["data"]
        return next(found["forecast_error"] for found in classes if found["name"] == name)

    job = api.new_job()
    assert shown(job["gpu_class"]) is None
    expected = job["memory"]["predicted_peak_bytes"]
    for ratio in (0.9, 1.1, 1.0):
        api.succeed(job["id"], measured_peak_bytes=int(expected * ratio))
        job = api.new_job()
    assert shown(job["gpu_class"]) == {
        "jobs": 3,
        "mean_ratio": 1.0,
        "median_ratio": 1.0,
        "highest_ratio": 1.1,
    }


def test_a_forecast_is_that_of_the_microbatches_that_the_data_filled(api: ApiService) -> None:
    job = api.new_job()
    path, placed = f"/jobs/{job['id']}", job["memory"]["predicted_peak_bytes"]
    made_of = {"reserved_peak_bytes": placed // 4, "outside_bytes": placed // 4}
    api.succeed(job["id"], measured_peak_bytes=placed // 2, expected_peak_bytes=placed // 2 + 1, **made_of)
    assert api.http.get(path).json()["memory"] == {
        "predicted_peak_bytes": placed // 2 + 1,
        "measured_peak_bytes": placed // 2,
        "forecast": job["memory"]["forecast"],
        "measured": made_of,
    }
    classes = api.http.get("/capacity").json()["data"]
    error = next(found["forecast_error"] for found in classes if found["name"] == job["gpu_class"])
    assert (error["jobs"], error["highest_ratio"]) == (1, 1.0)


def test_capacity_shows_the_table_and_who_is_alive(api: ApiService) -> None:
    api.workers.beat(**a_beat("g", gpu_class="24gb", device="A10G"))
    handed = api.new_job()["id"]
    api.leases.hand_to_training(handed, api.claim(handed).epoch, {"report": {}})
    api.new_job()
    body = api.http.get("/capacity").json()
    by_name = {gpu["name"]: gpu for gpu in body["data"]}
    assert list(by_name) == ["cpu", "16gb", "24gb", "40gb", "48gb", "80gb", "141gb"]
    assert (by_name["24gb"]["live_workers"], by_name["16gb"]["queue_length"]) == (1, 1)
    assert by_name["16gb"]["usable_bytes"] < by_name["16gb"]["memory_bytes"]
    sizes = {model["id"]: model["parameters"] for model in api.http.get("/models").json()["data"]}
    largest = [sizes[gpu["largest_base_model"]] for gpu in body["data"]]
    assert largest == sorted(largest)
    assert [(worker["name"], worker["stages"]) for worker in body["workers"]] == [("g", ["train"])]


def test_models_are_listed_with_shapes_and_limits(api: ApiService) -> None:
    listed = {model["id"]: model for model in api.http.get("/models").json()["data"]}
    llama = listed[LLAMA]
    assert (llama["max_length"], llama["hidden_size"], llama["source"]) == (4096, 4096, "catalogue")
    assert set(llama["default_target_modules"]) < set(llama["target_modules"])
    assert api.http.get(f"/models/{LLAMA}").json() == llama
    for unknown in ("nobody/nothing", "../../etc/passwd", "a//b"):
        assert error_of(api.http.get(f"/models/{unknown}".replace("..", "%2e%2e")), 404)["type"] == "not_found_error"


def test_readiness_tells_who_is_missing(api: ApiService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert api.http.get("/healthz").json() == {"status": "ok"}
    ready = api.http.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (200, "ready")
    api.doorbell.works = False
    degraded = api.http.get("/readyz")
    assert (degraded.status_code, degraded.json()["status"]) == (200, "degraded")
    assert degraded.json()["checks"]["broker"]["ok"] is False
    api.doorbell.works = True

    def away() -> None:
        raise BucketUnavailable(reason="no route")

    monkeypatch.setattr(api.bucket, "ping", away)
    assert api.http.get("/readyz").json()["checks"]["bucket"] == {
        "ok": False,
        "reason": "The object store does not answer: no route.",
    }


def test_without_tables_nothing_is_ready_and_jobs_may_be_posted_later(tmp_path: Path, template: Path) -> None:
    api = make_service(tmp_path, template)
    api.database.close()
    (tmp_path / "graft.db").write_bytes(b"")
    answer = api.http.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (503, "unavailable")
    reason = answer.json()["checks"]["database"]["reason"]
    assert "no such table" in reason and "graft_shared.store.migrate" in reason
    away = api.http.get("/jobs")
    error = error_of(away, 503)
    assert (error["code"], error["type"], away.headers["retry-after"]) == ("store_unavailable", "server_error", "5")
    assert "reason" not in error
    api.database.close()


def test_every_answer_has_a_request_id_and_a_sane_one_is_kept(api: ApiService) -> None:
    assert api.http.get("/healthz").headers["x-request-id"].startswith("req-")
    assert api.http.get("/healthz", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for bad in ("with blank", "x" * 129, "<script>"):
        assert api.http.get("/healthz", headers={"x-request-id": bad}).headers["x-request-id"].startswith("req-")


def test_something_unforeseen_is_answered_without_its_insides(
    api: ApiService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def crash(*_args: Any) -> None:
        raise ZeroDivisionError("the password is hunter2")

    spec = api.spec()
    monkeypatch.setattr(jobs_service, "admit", crash)
    answer = api.http.post("/jobs", json=spec, headers={"x-request-id": "r1"})
    error = error_of(answer, 500)
    assert (error["code"], error["request_id"]) == ("internal_error", "r1")
    assert "hunter2" not in answer.text
    assert "hunter2" in caplog.text, "the operator finds it by the request id"


def test_unknown_routes_and_methods_are_errors_of_the_same_shape(api: ApiService) -> None:
    assert error_of(api.http.get("/nothing/here"), 404)["code"] == "route_not_found"
    answer = api.http.put("/jobs")
    assert error_of(answer, 405)["code"] == "method_not_allowed"
    assert "GET" in answer.headers["allow"] or "POST" in answer.headers["allow"]


def test_the_openapi_document_is_served_and_describes_the_spec_and_the_errors(api: ApiService) -> None:
    document = api.http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert schemas["JobSpec"]["additionalProperties"] is False
    assert "class" in schemas["Gpu"]["properties"]
    references = {part.split('"')[0] for part in json.dumps(document).split('"#/components/schemas/')[1:]}
    assert references <= set(schemas)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert {"400", "422", "500", "503"} <= set(operation["responses"]), path
            for status, response in operation["responses"].items():
                assert status.isdigit(), (path, "a range of statuses tells nothing")
                if status >= "400" and path != "/readyz":
                    assert "example" in response["content"]["application/json"], (path, status)
    assert "HTTPValidationError" not in json.dumps(document["paths"])


def test_by_the_document_no_text_of_a_body_holds_the_character_that_no_store_can(api: ApiService) -> None:
    document = api.http.get("/openapi.json").json()
    texts = dict(texts_of({path: operations.get("post") for path, operations in document["paths"].items()}, document))
    assert len(texts) > 30
    for place, text in texts.items():
        pattern = text.get("pattern", "")
        assert pattern or {"enum", "const", "format"} & set(text), (place, "any text")
        for left_out in re.findall(r"\[\^((?:\\.|[^\]\\])+)\]", pattern):
            assert r"\x00" in left_out, (place, pattern)


def texts_of(part: Any, document: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every schema of a text in the bodies that are sent, by its place."""
    if isinstance(part, list):
        part = {str(number): each for number, each in enumerate(part)}
    if not isinstance(part, dict):
        return
    if "$ref" in part:
        name = part["$ref"].rpartition("/")[2]
        yield from texts_of(document["components"]["schemas"][name], document, (*place, name))
    if part.get("type") == "string":
        yield place, part
    for name, each in part.items():
        if name not in ("responses", "parameters"):
            yield from texts_of(each, document, (*place, name))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com", ""])
def test_without_authentication_strangers_are_kept_out(host: str) -> None:
    with pytest.raises(Exposed, match=r"GRAFT_KEY_PEPPER.*GRAFT_API_KEYS"):
        check_exposure(host, ApiSettings())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_this_machine_alone_may_be_served(host: str) -> None:
    check_exposure(host, ApiSettings())


def test_a_database_that_is_away_is_503_and_comes_back(api: ApiService, tmp_path: Path) -> None:
    (tmp_path / "graft.db").rename(tmp_path / "away.db")
    api.database.close()
    (tmp_path / "graft.db").mkdir()
    assert error_of(api.http.get("/jobs"), 503)["code"] == "store_unavailable"
    (tmp_path / "graft.db").rmdir()
    (tmp_path / "away.db").rename(tmp_path / "graft.db")
    assert api.http.get("/jobs").status_code == 200
    open_database(api.settings.database).close()


def _events(answer: Any) -> list[dict[str, Any]]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    head, *blocks = [block for block in answer.text.split("\n\n") if block and not block.startswith(":")]
    assert head.startswith("retry: ")
    events = []
    for block in blocks:
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        event = json.loads(fields["data"])
        assert (fields["id"], fields["event"]) == (str(event["id"]), event["type"])
        events.append(event)
    return events

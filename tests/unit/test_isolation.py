"""Another tenant's ids answer as ids that never were: on every route of the API's own document, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graft_shared.artifacts import log_key, sha256_of
from graft_shared.ids import new_file_id, new_job_id, new_upload_id
from tests.api_service import LLAMA, ROWS, ApiService, make_service
from tests.invariants import Answered, a_foreign_id_answers_as_an_unknown_one

RED, BLUE = "r" * 24, "b" * 24
MOMENTARY = ("x-request-id", "date")

# What each route names: a job, a file or a model by its id, in its path, query or body. Whoever adds a route says it
# here; one that is left out fails the tests.
BY_JOB = {
    ("get", "/jobs/{job_id}"),
    ("delete", "/jobs/{job_id}"),
    ("post", "/jobs/{job_id}/cancel"),
    ("post", "/jobs/{job_id}/pause"),
    ("post", "/jobs/{job_id}/resume"),
    ("get", "/jobs/{job_id}/events"),
    ("get", "/jobs/{job_id}/checkpoints"),
    ("get", "/jobs/{job_id}/metrics"),
    ("get", "/jobs/{job_id}/logs"),
    ("get", "/jobs/{job_id}/report"),
    ("get", "/jobs/{job_id}/adapter"),
    ("get", "/jobs/{job_id}/adapter/archive"),
    ("post", "/jobs/{job_id}/merged"),
    ("get", "/jobs/{job_id}/merged"),
    ("get", "/jobs/{job_id}/merged/archive"),
    ("delete", "/jobs/{job_id}/merged"),
    ("get", "/jobs/{job_id}/webhooks"),
    ("get", "/v1/fine_tuning/jobs/{job_id}"),
    ("post", "/v1/fine_tuning/jobs/{job_id}/cancel"),
    ("post", "/v1/fine_tuning/jobs/{job_id}/pause"),
    ("post", "/v1/fine_tuning/jobs/{job_id}/resume"),
    ("get", "/v1/fine_tuning/jobs/{job_id}/events"),
    ("get", "/v1/fine_tuning/jobs/{job_id}/checkpoints"),
}
BY_FILE = {
    ("get", "/files/{file_id}"),
    ("get", "/files/{file_id}/content"),
    ("get", "/files/{file_id}/report"),
    ("delete", "/files/{file_id}"),
    ("get", "/v1/files/{file_id}"),
    ("get", "/v1/files/{file_id}/content"),
    ("delete", "/v1/files/{file_id}"),
}
BY_UPLOAD = {("post", "/files/uploads/{upload_id}/complete")}
BY_MODEL = {("get", "/v1/models/{model}")}
LISTS = {  # and what their `after` names
    ("get", "/jobs"): "job",
    ("get", "/files"): "file",
    ("get", "/v1/fine_tuning/jobs"): "job",
    ("get", "/v1/files"): "file",
    ("get", "/v1/models"): None,
}
BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("post", "/jobs"): {"base_model": LLAMA, "dataset": {"file": "FILE"}},
    ("post", "/jobs/estimate"): {"base_model": LLAMA, "dataset": {"file": "FILE"}},
    ("post", "/v1/fine_tuning/jobs"): {"model": LLAMA, "training_file": "FILE"},
}
QUERIES = {("get", "/files/{file_id}/report"): ({"base_model": LLAMA}, "validation_file")}  # and what names a file
OF_THE_CALLER = {
    ("post", "/files"),
    ("post", "/files/uploads"),
    ("post", "/v1/files"),
    ("get", "/webhooks/secret"),
    ("post", "/webhooks/test"),
}
OF_EVERYBODY = {
    ("get", "/models"),
    ("get", "/models/{base_model}"),
    ("get", "/capacity"),
    ("get", "/metrics"),  # names no tenant and no job
    ("get", "/objects/{key}"),  # by a signature
    ("put", "/objects/{key}"),
    ("get", "/healthz"),
    ("get", "/readyz"),
}
# What else a caller may write that is no number and no id of a tenant's.
HARMLESS = {
    "status",
    "base_model",
    "revision",
    "completion_only_loss",
    "metadata",
    "order",
    "purpose",
    "signature",
    "sha256",
    "idempotency-key",
    "last-event-id",  # of the job in the path
}


@pytest.fixture
def api(tmp_path: Path, template: Path) -> Iterator[ApiService]:
    secrets = {"api_keys": f"red={RED}, blue={BLUE}", "webhook_secret": "w" * 24}
    service = make_service(tmp_path, template, webhook_hosts=("hooks.internal",), **secrets)
    yield service
    service.database.close()


def become(api: ApiService, key: str) -> None:
    api.http.headers["authorization"] = f"Bearer {key}"


def ids_of_nobody() -> dict[str, str]:
    job_id = new_job_id()
    upload = new_upload_id()
    return {
        "job": job_id,
        "file": new_file_id(),
        "upload": upload,
        "model": f"ft:{LLAMA}:red::{job_id.removeprefix('ftjob-')}",
    }


def made_by(api: ApiService, key: str, state: str) -> dict[str, str]:
    """A job of this tenant in this state, with all that may hang on one, and the ids of it all."""
    become(api, key)
    job = api.new_job(webhook_url="http://hooks.internal/x")
    tenant = "red" if key == RED else "blue"
    if state == "running":
        api.train(job["id"])
    elif state == "cancelled":
        api.http.post(f"/jobs/{job['id']}/cancel")
    elif state != "queued":
        api.succeed(job["id"])
    for epoch in (1, 2):
        api.bucket.put_bytes(log_key(tenant, job["id"], epoch), b"what it did\n")
    ids = {"job": job["id"], "file": job["spec"]["dataset"]["file"]}
    ids["upload"] = an_upload(api) if state != "deleted" else new_upload_id()  # uploads are not deleted: they expire
    ids["model"] = f"ft:{LLAMA}:red::{job['id'].removeprefix('ftjob-')}"
    if state == "deleted":
        assert api.http.delete(f"/jobs/{ids['job']}").status_code == 200
        assert api.http.delete(f"/files/{ids['file']}").status_code == 200
    return ids


def an_upload(api: ApiService) -> str:
    """An upload that has come and can be completed."""
    announced = {"filename": "r.jsonl", "bytes": len(ROWS), "sha256": sha256_of(ROWS)}
    upload = api.http.post("/files/uploads", json=announced).json()
    assert api.http.put(upload["url"], content=ROWS).status_code == 204
    return str(upload["id"])


def requests_naming(document: dict[str, Any], ids: dict[str, str]) -> Iterator[dict[str, Any]]:
    """A request for each place of each route in which an id may be written."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield from _of_route(method, path, operation, ids)


def _of_route(method: str, path: str, operation: dict[str, Any], ids: dict[str, str]) -> Iterator[dict[str, Any]]:
    route = (method, path)
    kinds = {"job": BY_JOB, "file": BY_FILE, "upload": BY_UPLOAD, "model": BY_MODEL}
    kind = next((kind for kind, named in kinds.items() if route in named), None)
    classified = kind or route in LISTS or route in BODIES or route in OF_THE_CALLER or route in OF_EVERYBODY
    assert classified, f"{method} {path}: say in this file what it names"
    bodies = route in BODIES or method == "put" or (route in OF_THE_CALLER and method == "post")
    assert ("requestBody" in operation) == bodies, route
    for parameter in operation.get("parameters", []):
        _see_that_it_is_harmless(route, parameter, kind)
    if kind is not None:
        query, names_a_file = QUERIES.get(route, ({}, None))
        url = path.replace(path[path.index("{") : path.index("}") + 1], ids[kind])
        request = {"method": method, "url": url, "params": query}
        yield request
        if names_a_file is not None:
            yield {**request, "params": {**query, names_a_file: ids["file"]}}
        if path.endswith("/events") and not path.startswith("/v1"):
            yield {**request, "headers": {"accept": "text/event-stream"}}
            yield {**request, "headers": {"accept": "text/event-stream", "last-event-id": "1"}}
    if (named := LISTS.get(route)) is not None:
        yield {"method": method, "url": path, "params": {"after": ids[named]}}
    if route in BODIES:
        yield {"method": method, "url": path, "json": _filled(BODIES[route], ids["file"])}


def _see_that_it_is_harmless(route: tuple[str, str], parameter: dict[str, Any], kind: str | None) -> None:
    types = {part.get("type") for part in [parameter["schema"], *parameter["schema"].get("anyOf", [])]}
    name = parameter["name"]
    if name == QUERIES.get(route, ({}, None))[1]:
        return
    if parameter["in"] == "path" or types & {"integer", "number", "boolean"} or name in HARMLESS:
        return
    assert name == "after" and (route in LISTS or kind == "job"), (
        f"{route} takes {name}: say in this file what it names"
    )


def _filled(body: Any, file_id: str) -> Any:
    if isinstance(body, dict):
        return {name: _filled(value, file_id) for name, value in body.items()}
    return file_id if body == "FILE" else body


def answered(api: ApiService, request: dict[str, Any], ids: dict[str, str]) -> Answered:
    answer = api.http.request(**request)
    body, headers = answer.content, [(n, v) for n, v in answer.headers.items() if n not in MOMENTARY]
    for kind, named in ids.items():
        body = body.replace(named.encode(), kind.encode())
    return Answered(answer.status_code, tuple(headers), body)


def all_that_is_stored(api: ApiService) -> list[Any]:
    with api.database.reading() as connection:
        tables = ("jobs", "job_events", "files", "uploads", "reports", "webhooks")
        return [connection.exec_driver_sql(f"select * from {table}").all() for table in tables]


@pytest.mark.parametrize(
    ("owner", "state"),
    [*((RED, state) for state in ("queued", "running", "succeeded", "cancelled", "deleted")), (BLUE, "deleted")],
    ids=["queued", "running", "succeeded", "cancelled", "deleted", "one's own, deleted"],
)
def test_what_is_anothers_or_deleted_answers_as_what_never_was(api: ApiService, owner: str, state: str) -> None:
    theirs = made_by(api, owner, state)
    api.let_bells_ring()
    become(api, BLUE)
    document, before, nobodys = api.http.get("/openapi.json").json(), all_that_is_stored(api), ids_of_nobody()
    tried = list(zip(requests_naming(document, theirs), requests_naming(document, nobodys), strict=True))
    assert len(tried) >= len(BY_JOB | BY_FILE | BY_MODEL) + len(BODIES) + 6
    for request, unknown in tried:
        seen = answered(api, request, theirs)
        assert seen.status in (404, 422), request
        a_foreign_id_answers_as_an_unknown_one(seen, answered(api, unknown, nobodys))
    assert all_that_is_stored(api) == before, "nothing was done to it"


def test_no_list_shows_what_is_anothers(api: ApiService) -> None:
    theirs = made_by(api, RED, "succeeded")
    become(api, BLUE)
    for method, path in LISTS:
        listed = api.http.request(method, path, params={"limit": 100} if path != "/v1/models" else {})
        assert listed.status_code == 200
        for named in theirs.values():
            assert named not in listed.text, path
    assert "ftjob" not in api.http.get("/metrics").text + api.http.get("/capacity").text
    become(api, RED)
    for method, path in LISTS:
        assert any(named in api.http.request(method, path).text for named in theirs.values()), path


def test_each_tenant_has_idempotency_keys_of_its_own(api: ApiService) -> None:
    become(api, RED)
    theirs = api.post(api.spec(), **{"idempotency-key": "k"}).json()
    become(api, BLUE)
    mine = api.post(api.spec(), **{"idempotency-key": "k"})
    assert mine.status_code == 202 and mine.json()["id"] != theirs["id"]


def test_the_owner_is_answered_wherever_an_id_is_taken(api: ApiService) -> None:
    ids = made_by(api, RED, "succeeded")
    document = api.http.get("/openapi.json").json()
    for request in requests_naming(document, ids):
        if request["method"] == "delete":
            continue
        too_late_or_early = request["url"].endswith(("/cancel", "/pause", "/resume", "/merged/archive"))
        expected = (409,) if too_late_or_early else (200, 201, 202)
        assert api.http.request(**request).status_code in expected, request
    assert len(api.http.get(f"/jobs/{ids['job']}/webhooks").json()["data"]) == 1
    assert api.http.delete(f"/jobs/{ids['job']}").json()["deleted"] is True
    assert api.http.delete(f"/files/{ids['file']}").status_code == 409, "the jobs that were posted above need it"

"""Keys: who may ask, and that nobody sees another's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from graft_api.auth import read_keys
from graft_shared.artifacts import log_key
from graft_shared.ids import new_file_id, new_job_id
from tests.api_service import LLAMA, ApiService, error_of, make_service, migrated_database

RED, BLUE = "r" * 24, "b" * 24


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return migrated_database(tmp_path_factory.mktemp("template"))


@pytest.fixture
def api(tmp_path: Path, template: Path) -> Iterator[ApiService]:
    service = make_service(tmp_path, template, api_keys=f"red={RED}, blue={BLUE}")
    yield service
    service.database.close()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("headers", [{}, bearer("x" * 24), bearer(""), {"authorization": f"Basic {RED}"}])
def test_without_a_valid_key_every_route_but_health_and_the_document_refuses(
    api: ApiService, headers: dict[str, str]
) -> None:
    document = api.http.get("/openapi.json").json()
    open_routes = {"/healthz", "/readyz", "/objects/{key}"}  # what lies under /objects is signed
    for path, operations in document["paths"].items():
        for method in operations:
            answer = api.http.request(method, path.replace("{", "").replace("}", ""), headers=headers)
            if path in open_routes:
                assert answer.status_code != 401, path
            else:
                assert error_of(answer, 401)["code"] == "unauthenticated", (method, path)
                assert answer.headers["www-authenticate"] == "Bearer"


def test_a_tenant_sees_its_own_jobs_and_files_alone(api: ApiService) -> None:
    api.http.headers.update(bearer(RED))
    job = api.new_job()
    file_id = job["spec"]["dataset"]["file"]
    assert [listed["id"] for listed in api.http.get("/jobs").json()["data"]] == [job["id"]]
    assert [listed["id"] for listed in api.http.get("/files").json()["data"]] == [file_id]
    api.http.headers.update(bearer(BLUE))
    assert api.http.get("/jobs").json()["data"] == []
    assert api.http.get("/files").json()["data"] == []


# What a request may name, from the API's own document. A parameter that stands in neither table fails the test: whoever
# adds one says here what it names.
IDS = {
    ("path", "job_id"): "job",
    ("path", "file_id"): "file",
    ("query /jobs", "after"): "job",
    ("query /files", "after"): "file",
    ("query /v1/fine_tuning/jobs", "after"): "job",
    ("query /v1/files", "after"): "file",
}
NO_IDS = {
    ("path", "base_model"),  # base models are everybody's
    ("path", "key"),  # signed
    ("query /jobs", "status"),
    ("query /jobs", "base_model"),
    ("query /jobs", "metadata"),
    ("query /objects/{key}", "signature"),
    ("query /v1/fine_tuning/jobs", "metadata"),
    ("query /v1/files", "order"),
    ("query /v1/files", "purpose"),
    ("query /jobs/{job_id}/checkpoints", "after"),  # within the job of the path, as below
    ("query /v1/fine_tuning/jobs/{job_id}/events", "after"),
    ("query /v1/fine_tuning/jobs/{job_id}/checkpoints", "after"),
    ("path", "model"),  # tests/unit/test_api_compatible.py has foreign adapters
    ("header", "idempotency-key"),  # each tenant has its own
    ("header", "last-event-id"),  # within the job of the path
}
BODIES_WITH_IDS: dict[tuple[str, str], Callable[[str], dict[str, Any]]] = {
    ("post", "/jobs"): lambda file_id: {"base_model": LLAMA, "dataset": {"file": file_id}},
    ("post", "/jobs/estimate"): lambda file_id: {"base_model": LLAMA, "dataset": {"file": file_id}},
    ("post", "/v1/fine_tuning/jobs"): lambda file_id: {"model": LLAMA, "training_file": file_id},
}
BODIES_WITHOUT_IDS = {("post", "/files"), ("post", "/v1/files"), ("post", "/webhooks/test")}


def requests_with(document: dict[str, Any], ids: dict[str, str]) -> Iterator[dict[str, Any]]:
    """One request for each place in which a route of the document takes an id."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for parameter in operation.get("parameters", []):
                yield from _request_by(parameter, method, path, ids)
            if (method, path) in BODIES_WITH_IDS:
                yield {"method": method, "url": path, "json": BODIES_WITH_IDS[method, path](ids["file"])}
            else:
                assert "requestBody" not in operation or (method, path) in BODIES_WITHOUT_IDS, (method, path)


def _request_by(parameter: dict[str, Any], method: str, path: str, ids: dict[str, str]) -> Iterator[dict[str, Any]]:
    name = parameter["name"]
    place = (f"query {path}" if parameter["in"] == "query" else parameter["in"], name)
    types = {part.get("type") for part in [parameter["schema"], *parameter["schema"].get("anyOf", [])]}
    if types & {"integer", "number", "boolean"} or place in NO_IDS:
        return
    assert place in IDS, f"{method} {path} takes {place}: say in this file what it names"
    named = ids[IDS[place]]
    if parameter["in"] == "query":
        yield {"method": method, "url": path, "params": {name: named}}
        return
    request = {"method": method, "url": path.replace(f"{{{name}}}", named)}
    yield request
    if "text/event-stream" in str(parameter) or path.endswith("/events"):
        yield {**request, "headers": {"accept": "text/event-stream"}}


def answer_to(api: ApiService, request: dict[str, Any], ids: dict[str, str]) -> tuple[int, dict[str, str], str]:
    """All that an answer tells, with the ids that the caller brought left out."""
    answer = api.http.request(**request)
    headers = {name: value for name, value in answer.headers.items() if name not in ("x-request-id", "date")}
    text = answer.text
    for kind, named in ids.items():
        text = text.replace(named, kind)
    return answer.status_code, headers, text


def what_is_known_of(api: ApiService, job_id: str) -> dict[str, Any]:
    """The job, but for the facts that the clock alone changes."""
    facts = api.http.get(f"/jobs/{job_id}").json().items()
    return {name: fact for name, fact in facts if name not in ("estimated_finish", "cost")}


@pytest.mark.parametrize("state", ["queued", "running", "succeeded"])
def test_a_foreign_id_answers_exactly_as_an_unknown_one_wherever_an_id_is_taken(api: ApiService, state: str) -> None:
    api.http.headers.update(bearer(RED))
    job = api.new_job()
    {"queued": lambda _: None, "running": api.train, "succeeded": api.succeed}[state](job["id"])
    for epoch in (1, 2):
        api.bucket.put_bytes(log_key("red", job["id"], epoch), b"what red did\n")
    document = api.http.get("/openapi.json").json()
    foreign = {"job": job["id"], "file": job["spec"]["dataset"]["file"]}
    unknown = {"job": new_job_id(), "file": new_file_id()}
    before = what_is_known_of(api, job["id"])

    api.http.headers.update(bearer(BLUE))
    tried = list(zip(requests_with(document, foreign), requests_with(document, unknown), strict=True))
    assert len(tried) >= 14, "each route of jobs and files, two lists, two bodies, one stream"
    for theirs, nobodys in tried:
        seen, never = answer_to(api, theirs, foreign), answer_to(api, nobodys, unknown)
        assert seen == never, theirs
        assert seen[0] in (404, 422), theirs

    api.http.headers.update(bearer(RED))
    assert what_is_known_of(api, job["id"]) == before, "nothing was done to it"


def test_the_owner_is_answered_wherever_an_id_is_taken(api: ApiService) -> None:
    api.http.headers.update(bearer(RED))
    job = api.new_job()
    api.succeed(job["id"])
    api.bucket.put_bytes(log_key("red", job["id"], 2), b"what red did\n")
    ids = {"job": job["id"], "file": job["spec"]["dataset"]["file"]}
    requests = list(requests_with(api.http.get("/openapi.json").json(), ids))
    for request in (request for request in requests if request["method"] != "delete"):
        expected = (409,) if request["url"].endswith(("/cancel", "/pause", "/resume")) else (200, 202)
        assert api.http.request(**request).status_code in expected, request
    assert {request["url"].partition("/ft")[0] for request in requests if request["method"] == "delete"} == {
        "/jobs",
        f"/files/{ids['file']}",
        f"/v1/files/{ids['file']}",
    }
    assert api.http.delete(f"/jobs/{ids['job']}").json() == {
        "id": ids["job"],
        "object": "fine_tuning.job",
        "deleted": True,
    }
    assert api.http.delete(f"/files/{ids['file']}").status_code == 409, "the jobs that were posted above need it"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("red", "tenant=key"),
        (f"re d={RED}", "tenant=key"),
        ("red=short", "24 or more"),
        (",", "holds no key"),
        (" ", "holds no key"),
        (f"red={RED},blue={RED}", "same key"),
    ],
)
def test_keys_that_are_written_wrong_are_refused_and_not_shown(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        read_keys(text)
    assert RED not in str(refused.value)


def test_a_tenant_may_have_two_keys_so_that_one_can_be_changed() -> None:
    assert read_keys(f"red={RED},red={BLUE},") == {RED: "red", BLUE: "red"}
    assert read_keys("") == {}

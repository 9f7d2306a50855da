"""Keys: who may ask, and that nobody sees another's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from graft_api.auth import read_keys
from tests.api_service import ApiService, error_of, make_service, migrated_database

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
    api.http.headers.update(bearer(BLUE))
    assert api.http.get("/jobs").json()["data"] == []
    for foreign, unknown in ((f"/jobs/{job['id']}", "/jobs/ftjob-none"), (f"/files/{file_id}", "/files/file-none")):
        seen, never = api.http.get(foreign), api.http.get(unknown)
        assert (seen.status_code, seen.json()["error"]["code"]) == (never.status_code, never.json()["error"]["code"])
        assert seen.status_code == 404
    assert api.post({"base_model": "meta-llama/Llama-2-7b-hf", "dataset": {"file": file_id}}).status_code == 422


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("red", "tenant=key"),
        (f"re d={RED}", "tenant=key"),
        ("red=short", "24 or more"),
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

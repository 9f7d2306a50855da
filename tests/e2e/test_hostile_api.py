"""All of `tests/hostile/api.py` sent to a real API: nothing is accepted, nothing breaks it, and it stays small."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from graft_shared.store.migrate import migrate
from tests.api_process import ApiProcess
from tests.api_service import ROWS, ApiService
from tests.hostile.api import CASES, RANGES, Case, put_bad_bases, send
from tests.servers import PostgresServer

MOST_MEMORY_MIB = 512


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory, postgres: PostgresServer) -> Iterator[ApiProcess]:
    folder = tmp_path_factory.mktemp("hostile")
    url = postgres.new_database("hostile")
    made = ApiProcess(folder, GRAFT_DATABASE_URL=url, GRAFT_WEBHOOK_SECRET="of the hostile corpus")
    put_bad_bases(folder / "models")
    service = made.service()
    migrate(service.database)
    service.database.close()
    yield made.start()
    made.stop(signal.SIGKILL)


@pytest.fixture
def api(process: ApiProcess) -> Iterator[ApiService]:
    service = process.service()
    yield service
    service.database.close()
    service.http.close()


def test_nothing_hostile_is_accepted_and_each_has_its_answer(process: ApiProcess, api: ApiService) -> None:
    file_id = str(api.upload().json()["id"])
    found = {}
    for name, case in CASES.items():
        answer = send(process.port, case.request(file_id))
        if (answer.status, answer.code) != (case.status, case.code) or b"HTTP/1.1 " in answer.body:  # a second answer
            found[name] = (answer.status, answer.code, answer.body[:200])
    assert len(CASES) >= 90
    assert found == {}
    assert api.http.get("/jobs").json()["data"] == []
    assert api.http.get("/readyz").status_code == 200
    assert '"request_crashed"' not in process.log_path.read_text()
    assert process.peak_memory_mib() < MOST_MEMORY_MIB


def test_no_range_is_worth_an_error(process: ApiProcess, api: ApiService) -> None:
    file_id = str(api.upload().json()["id"])
    for value in RANGES:
        request = Case(status=200, code=None, method="GET", path=f"/files/{file_id}/content", headers={"range": value})
        answer = send(process.port, request.request(file_id))
        assert (answer.status, answer.body) == (200, ROWS), value

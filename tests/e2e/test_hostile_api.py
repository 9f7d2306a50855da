"""All of `tests/hostile/api.py` sent to a real API: nothing is accepted, nothing breaks it, and it stays small."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft_shared.store.migrate import migrate
from tests.api_process import ApiProcess
from tests.api_service import ApiService
from tests.hostile.api import CASES, put_bad_bases, send

MOST_MEMORY_MIB = 512


@pytest.fixture
def process(tmp_path: Path, postgres_url: str) -> Iterator[ApiProcess]:
    made = ApiProcess(tmp_path, GRAFT_DATABASE_URL=postgres_url, GRAFT_WEBHOOK_SECRET="of the hostile corpus")
    put_bad_bases(tmp_path / "models")
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

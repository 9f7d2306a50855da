"""A log line says whose it is: the run's job and epoch, or the request's id, whoever writes it."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest

from graft_shared.logs import about, configure_logging, log_event
from tests.api_service import make_service, migrated_database

logger = logging.getLogger("graft.tests")


class Said:
    """What this process writes on standard error."""

    def __init__(self, stream: io.StringIO) -> None:
        self.stream = stream

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    def text(self) -> str:
        return self.stream.getvalue()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[Said]:
    stream = io.StringIO()
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    monkeypatch.setattr("sys.stderr", stream)
    configure_logging("json")
    yield Said(stream)
    root.handlers[:] = handlers
    root.setLevel(level)


def test_what_any_library_says_of_a_run_has_its_job_and_epoch(said: Said) -> None:
    with about(job_id="ftjob-1", epoch=2):
        log_event(logger, "job_claimed", attempt=1)
        logging.getLogger("some.library").warning("slow %s", "disk")
        thread = threading.Thread(target=copy_context().run, args=(log_event, logger, "child_ended"))
        thread.start()
        thread.join()
    log_event(logger, "worker_stopped")
    own = [{key: line.get(key) for key in ("event", "job_id", "epoch")} for line in said.lines()]
    assert own == [
        {"event": "job_claimed", "job_id": "ftjob-1", "epoch": 2},
        {"event": "slow disk", "job_id": "ftjob-1", "epoch": 2},
        {"event": "child_ended", "job_id": "ftjob-1", "epoch": 2},
        {"event": "worker_stopped", "job_id": None, "epoch": None},
    ]


def test_text_is_one_short_line_with_the_same_facts(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", said.stream)
    configure_logging("text")
    with about(job_id="ftjob-1", epoch=2):
        log_event(logger, "attempt_settled", level=logging.WARNING, reason="crash")
    (line,) = said.text().splitlines()
    assert line.endswith("WARNING attempt_settled job_id=ftjob-1 epoch=2 reason=crash")


def test_a_request_is_one_line_whose_id_is_the_callers_and_comes_back(said: Said, tmp_path: Path) -> None:
    api = make_service(tmp_path, migrated_database(tmp_path))
    answer = api.http.get("/jobs?limit=1", headers={"x-request-id": "mine-1"})
    api.http.get("/jobs", headers={"x-request-id": "not sane\x7f"})
    api.database.close()
    assert answer.headers["x-request-id"] == "mine-1"
    mine, other = [line for line in said.lines() if line["event"] == "request_answered"]
    assert (mine["request_id"], mine["method"], mine["path"], mine["status"]) == ("mine-1", "GET", "/jobs", 200)
    assert other["request_id"].startswith("req-")


def test_what_crashes_a_request_is_logged_under_its_id(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = make_service(tmp_path, migrated_database(tmp_path))
    monkeypatch.setattr(type(api.jobs), "list", lambda *_: 1 / 0)
    answer = api.http.get("/jobs", headers={"x-request-id": "mine-2"})
    api.database.close()
    assert answer.status_code == 500
    (crash,) = [line for line in said.lines() if line["event"] == "request_crashed"]
    assert crash["request_id"] == "mine-2"
    assert "ZeroDivisionError" in crash["exception"]

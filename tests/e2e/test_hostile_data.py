"""Hostile datasets against a real API process: each is refused as it should be, and the process stays small."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Iterator
from http import client as http_client
from typing import Any

import httpx
import pytest

from tests.hostile.data import Case, cases
from tests.hostile.served import ServedApi, served_api

CASES = list(cases())
MOST_FILE_BYTES = 16 * 1024**2  # some lines are of ten MiB
MOST_RSS_BYTES = 512 * 1024**2
PATIENCE_SECONDS = 30


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedApi]:
    settings = {"GRAFT_MAX_FILE_BYTES": str(MOST_FILE_BYTES), "GRAFT_DATASET_BUCKETS": "open"}
    with served_api(tmp_path_factory.mktemp("hostile"), **settings) as served:
        yield served


def test_there_are_enough_cases_and_no_two_are_of_one_name() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 90


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_hostile_data_is_refused(api: ServedApi, case: Case) -> None:
    answer = send(api.http, case)
    assert answer.status_code == case.status, answer.text
    error = answer.json()["error"]
    assert error["code"] == case.code, error
    assert case.param is None or error["param"] == case.param, error
    assert case.line is None or error["line"] == case.line, error
    assert len(answer.content) < 4000, "a refusal repeats no megabytes"


def test_nothing_of_it_is_left_and_the_process_stayed_small(api: ServedApi) -> None:
    assert api.process.poll() is None
    assert api.http.get("/files").json()["data"] == api.http.get("/jobs").json()["data"] == []
    assert list((api.state_dir / "uploads").iterdir()) == []
    assert [
        path for path in (api.state_dir / "bucket").rglob("*") if path.is_file() and path.name != "link-secret"
    ] == []
    assert api.crashes() == 0
    assert api.peak_rss_bytes < MOST_RSS_BYTES


def send(http: httpx.Client, case: Case) -> httpx.Response:
    """Send a case; a body without end until the service has heard enough."""
    if callable(case.content):
        return _send_without_end(http, case)
    options: dict[str, Any] = {"params": case.params, "files": case.files, "content": case.content}
    return http.request(case.method, case.path, headers=case.headers, json=case.json, **options)


def _send_without_end(http: httpx.Client, case: Case) -> httpx.Response:
    """A client that sends chunks for as long as nobody answers, as no library does."""
    head = "".join(f"{name}: {value}\r\n" for name, value in {**case.headers, "transfer-encoding": "chunked"}.items())
    with socket.create_connection((http.base_url.host, http.base_url.port), timeout=PATIENCE_SECONDS) as connection:
        connection.sendall(f"{case.method} {case.path} HTTP/1.1\r\nhost: localhost\r\n{head}\r\n".encode())
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # the answer was given, and the door shut
            for piece in case.content():
                if select.select([connection], [], [], 0)[0]:
                    break
                connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
        answer = http_client.HTTPResponse(connection)
        answer.begin()
        content = answer.read()
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(65_536):
                pass  # until the door is shut: who goes on sending is not listened to any longer
    return httpx.Response(answer.status, content=content)

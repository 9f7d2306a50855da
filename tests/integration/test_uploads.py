"""Files that a client sends to the bucket itself, through a link: in one folder, and on a real S3 server."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from sqlalchemy import update

from graft_api.files import uploads as service
from graft_shared.buckets import read_back
from graft_shared.buckets.directory import DirectoryBucket
from graft_shared.buckets.s3 import S3Bucket
from graft_shared.store import UPLOAD_LIFE, Leases, Sweeps
from graft_shared.store.tables import uploads
from graft_shared.sweeper import Sweeper
from tests.api_service import ROWS, ApiService, error_of, make_service, migrated_database
from tests.servers import SWIFT_KEY, SWIFT_USER

OTHER_ROWS = ROWS.replace(b"one", b"uno")  # as long
_numbers = itertools.count()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return migrated_database(tmp_path_factory.mktemp("template"))


@pytest.fixture(params=["directory", "s3"])
def api(request: pytest.FixtureRequest, tmp_path: Path, template: Path) -> Iterator[ApiService]:
    made = make_service(tmp_path, template, max_file_bytes=100_000)
    if request.param == "s3":
        made.bucket = S3Bucket(
            f"graft-uploads-{next(_numbers)}",
            endpoint_url=request.getfixturevalue("swift").endpoint_url,
            region="us-east-1",
            access_key_id=SWIFT_USER,
            secret_access_key=SWIFT_KEY,
        )
        state = made.http.app.state
        state.neighbours = replace(state.neighbours, bucket=made.bucket)
    yield made
    made.database.close()


def begin(api: ApiService, content: bytes = ROWS, **changes: Any) -> Any:
    announced = {"filename": "rows.jsonl", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return api.http.post("/files/uploads", json={**announced, **changes})


def send(api: ApiService, upload: dict[str, Any], content: bytes = ROWS) -> Any:
    headers = {name: value for name, value in upload["headers"].items() if name != "content-length"}
    if urlsplit(upload["url"]).netloc == urlsplit(str(api.http.base_url)).netloc:
        return api.http.put(upload["url"], content=content, headers=headers)
    return httpx.put(upload["url"], content=content, headers=headers)


def complete(api: ApiService, upload: dict[str, Any]) -> Any:
    return api.http.post(f"/files/uploads/{upload['id']}/complete")


def test_what_was_announced_is_sent_checked_and_becomes_a_file(api: ApiService) -> None:
    upload = begin(api).json()
    assert (upload["object"], upload["method"], upload["bytes"]) == ("upload", "PUT", len(ROWS))
    assert error_of(complete(api, upload), 409)["code"] == "upload_not_received"
    assert send(api, upload).status_code in (200, 204)
    answer = complete(api, upload)
    assert answer.status_code == 201
    file = answer.json()
    assert (file["filename"], file["bytes"], file["report"]["rows"]) == ("rows.jsonl", len(ROWS), 2)
    assert file["sha256"] == upload["sha256"]
    assert api.http.get(f"/files/{file['id']}/content").content == ROWS
    assert complete(api, upload).json() == file, "an answer that was lost is given again"
    assert api.post(api.spec(dataset={"file": file["id"]})).status_code == 202
    assert list(api.settings.upload_dir.iterdir()) == []


def test_other_bytes_than_announced_never_become_a_file(api: ApiService) -> None:
    upload = begin(api).json()
    for wrong in (OTHER_ROWS, ROWS[:-1], ROWS + b"\n", b""):
        assert send(api, upload, wrong).status_code >= 400
        assert error_of(complete(api, upload), 409)["code"] == "upload_not_received"
    assert api.http.get("/files").json()["data"] == []


def test_a_store_that_looks_at_no_checksum_is_not_trusted(api: ApiService) -> None:
    upload = begin(api).json()
    key = f"tenants/default/uploads/{upload['id']}"
    for wrong, says in ((OTHER_ROWS, "sha256"), (ROWS + b"\n", "bytes")):
        api.bucket.put_bytes(key, wrong)
        error = error_of(complete(api, upload), 422)
        assert error["code"] == "upload_differs" and says in error["message"]
    api.bucket.put_bytes(key, ROWS)
    assert complete(api, upload).status_code == 201


def test_what_comes_through_the_link_later_changes_nothing(api: ApiService) -> None:
    upload = begin(api).json()
    send(api, upload)
    file = complete(api, upload).json()
    send(api, upload)
    api.bucket.put_bytes(f"tenants/default/uploads/{upload['id']}", b"rubbish")
    assert api.http.get(f"/files/{file['id']}/content").content == ROWS
    read_back(api.bucket, api.files.get("default", file["id"]).object)
    assert complete(api, upload).json() == file
    api.http.delete(f"/files/{file['id']}")
    assert error_of(complete(api, upload), 404)["code"] == "file_not_found"


def test_a_line_that_cannot_be_trained_on_is_refused_with_its_number(api: ApiService) -> None:
    broken = ROWS + b'{"text": \n'
    upload = begin(api, broken).json()
    send(api, upload, broken)
    error = error_of(complete(api, upload), 422)
    assert (error["code"], error["line"]) == ("invalid_training_file", 3)
    assert api.http.get("/files").json()["data"] == []


def test_completed_by_many_at_once_an_upload_is_one_file(api: ApiService, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = begin(api).json()
    send(api, upload)
    together, keep = threading.Barrier(3), service.keep

    def keep_together(*args: Any, **options: Any) -> Any:
        together.wait(timeout=30)
        return keep(*args, **options)

    monkeypatch.setattr(service, "keep", keep_together)
    with ThreadPoolExecutor(3) as pool:
        answers = [answer.result() for answer in [pool.submit(complete, api, upload) for _ in range(3)]]
    assert [answer.status_code for answer in answers] == [201] * 3
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(api.http.get("/files").json()["data"]) == 1


def test_what_nobody_completes_is_swept_and_so_is_what_came_after(api: ApiService) -> None:
    forgotten, done = begin(api).json(), begin(api).json()
    for upload in (forgotten, done):
        send(api, upload)
    file = complete(api, done).json()
    send(api, done)
    with api.database.writing() as connection:
        connection.execute(update(uploads).values(started_at=uploads.c.started_at - UPLOAD_LIFE.total_seconds()))
    assert error_of(complete(api, forgotten), 404)["code"] == "upload_not_found"
    sweeper = Sweeper(
        sweeps=Sweeps(api.database),
        leases=Leases(api.database, UPLOAD_LIFE),
        files=api.files,
        bucket=api.bucket,
        grace=UPLOAD_LIFE,
    )
    sweeper.sweep(threading.Event())
    assert list(api.bucket.list("tenants/")) == [f"tenants/default/files/{file['id']}"]


@pytest.mark.parametrize(
    ("changes", "status", "code", "param"),
    [
        ({"bytes": 100_001}, 413, "file_too_large", None),
        ({"bytes": 0}, 422, "invalid_parameter", "bytes"),
        ({"bytes": "8"}, 422, "invalid_parameter", "bytes"),
        ({"bytes": True}, 422, "invalid_parameter", "bytes"),
        ({"sha256": "A" * 64}, 422, "invalid_parameter", "sha256"),
        ({"sha256": "a" * 63}, 422, "invalid_parameter", "sha256"),
        ({"filename": "../../etc/passwd"}, 422, "invalid_parameter", "filename"),
        ({"filename": "a\nb.jsonl"}, 422, "invalid_parameter", "filename"),
        ({"filename": ""}, 422, "invalid_parameter", "filename"),
        ({"key": "tenants/other/files/x"}, 400, "unknown_parameter", "key"),
    ],
)
def test_an_announcement_that_is_not_one_is_refused(
    tmp_path: Path, template: Path, changes: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    api = make_service(tmp_path, template, max_file_bytes=100_000)
    error = error_of(begin(api, **changes), status)
    assert (error["code"], error["param"]) == (code, param)
    api.database.close()


def test_a_link_is_for_one_object_its_bytes_and_its_time(tmp_path: Path, template: Path) -> None:
    api = make_service(tmp_path, template)
    upload = begin(api).json()
    good = upload["url"]
    changes = (
        ("/uploads/", "/files/"),
        (f"bytes={len(ROWS)}", f"bytes={len(ROWS) + 1}"),
        (upload["sha256"], hashlib.sha256(OTHER_ROWS).hexdigest()),
        ("expires=1", "expires=2"),
    )
    for old, new in changes:
        assert old in good
        assert error_of(api.http.put(good.replace(old, new), content=ROWS), 403)["code"] == "link_expired"
    parts = urlsplit(good)
    query = dict(pair.split("=") for pair in parts.query.split("&"))
    for method, kept in (("GET", ("expires", "signature")), ("PUT", ("expires", "signature", "bytes", "sha256"))):
        reused = {name: query[name] for name in kept}
        answer = api.http.request(method, parts.path, params=reused, content=ROWS if method == "PUT" else None)
        assert answer.status_code == (403 if method == "GET" else 204), "a link to write is none to read"
    api.database.close()


def test_another_tenants_upload_is_as_unknown_as_one_that_never_was(tmp_path: Path, template: Path) -> None:
    keys = {"a": "a" * 24, "b": "b" * 24}
    api = make_service(tmp_path, template, api_keys=",".join(f"{name}={key}" for name, key in keys.items()))
    as_a, as_b = ({"authorization": f"Bearer {key}"} for key in keys.values())
    body = {"filename": "rows.jsonl", "bytes": len(ROWS), "sha256": hashlib.sha256(ROWS).hexdigest()}
    assert error_of(api.http.post("/files/uploads", json=body), 401)["code"] == "unauthenticated"
    upload = api.http.post("/files/uploads", json=body, headers=as_a).json()
    assert api.http.put(upload["url"], content=ROWS).status_code == 204, "a link carries its own permission"
    route = f"/files/uploads/{upload['id']}/complete"
    theirs = error_of(api.http.post(route, headers=as_b), 404)
    unknown = error_of(api.http.post("/files/uploads/upload-none/complete", headers=as_b), 404)
    assert theirs["code"] == unknown["code"] == "upload_not_found"
    assert api.http.post(route, headers=as_a).status_code == 201
    api.database.close()


def test_a_full_disk_is_503_with_a_remedy_and_keeps_nothing(api: ApiService, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = begin(api).json()
    send(api, upload)
    with monkeypatch.context() as full:
        full.setattr(tempfile, "TemporaryFile", lambda **_: Path("/dev/full").open("w+b"))  # noqa: SIM115
        answers = [
            complete(api, upload),
            *[api.http.post("/files", files={"file": ("rows.jsonl", rows)}) for rows in (ROWS, ROWS * 500)],
        ]
        if isinstance(api.bucket, DirectoryBucket):
            answers.append(send(api, upload))
    for answer in answers:
        error = error_of(answer, 503)
        assert error["code"] == "upload_disk_full" and "GRAFT_STATE_DIR" in error["message"]
        assert answer.headers["retry-after"] == "5"
    assert api.http.get("/files").json()["data"] == []
    assert complete(api, upload).status_code == 201

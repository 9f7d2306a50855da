"""Keys: who may ask, and what each may do."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, RateLimitError
from pydantic import SecretStr, ValidationError

from graft_api.__main__ import Exposed, check_exposure
from graft_api.keys import __main__ as command
from graft_api.keys import ring
from graft_api.keys.making import digest_of, id_of, new_key
from graft_api.keys.scopes import Scope
from graft_api.keys.static import read_keys
from graft_api.settings import ApiSettings
from graft_shared.errors import StoreUnavailable
from graft_shared.logs import configure_logging
from graft_shared.store import Keys
from tests.api_service import ROWS, ApiService, error_of, make_service
from tests.waiting import wait_until

RED, BLUE = "r" * 24, "b" * 24
PEPPER = "p" * 24


@pytest.fixture
def api(tmp_path: Path, template: Path) -> Iterator[ApiService]:
    service = make_service(tmp_path, template, api_keys=f"red={RED}, blue={BLUE}", key_pepper=PEPPER)
    yield service
    service.database.close()


@pytest.fixture
def open_api(tmp_path: Path, template: Path) -> Iterator[ApiService]:
    """A service on loopback for which no key was ever made."""
    service = make_service(tmp_path, template, key_pepper=PEPPER)
    yield service
    service.database.close()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def a_key(api: ApiService, *scopes: Scope, tenant: str = "red", life: timedelta | None = None) -> str:
    """A key of the database, which the API has not heard of."""
    key_id, key = new_key()
    digest = digest_of(key, SecretStr(PEPPER))
    Keys(api.database).add(id=key_id, tenant=tenant, digest=digest, scopes=scopes, name="", life=life)
    return key


def status(api: ApiService, key: str, path: str = "/jobs") -> int:
    answer: int = api.http.get(path, headers=bearer(key)).status_code
    return answer


OPEN_ROUTES = {"/healthz", "/readyz", "/objects/{key}"}  # what lies under /objects is signed

# What each route needs, beside that its caller is known. A route that stands in neither place fails the test.
SCOPES = {
    "jobs:read": {
        ("get", "/jobs"),
        ("post", "/jobs/estimate"),
        ("get", "/jobs/{job_id}"),
        ("get", "/jobs/{job_id}/events"),
        ("get", "/jobs/{job_id}/checkpoints"),
        ("get", "/jobs/{job_id}/metrics"),
        ("get", "/jobs/{job_id}/logs"),
        ("get", "/jobs/{job_id}/adapter"),
        ("get", "/jobs/{job_id}/adapter/archive"),
        ("get", "/jobs/{job_id}/report"),
        ("get", "/jobs/{job_id}/merged"),
        ("get", "/jobs/{job_id}/merged/archive"),
        ("get", "/jobs/{job_id}/webhooks"),
        ("get", "/v1/fine_tuning/jobs"),
        ("get", "/v1/fine_tuning/jobs/{job_id}"),
        ("get", "/v1/fine_tuning/jobs/{job_id}/events"),
        ("get", "/v1/fine_tuning/jobs/{job_id}/checkpoints"),
        ("get", "/v1/models"),
        ("get", "/v1/models/{model}"),
    },
    "jobs:write": {
        ("post", "/jobs"),
        ("delete", "/jobs/{job_id}"),
        ("post", "/jobs/{job_id}/cancel"),
        ("post", "/jobs/{job_id}/pause"),
        ("post", "/jobs/{job_id}/resume"),
        ("post", "/jobs/{job_id}/merged"),
        ("delete", "/jobs/{job_id}/merged"),
        ("post", "/v1/fine_tuning/jobs"),
        ("post", "/v1/fine_tuning/jobs/{job_id}/cancel"),
        ("post", "/v1/fine_tuning/jobs/{job_id}/pause"),
        ("post", "/v1/fine_tuning/jobs/{job_id}/resume"),
    },
    "files:read": {
        ("get", "/files"),
        ("get", "/files/{file_id}"),
        ("get", "/files/{file_id}/content"),
        ("get", "/files/{file_id}/report"),
        ("get", "/v1/files"),
        ("get", "/v1/files/{file_id}"),
        ("get", "/v1/files/{file_id}/content"),
    },
    "files:write": {
        ("post", "/files"),
        ("post", "/files/uploads"),
        ("post", "/files/uploads/{upload_id}/complete"),
        ("delete", "/files/{file_id}"),
        ("post", "/v1/files"),
        ("delete", "/v1/files/{file_id}"),
    },
    "webhooks": {("get", "/webhooks/secret"), ("post", "/webhooks/test")},
    "metrics": {("get", "/metrics")},
}
NO_SCOPE = {("get", "/models"), ("get", "/models/{base_model}"), ("get", "/capacity")}


def routes(api: ApiService) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, operations in api.http.get("/openapi.json").json()["paths"].items():
        for method, operation in operations.items():
            yield method, path, operation


def needed(method: str, path: str) -> str | None:
    found = [scope for scope, of_scope in SCOPES.items() if (method, path) in of_scope]
    assert found or (method, path) in NO_SCOPE, f"{method} {path}: say in this file which scope it needs"
    return found[0] if found else None


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("x" * 24),
        bearer(""),
        {"authorization": f"Basic {RED}"},
        bearer(f"graft_{'a' * 12}_{'b' * 43}"),
        bearer("é" * 24),
    ],
)
def test_without_a_valid_key_every_route_but_health_and_the_document_refuses(
    api: ApiService, headers: dict[str, str]
) -> None:
    sent = {name: value.encode() for name, value in headers.items()}
    for method, path, _ in routes(api):
        answer = api.http.request(method, path.replace("{", "").replace("}", ""), headers=sent)
        if path in OPEN_ROUTES:
            assert answer.status_code != 401, path
        else:
            error = error_of(answer, 401)
            assert error["code"] == "unauthenticated", (method, path)
            assert set(error) == {"message", "type", "param", "code"}, "it tells nothing of the key"
            assert answer.headers["www-authenticate"] == "Bearer"


def test_each_route_needs_the_scope_that_the_document_names(api: ApiService) -> None:
    held = {scope: a_key(api, scope) for scope in Scope}
    lacking = {scope: a_key(api, *(other for other in Scope if other is not scope)) for scope in Scope}
    of_all = [route for route in routes(api) if route[1] not in OPEN_ROUTES]
    named = {(method, path) for method, path, _ in of_all}
    assert named == set().union(*SCOPES.values()) | NO_SCOPE
    for method, path, operation in of_all:
        scope = needed(method, path)
        assert operation["security"] == [{"HTTPBearer": [scope] if scope else []}], (method, path)
        assert {"401", "403", "429"} <= set(operation["responses"]), (method, path)
        url = path.replace("{", "").replace("}", "")
        if scope is None:
            assert api.http.request(method, url, headers=bearer(held[Scope.METRICS])).status_code in (200, 404)
            continue
        assert api.http.request(method, url, headers=bearer(held[Scope(scope)])).status_code not in (401, 403)
        refused = api.http.request(method, url, headers=bearer(lacking[Scope(scope)]), content=b"{")
        error = error_of(refused, 403)
        assert (error["code"], error["scope"], scope in error["message"]) == ("insufficient_scope", scope, True)
        assert refused.headers["www-authenticate"] == f'Bearer error="insufficient_scope", scope="{scope}"'


def test_a_key_is_kept_as_a_digest_that_needs_the_pepper(api: ApiService) -> None:
    key = a_key(api, Scope.JOBS_READ)
    (stored,) = Keys(api.database).list()
    assert stored.id == id_of(key)
    assert stored.digest == hmac.new(PEPPER.encode(), key.encode(), "sha256").hexdigest()
    assert stored.digest != digest_of(key, SecretStr("q" * 24))
    assert status(api, key) == 200
    assert status(api, key[:-1] + ("A" if key[-1] != "A" else "B")) == 401


def test_keys_that_have_expired_are_refused_and_those_that_are_revoked_within_seconds(api: ApiService) -> None:
    short, long = a_key(api, Scope.JOBS_READ, life=timedelta(seconds=1)), a_key(api, Scope.JOBS_READ)
    assert (status(api, short), status(api, long)) == (200, 200)
    wait_until(lambda: status(api, short) == 401, seconds=5, what="the end of its life", every=0.1)
    Keys(api.database).revoke(str(id_of(long)))
    wait_until(lambda: status(api, long) == 401, seconds=3, what="its revocation", every=0.1)


def test_a_key_that_was_just_made_is_known_at_once(api: ApiService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "NEWS_SECONDS", 0.0)
    assert status(api, a_key(api, Scope.JOBS_READ)) == 200
    assert status(api, a_key(api, Scope.JOBS_READ)) == 200


def test_requests_do_not_ask_the_database_for_their_key(api: ApiService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "FRESH_SECONDS", 600.0)
    monkeypatch.setattr(ring, "NEWS_SECONDS", 600.0)
    looks, live = [], Keys.live
    monkeypatch.setattr(Keys, "live", lambda keys: looks.append(1) or live(keys))
    key, stranger = a_key(api, Scope.JOBS_READ), new_key()[1]
    assert [status(api, key) for _ in range(20)] == [200] * 20
    assert [status(api, stranger) for _ in range(20)] == [401] * 20, "nor can strangers make it ask"
    assert len(looks) == 1


def test_while_the_database_is_away_known_keys_hold_for_a_while_and_then_nobodys(
    api: ApiService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "FRESH_SECONDS", 0.0)
    key = a_key(api)

    def away(_: Keys) -> list[Any]:
        raise StoreUnavailable(reason="it is away")

    assert status(api, key, "/capacity") == 200
    monkeypatch.setattr(Keys, "live", away)
    assert status(api, key, "/capacity") == 200
    assert status(api, new_key()[1], "/capacity") == 401
    monkeypatch.setattr(ring, "STALE_SECONDS", 0.0)
    assert error_of(api.http.get("/capacity", headers=bearer(key)), 503)["code"] == "store_unavailable"
    assert status(api, RED, "/capacity") == 200, "those of the settings need no database"


def test_when_a_key_was_used_is_written_down_once_in_a_long_while(
    api: ApiService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "FRESH_SECONDS", 0.0)
    marked, mark = [], Keys.mark_used
    monkeypatch.setattr(Keys, "mark_used", lambda keys, ids: marked.append(ids) or mark(keys, ids))
    key = a_key(api)
    for _ in range(5):
        assert status(api, key, "/models") == 200
    assert marked == [[id_of(key)]]
    assert Keys(api.database).list()[0].last_used_at is not None


def test_the_first_key_closes_a_service_that_was_open_and_the_last_does_not_open_it(
    open_api: ApiService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "FRESH_SECONDS", 0.0)
    assert open_api.http.get("/jobs").status_code == 200
    key = a_key(open_api, Scope.JOBS_READ, tenant="default")
    assert error_of(open_api.http.get("/jobs"), 401)["code"] == "unauthenticated"
    assert status(open_api, key) == 200
    Keys(open_api.database).revoke(str(id_of(key)))
    assert (status(open_api, key), open_api.http.get("/jobs").status_code) == (401, 401)


FOREIGN = [
    {"host": "rebound.example:8000"},
    {"host": "127.0.0.1.rebound.example"},
    {"host": "localhost.rebound.example"},
    {"host": "[::1"},
    {"host": ""},
]
FOREIGN_PAGES = [
    {"origin": "https://elsewhere.example"},
    {"origin": "http://127.0.0.1.elsewhere.example:8000"},
    {"origin": "null"},
    {"sec-fetch-site": "cross-site"},
]
OWN = [
    {"host": "localhost:8000"},
    {"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"},
    {"host": "127.8.9.10"},
    {"host": "[::1]:8000"},
    {"host": "127.0.0.1:8000", "origin": "http://localhost:3000", "sec-fetch-site": "cross-site"},
]


@pytest.mark.parametrize("pepper", [None, PEPPER])
def test_without_keys_no_page_of_elsewhere_may_read_or_change_anything(
    tmp_path: Path, template: Path, pepper: str | None
) -> None:
    api = make_service(tmp_path, template, key_pepper=pepper)
    for headers in (*FOREIGN, *FOREIGN_PAGES):
        for sent in (headers, {**headers, **bearer("none")}):
            error = error_of(api.http.post("/files", files={"file": ("rows.jsonl", ROWS)}, headers=sent), 403)
            assert (error["code"], "graft keys create" in error["message"]) == ("foreign_caller", True), headers
    for method, path, _ in routes(api):
        answer = api.http.request(method, path.replace("{", "").replace("}", ""), headers=FOREIGN[0])
        if path in OPEN_ROUTES:
            assert answer.status_code in (200, 422), (path, "nobody's secret, or signed")
        else:
            assert error_of(answer, 403)["code"] == "foreign_caller", (method, path)
    for headers in FOREIGN_PAGES:
        assert api.http.get("/jobs", headers=headers).status_code == 200, "a browser keeps the answer from its page"
    for headers in OWN:
        assert api.http.post("/files", files={"file": ("rows.jsonl", ROWS)}, headers=headers).status_code == 201
    assert len(api.http.get("/files").json()["data"]) == len(OWN)
    api.database.close()


def test_with_a_key_a_request_may_come_from_anywhere_under_any_name(api: ApiService) -> None:
    for headers in (*FOREIGN, *FOREIGN_PAGES):
        sent = {**headers, **bearer(RED)}
        assert api.http.post("/files", files={"file": ("rows.jsonl", ROWS)}, headers=sent).status_code == 201, headers
        assert error_of(api.http.get("/jobs", headers=headers), 401)["code"] == "unauthenticated"


def test_strangers_are_let_in_nowhere_but_on_loopback(
    open_api: ApiService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = ApiSettings(state_dir=tmp_path, key_pepper=PEPPER)
    with pytest.raises(Exposed, match="keys create"):
        check_exposure("0.0.0.0", settings)
    key = a_key(open_api)
    check_exposure("0.0.0.0", settings)
    with pytest.raises(Exposed, match="GRAFT_KEY_PEPPER"):
        check_exposure("0.0.0.0", ApiSettings(state_dir=tmp_path))
    Keys(open_api.database).revoke(str(id_of(key)))
    with pytest.raises(Exposed, match="keys create"):
        check_exposure("0.0.0.0", settings)
    (tmp_path / "graft.db").unlink()
    with pytest.raises(Exposed, match="cannot be told"):
        check_exposure("0.0.0.0", settings)


def test_no_key_comes_into_the_log(api: ApiService, capsys: pytest.CaptureFixture[str], restored_logging: None) -> None:
    configure_logging("json", level="DEBUG")
    key, wrong = a_key(api, Scope.JOBS_READ), new_key()[1]
    for each in (key, wrong, RED, f"{RED}x"):
        for path in ("/jobs", "/files", "/nowhere", "/jobs?after=x", "/metrics"):
            api.http.get(path, headers=bearer(each))
    said = capsys.readouterr()
    assert "request_answered" in said.err
    for secret in (key, wrong, RED, key.split("_", 2)[2], PEPPER):
        assert secret not in said.err + said.out
    assert key not in repr(api.settings) and PEPPER not in repr(api.settings)


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def operator(
    api: ApiService,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    restored_logging: None,
) -> Callable[..., str]:
    """The operator's command, beside the API."""
    monkeypatch.setenv("GRAFT_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("GRAFT_KEY_PEPPER", PEPPER)

    def run(*arguments: str) -> str:
        command.main(arguments)
        return capsys.readouterr().out

    return run


def test_the_operator_makes_lists_and_revokes_keys(api: ApiService, operator: Callable[..., str]) -> None:
    key = operator("create", "red", "--scope", "jobs:read", "--days", "30", "--name", "ci of search").strip()
    usual = operator("create", "blue").strip()
    assert status(api, key) == 200 and status(api, usual, "/files") == 200
    assert status(api, key, "/files") == status(api, usual, "/metrics") == 403
    listed = operator("list")
    assert "ci of search" in listed and "jobs:read" in listed and "live" in listed
    assert key not in listed and key.split("_", 2)[2] not in listed
    assert str(id_of(key)) in operator("revoke", str(id_of(key)))
    assert "revoked" in operator("list")
    wait_until(lambda: status(api, key) == 401, seconds=3, what="its revocation", every=0.1)
    assert status(api, usual) == 200


def test_the_log_says_what_a_key_may_do_in_the_words_of_the_command(
    operator: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRAFT_LOG_FORMAT", "text")
    command.main(["create", "red"])
    said = capsys.readouterr().err
    assert "key_created" in said and "'jobs:write'" in said and "Scope." not in said


@pytest.mark.parametrize(
    "arguments",
    [
        ("create", "re d"),
        ("create", "red", "--scope", "everything"),
        ("create", "red", "--days", "0"),
        ("revoke", "nothing"),
        (),
    ],
)
def test_what_the_operator_writes_wrong_makes_no_key(
    api: ApiService, operator: Callable[..., str], arguments: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as ended:
        operator(*arguments)
    assert ended.value.code == 2
    assert Keys(api.database).list() == []


def test_without_a_pepper_or_with_one_that_can_be_guessed_there_are_no_keys(
    operator: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for pepper, said in (("", "GRAFT_KEY_PEPPER"), ("short", "24 or more characters")):
        monkeypatch.setenv("GRAFT_KEY_PEPPER", pepper)
        with pytest.raises(SystemExit):
            operator("create", "red")
        assert said in capsys.readouterr().err
    with pytest.raises(ValidationError):
        ApiSettings(key_pepper="short")


def test_requests_above_the_rate_are_refused_with_the_time_to_wait(tmp_path: Path, template: Path) -> None:
    api = make_service(tmp_path, template, api_keys=f"red={RED}, blue={BLUE}", requests_per_minute=3)
    answers = [api.http.get("/jobs", headers=bearer(RED)) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["2", "1", "0", "0"]
    error = error_of(answers[-1], 429)
    assert (error["code"], error["type"], error["limit"]) == ("rate_limited", "rate_limit_error", 3)
    wait = int(answers[-1].headers["retry-after"])
    assert 50 <= wait <= 60 and error["retry_after_seconds"] == wait
    assert answers[-1].headers["x-ratelimit-limit-requests"] == "3"
    assert answers[-1].headers["x-ratelimit-reset-requests"] == f"{wait}s"
    assert "x-should-retry" not in answers[-1].headers, "so that OpenAI's client waits and tries again"
    assert api.http.get("/jobs", headers=bearer(BLUE)).status_code == 200, "it is counted by tenant"
    assert api.http.get("/healthz").status_code == 200
    api.database.close()


def test_openais_client_waits_as_long_as_it_is_told_and_not_where_waiting_is_no_use(
    tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = make_service(tmp_path, template, requests_per_minute=2, quota_stored_bytes=1)
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    async def ask() -> None:
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app=api.http.app))
        client = AsyncOpenAI(base_url="http://localhost/v1", api_key="none", max_retries=1, http_client=http)
        with pytest.raises(RateLimitError, match="stores 0 of the 1 bytes"):
            await client.files.create(file=b"{}" * 20_000, purpose="fine-tune")
        assert waited == []
        await client.models.list()
        with pytest.raises(RateLimitError, match="2 requests a minute"):
            await client.models.list()

    monkeypatch.setattr("openai._base_client.anyio.sleep", sleep)
    asyncio.run(ask())
    assert len(waited) == 1 and 50 <= waited[0] <= 60
    api.database.close()


def test_quotas_are_refused_with_their_numbers(tmp_path: Path, template: Path) -> None:
    quotas = {"quota_queued_jobs": 1, "quota_stored_bytes": 40, "quota_gpu_hours": 1000}
    api = make_service(tmp_path, template, **quotas)
    spec = api.spec()
    assert api.post(spec).status_code == 202
    full = api.post(spec)
    error = error_of(full, 429)
    assert (error["code"], error["quota"], error["limit"], error["used"]) == ("quota_exceeded", "queued_jobs", 1, 1)
    assert full.headers["retry-after"] == "30" and "x-should-retry" not in full.headers
    too_much = api.upload()
    error = error_of(too_much, 429)
    assert (error["quota"], error["limit"], error["used"], error["param"]) == ("stored_bytes", 40, 32, "file")
    assert too_much.headers["x-should-retry"] == "false" and "retry-after" not in too_much.headers
    assert api.files.lost_uploads(limit=10) != [], "what had been written is swept"
    compatible = {"model": spec["base_model"], "training_file": spec["dataset"]["file"]}
    assert error_of(api.http.post("/v1/fine_tuning/jobs", json=compatible), 429)["quota"] == "queued_jobs"
    api.database.close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("red", "tenant=key"),
        (f"re d={RED}", "tenant=key"),
        ("red=short", "24 or more"),
        (",", "holds no key"),
        (" ", "holds no key"),
        (f"red={RED},blue={RED}", "same key"),
        (f"red=graft_{'a' * 12}_{'b' * 43}", "could then not be revoked"),
    ],
)
def test_keys_that_are_written_wrong_are_refused_and_not_shown(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        read_keys(text)
    assert RED not in str(refused.value)


def test_a_tenant_may_have_two_keys_so_that_one_can_be_changed() -> None:
    assert read_keys(f"red={RED},red={BLUE},") == {RED: "red", BLUE: "red"}
    assert read_keys("") == {}

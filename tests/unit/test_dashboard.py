"""The dashboard's files: who may read them, under which headers, and that they fit together and to the API."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from graft_api.dashboard.files import FOLDER, static_files
from graft_shared.jobs import JobStatus
from graft_shared.specs import JobSpec
from tests.api_service import ApiService, error_of, make_service

SCRIPTS = sorted(name for name in static_files() if name.endswith(".js"))


@pytest.fixture
def api(tmp_path: Path, template: Path) -> Iterator[ApiService]:
    service = make_service(tmp_path, template, api_keys=f"red={'r' * 24}")
    yield service
    service.database.close()


def test_the_page_is_anybodys_and_the_api_behind_it_is_not(api: ApiService) -> None:
    page = api.http.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert error_of(api.http.get("/jobs"), 401)["code"] == "unauthenticated"
    assert "/dashboard/{path}" not in api.http.get("/openapi.json").json()["paths"], "it is no part of the API"


@pytest.mark.parametrize("name", ["index.html", *SCRIPTS, "styles/base.css", "icon.svg"])
def test_nothing_inline_and_nothing_from_elsewhere_may_run(api: ApiService, name: str) -> None:
    answer = api.http.get(f"/dashboard/{name}")
    policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert {policy[source] for source in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
    assert policy["require-trusted-types-for"] == "'script'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_a_file_that_is_known_is_not_sent_again(api: ApiService) -> None:
    first = api.http.get("/dashboard/app.js")
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers["etag"]
    again = api.http.get("/dashboard/app.js", headers={"if-none-match": f'"another", W/{tag}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert "content-security-policy" in again.headers
    assert api.http.get("/dashboard/app.js", headers={"if-none-match": '"another"'}).content == first.content
    tags = [file.etag for file in static_files().values()]
    assert len(set(tags)) == len(tags)


@pytest.mark.parametrize(
    "path",
    [
        "%2e%2e/endpoints.py",
        "pages/%2e%2e/%2e%2e/files.py",
        "%2fetc%2fpasswd",
        "/etc/passwd",
        "%2e/app.js",
        "pages",
        "",
        "app.js/",
        "APP.JS",
        "app.js%00",
    ],
)
def test_what_is_no_file_of_it_has_no_address(api: ApiService, path: str) -> None:
    assert error_of(api.http.get(f"/dashboard/{path}"), 404)["code"] == "route_not_found"


def test_every_file_that_another_names_is_there() -> None:
    for name, file in static_files().items():
        text = file.content.decode()
        named = re.findall(r'(?:href|src)="/dashboard/([^"]+)"', text) if name.endswith(".html") else []
        for path in re.findall(r'\bfrom "([^"]+)";', text):
            named.append(_joined(PurePosixPath(name).parent, path))
        assert set(named) <= set(static_files()), name


def test_no_script_makes_markup_of_text_or_asks_elsewhere() -> None:
    for name in SCRIPTS:
        text = (FOLDER / name).read_text()
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new EventSource", text
        ), name
        assert re.findall(r"https?://[^\"'` ]+", text.replace("http://www.w3.org/2000/svg", "")) == [], name


def test_the_form_and_the_filter_know_the_words_of_the_api() -> None:
    sections = JobSpec.model_json_schema(by_alias=True)["$defs"]
    known = set(JobSpec.model_fields)
    for section, part in (
        ("dataset", "DatasetSource"),
        ("validation", "Validation"),
        ("quantization", "Quantization"),
        ("lora", "Lora"),
        ("training", "Training"),
        ("gpu", "Gpu"),
    ):
        known |= {f"{section}.{name}" for name in sections[part]["properties"]}
    named = re.findall(r'\bname: "([^"]+)"', (FOLDER / "submit/fields.js").read_text())
    assert len(named) > 20 and set(named) <= known
    filtered = re.search(r"const STATUSES = \[(.*?)\];", (FOLDER / "pages/jobs.js").read_text(), re.S)
    assert filtered is not None
    assert re.findall(r'"([a-z_]+)"', filtered[1]) == [status.value for status in JobStatus]


def _joined(folder: PurePosixPath, path: str) -> str:
    parts: list[str] = []
    for part in (folder / path).parts:
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)

"""The dashboard in a real browser, on a real service: what its user does and sees, and that everybody can."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, CDPSession, Locator, Page, Route, expect, sync_playwright
from sqlalchemy import insert, select

from graft_shared.ids import new_job_id
from graft_shared.jobs import Phase, Stage
from graft_shared.store import Leases, tables
from graft_shared.store.migrate import migrate
from tests.api_process import ApiProcess
from tests.api_service import ApiService
from tests.factories import make_tiny_base
from tests.fleet import JSONL, Fleet, a_job
from tests.store_factories import a_new_job
from tests.waiting import wait_until

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
KEY = "k" * 24
MANY = 1000
WORK_FOR_MANY = 2.0  # seconds of a core, of API and page together: the clock tells more of what else runs here
STEPS = 60
WIDTH, PHONE = 1280, 390
PATIENCE = 60_000  # ms: the job trains on the same cores
SERIOUS = ("serious", "critical")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    state = tmp_path_factory.mktemp("fleet") / "state"
    make_tiny_base(state / "models" / "graft" / "tiny")
    running = Fleet(state, {"GRAFT_HEARTBEAT_SECONDS": "2", "GRAFT_LOOK_SECONDS": "2"}).start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def succeeded(fleet: Fleet) -> str:
    """A job that has ended well."""
    job = fleet.wait(fleet.post(a_job(fleet, name="<b>animals</b>", training={"max_steps": 20}))["id"])
    assert job["status"] == "succeeded", job["error"]
    return str(job["id"])


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": WIDTH, "height": 900})
    yield from _watched(context)


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[tuple[ApiProcess, ApiService]]:
    """An API that wants a key, and the store behind it."""
    process = ApiProcess(tmp_path, GRAFT_API_KEYS=f"default={KEY}")
    service = process.service(KEY)
    migrate(service.database)
    yield process.start(), service
    service.http.close()
    service.database.close()
    process.stop()


def _watched(context: BrowserContext) -> Iterator[Page]:
    """A page whose scripts may not fail and whose policy may not be broken."""
    page = context.new_page()
    broken: list[str] = []
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.on("console", lambda said: broken.append(said.text) if "Content Security Policy" in said.text else None)
    yield page
    context.close()
    assert broken == []


def test_a_job_is_estimated_submitted_watched_downloaded_merged_and_deleted(
    fleet: Fleet, page: Page, tmp_path: Path
) -> None:
    rows = tmp_path / "animals.jsonl"
    rows.write_bytes(JSONL)
    page.goto(f"{fleet.url}/")
    page.get_by_role("navigation").get_by_role("link", name="New job").click()
    page.get_by_label("Base model").fill("graft/tiny")
    expect(page.get_by_text("Fits cpu", exact=True)).to_be_visible(timeout=PATIENCE)
    page.get_by_label("Upload JSONL").set_input_files(rows)
    expect(page.get_by_text("64 rows of the kind prompt_completion")).to_be_visible(timeout=PATIENCE)
    for label, value in {
        "Name": "what animals say",
        "Held out": "0.1",
        "Target modules": "all-linear",
        "At most steps": str(STEPS),
        "Learning rate": "0.005",
        "Longest row": "64",
    }.items():
        page.get_by_label(label, exact=True).fill(value)
    expect(_section(page, "Data")).to_contain_text("0 rows (0 %) at 64 tokens", timeout=PATIENCE)
    expect(_section(page, "Data").locator("mark", has_text="The cat says cat cat.")).to_be_visible()
    assert _grave(page) == []
    page.get_by_role("button", name="Submit job").click()
    expect(page.get_by_role("heading", name="what animals say")).to_be_visible(timeout=PATIENCE)
    loss = page.get_by_role("figure").filter(has_text="Training loss")
    loss.locator("polyline").wait_for(state="attached", timeout=2 * PATIENCE)
    assert page.locator(".head .badge").inner_text().startswith("running"), "the curve is drawn while it trains"
    expect(page.locator(".head .badge")).to_have_text("succeeded", timeout=3 * PATIENCE)
    expect(loss.locator(".reading")).to_contain_text(f"step {STEPS}", timeout=PATIENCE)
    for curve in ("Held-out loss", "Learning rate", "Speed"):
        assert page.get_by_role("figure").filter(has_text=curve).locator("polyline").count() >= 1
    for part in ("base weights", "the process, resident", "The adapter was stored and proven.", "is learnt"):
        expect(page.get_by_text(part).first).to_be_visible(timeout=PATIENCE)
    assert "adapter_model.safetensors" in _downloaded(page, "Download adapter", tmp_path)
    expect(_section(page, "Adapter")).to_contain_text('from_pretrained("path/to/graft/tiny")')
    expect(_section(page, "Adapter")).to_contain_text("vllm serve path/to/graft/tiny ")
    expect(_section(page, "Adapter")).to_contain_text("path/to/graft/tiny stands for the folder")
    merged = _section(page, "Merged model")
    merged.get_by_role("button", name="Merge into the base").click()
    expect(merged.get_by_role("status")).to_have_text("succeeded", timeout=PATIENCE)
    assert "model.safetensors" in _downloaded(page, "Download merged model", tmp_path)
    job_id = page.url.rpartition("/")[2]
    page.get_by_role("button", name="Delete", exact=True).click()
    assert _grave(page) == []
    page.keyboard.press("Enter")  # on what is focused first, which keeps
    page.get_by_role("button", name="Delete", exact=True).click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible(timeout=PATIENCE)
    with fleet.client() as client:
        assert client.get(f"/jobs/{job_id}").status_code == 404


def test_what_cannot_be_done_now_is_told(keyed: tuple[ApiProcess, ApiService], page: Page) -> None:
    process, service = keyed
    job, _ = service.jobs.submit(replace(a_new_job(), tenant="default"))
    _sign_in(page, process)
    page.goto(f"{process.url}/#/jobs/{job.id}")

    def end_it_first(route: Route) -> None:
        service.succeed(job.id)
        route.continue_()

    page.route("**/pause", end_it_first)
    away = {"code": "store_unavailable", "message": "The database does not answer."}
    page.route("**/merged", lambda route: route.fulfill(status=503, json={"error": away}), times=1)
    page.get_by_role("button", name="Pause").click(timeout=PATIENCE)
    told = page.get_by_role("alert")
    expect(told.filter(has_text="409 job_finished")).to_be_visible(timeout=PATIENCE)
    merged = _section(page, "Merged model")
    merge = merged.get_by_role("button", name="Merge into the base")
    expect(merge).to_be_visible(timeout=PATIENCE)
    expect(merged).not_to_contain_text("503")
    merge.click()
    expect(merged).to_contain_text("No live worker merges", timeout=PATIENCE)
    assert Leases(service.database, timedelta(seconds=60)).claim("w", stage=Stage.MERGE, gpu_classes=())
    expect(merged.get_by_role("status")).to_have_text("running · fetching", timeout=PATIENCE)
    page.get_by_role("button", name="Delete", exact=True).click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(told.filter(has_text="409 merged_model_in_use")).to_be_visible(timeout=PATIENCE)
    assert service.jobs.get("default", job.id).id == job.id


def test_a_refusal_says_what_would_fit_and_one_click_takes_it(fleet: Fleet, page: Page) -> None:
    page.goto(f"{fleet.url}/#/new")
    page.get_by_label("Base model").fill("meta-llama/Meta-Llama-3-70B")
    page.get_by_text("More settings").click()
    page.get_by_label("GPU class").fill("24gb")
    expect(page.get_by_text("Does not fit", exact=True)).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text("What it would need at least")).to_be_visible()
    expect(page.get_by_text("margin of the forecast")).to_be_visible()
    page.get_by_role("button", name="gpu.class = ").click()
    expect(page.get_by_text("Fits ", exact=False).first).to_be_visible(timeout=PATIENCE)
    assert page.get_by_label("GPU class").input_value() != "24gb"
    page.get_by_label("Learning rate").fill("7")
    expect(page.get_by_label("Learning rate")).to_have_attribute("aria-invalid", "true", timeout=PATIENCE)


def test_a_report_is_asked_for_once_the_form_rests_and_until_it_is_there(fleet: Fleet, page: Page) -> None:
    file_id = fleet.upload(JSONL, "lengths.jsonl")
    asked: list[str] = []

    def fail_at_first(route: Route) -> None:
        asked.append(route.request.url)
        if len(asked) == 1:
            error = {"code": "too_many_reports", "message": "20 reports of this tenant wait already."}
            route.fulfill(status=429, headers={"retry-after": "3"}, json={"error": error})
        elif len(asked) == 2:
            route.abort()
        else:
            route.continue_()

    page.route("**/report?*", fail_at_first)
    page.goto(f"{fleet.url}/#/new")
    page.get_by_label("Base model").fill("graft/tiny")
    page.get_by_label("Dataset", exact=True).select_option(file_id)
    for length in ("32", "40", "48"):
        with page.expect_response("**/jobs/estimate"):
            page.get_by_label("Longest row").fill(length)
    expect(_section(page, "Data")).to_contain_text("429 too_many_reports", timeout=PATIENCE)
    page.wait_for_timeout(2000)
    assert len(asked) == 1, "it waits for as long as Retry-After says"
    expect(_section(page, "Data")).to_contain_text("at 48 tokens", timeout=PATIENCE)
    assert len(set(asked)) == 1 and "seed" not in asked[0]


def test_a_job_is_paused_resumed_and_cancelled(fleet: Fleet, page: Page) -> None:
    job = fleet.post(a_job(fleet, training={"max_steps": 100_000}))
    page.goto(f"{fleet.url}/#/jobs/{job['id']}")
    badge = page.locator(".head .badge")
    expect(badge).to_contain_text("running", timeout=2 * PATIENCE)
    page.get_by_role("button", name="Pause").click()
    expect(badge).to_have_text("paused", timeout=PATIENCE)
    page.get_by_role("button", name="Resume").click()
    page.get_by_role("button", name="Cancel").click(timeout=PATIENCE)
    expect(badge).to_have_text("cancelled", timeout=PATIENCE)
    assert fleet.get(job["id"])["status"] == "cancelled"


def test_what_a_user_wrote_is_shown_as_text(fleet: Fleet, page: Page, succeeded: str) -> None:
    page.goto(f"{fleet.url}/#/jobs/{succeeded}")
    expect(page.get_by_role("heading", name="<b>animals</b>")).to_be_visible()
    assert page.locator("h1 b").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDTH, PHONE])
def test_axe_finds_nothing_serious_and_nothing_is_wider_than_the_screen(
    fleet: Fleet, browser: Browser, succeeded: str, scheme: Any, width: int
) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 844})
    for page in _watched(context):
        for address, landmark in {
            "/": ".spark polyline",
            f"/jobs/{succeeded}": "mark",
            "/new": "form input",
            "/fleet": "table.fleet",
            f"/compare/{succeeded}/{succeeded}": ".line.second",
        }.items():
            page.goto(f"{fleet.url}/#{address}")
            page.locator(landmark).first.wait_for(state="attached", timeout=PATIENCE)
            assert _grave(page) == [], address
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), address


def test_a_thousand_jobs_are_shown_at_once(keyed: tuple[ApiProcess, ApiService], page: Page) -> None:
    process, service = keyed
    _make_many(service)
    _sign_in(page, process)
    expect(page.get_by_text("25 jobs, and more")).to_be_visible(timeout=PATIENCE)
    thread = page.context.new_cdp_session(page)
    thread.send("Performance.enable", {"timeDomain": "threadTicks"})
    before = _worked(thread) + process.worked_seconds()
    page.get_by_role("combobox", name="Rows").select_option(str(MANY))
    expect(page.get_by_text("1,000 jobs", exact=True)).to_be_visible(timeout=PATIENCE)
    shown = page.evaluate(
        "performance.getEntriesByName('jobs-shown').findLast(({ detail }) => detail === 1000).duration"
    )
    work = _worked(thread) + process.worked_seconds() - before
    print(f"{MANY} jobs: {shown:.0f} ms by the clock, {1000 * work:.0f} ms of work")
    assert page.locator("table.jobs tbody tr").count() == MANY
    assert work < WORK_FOR_MANY
    page.get_by_role("combobox", name="Rows").select_option("25")
    for number in (2, 3):
        page.get_by_role("button", name="Older").press("Enter")
        expect(page.get_by_text(f"Page {number}")).to_be_visible(timeout=PATIENCE)
        expect(page.get_by_role("button", name="Older")).to_be_focused()
    page.get_by_role("combobox", name="Status").select_option("failed")
    expect(page.get_by_text("No job matches.")).to_be_visible(timeout=PATIENCE)


def test_rows_that_leave_a_list_leave_the_page(keyed: tuple[ApiProcess, ApiService], page: Page) -> None:
    process, service = keyed
    _make_many(service)
    page.clock.install()
    _sign_in(page, process)
    rows = page.locator("table.jobs tbody tr")
    page.get_by_role("combobox", name="Rows").select_option(str(MANY))
    page.get_by_role("combobox", name="Status").select_option("validating_files")
    wait_until(lambda: rows.count() == 50, what="50 rows")
    (waiting,) = service.http.get("/jobs", params={"status": "validating_files", "limit": 1}).json()["data"]
    service.jobs.cancel("default", waiting["id"])
    page.clock.fast_forward(5_000)
    wait_until(lambda: rows.count() == 49, what="49 rows")
    assert page.get_by_role("link", name=waiting["id"]).count() == 0
    page.get_by_role("combobox", name="Status").select_option("cancelled")
    wait_until(lambda: rows.count() == 951, what="951 rows")
    newest = service.http.get("/jobs", params={"status": "cancelled", "limit": 100}).json()
    older = service.http.get("/jobs", params={"status": "cancelled", "after": newest["last_id"]}).json()
    for job in (newest["data"][50], older["data"][-1]):
        assert service.http.delete(f"/jobs/{job['id']}").status_code == 200
    page.clock.fast_forward(5_000)
    wait_until(lambda: rows.count() == 950, what="950 rows")
    page.clock.fast_forward(60_000)
    wait_until(lambda: rows.count() == 949, what="949 rows")


def test_a_page_whose_looks_get_no_answer_says_so_until_one_does(
    keyed: tuple[ApiProcess, ApiService], page: Page
) -> None:
    process, service = keyed
    job, _ = service.jobs.submit(replace(a_new_job(), tenant="default"))
    away = {"code": "bucket_unavailable", "message": "The object store does not answer."}
    page.route("**/logs", lambda route: route.fulfill(status=503, json={"error": away}), times=1)
    page.clock.install(time=datetime(2026, 3, 1, 12, 30))
    _sign_in(page, process)
    line = page.get_by_role("status").filter(has_text="; what is shown is from then.")
    for address, heading in {"/": "Jobs", f"/jobs/{job.id}": job.id}.items():
        page.goto(f"{process.url}/#{address}")
        expect(page.get_by_role("heading", name=heading, exact=True)).to_be_visible(timeout=PATIENCE)
        if address.startswith("/jobs/"):
            expect(_section(page, "Log")).to_contain_text("503 bucket_unavailable", timeout=PATIENCE)
            page.clock.fast_forward(15_000)
            expect(_section(page, "Log")).not_to_contain_text("503", timeout=PATIENCE)
        page.context.set_offline(True)
        with page.expect_event("requestfailed", timeout=PATIENCE):
            page.clock.fast_forward(15_000)
        expect(line).to_have_count(0)
        page.clock.fast_forward(15_000)
        expect(line).to_contain_text("No answer since 12:3", timeout=PATIENCE)
        assert _grave(page) == []
        page.context.set_offline(False)
        page.clock.fast_forward(15_000)
        expect(line).to_have_count(0, timeout=PATIENCE)


def test_links_to_an_adapters_files_are_made_anew_before_they_expire(
    keyed: tuple[ApiProcess, ApiService], page: Page
) -> None:
    process, service = keyed
    job, _ = service.jobs.submit(replace(a_new_job(), tenant="default"))
    service.succeed(job.id)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if request.url.endswith("/adapter") else None)
    page.clock.install()
    _sign_in(page, process)
    page.goto(f"{process.url}/#/jobs/{job.id}")
    link = _section(page, "Adapter").get_by_role("link", name="adapter_model.safetensors")
    page.get_by_text("File by file").click(timeout=PATIENCE)
    old = link.get_attribute("href", timeout=PATIENCE)
    page.clock.fast_forward(500_000)
    page.wait_for_timeout(100)
    assert len(asked) == 1
    page.clock.fast_forward(45_000)
    expect(link).not_to_have_attribute("href", str(old), timeout=PATIENCE)


def test_who_has_a_key_signs_in_and_follows_a_job_with_it(keyed: tuple[ApiProcess, ApiService], page: Page) -> None:
    process, service = keyed
    job, _ = service.jobs.submit(replace(a_new_job(), tenant="default"))
    leases = Leases(service.database, timedelta(seconds=60))
    page.goto(process.url)
    page.get_by_label("API key").fill("graft_abc…")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("something other than printable ASCII: copy it anew.")
    page.get_by_label("API key").fill("not a key")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_text("401 unauthenticated")).to_be_visible(timeout=PATIENCE)
    _sign_in(page, process)
    page.get_by_role("link", name=job.id).click()
    expect(page.locator(".head .badge")).to_have_text("validating files", timeout=PATIENCE)
    claimed = leases.claim("w", stage=Stage.PREPARE, gpu_classes=["cpu"])
    assert claimed is not None
    leases.record_phase(job.id, claimed.epoch, Phase.TRAINING)
    for step in (1, 2, 3):
        line = {"step": step, "loss": 3.0 / step}
        leases.record_progress(job.id, claimed.epoch, progress={"step": step}, metrics={}, steps=[line])
        expect(page.get_by_role("figure").filter(has_text="Training loss")).to_contain_text(f"step {step}")
    kept = page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]")
    assert kept == [1, 0, ""]
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("API key")).to_be_visible(timeout=PATIENCE)
    wait_until(lambda: page.evaluate("sessionStorage.length") == 0, seconds=5, what="that the key is forgotten")


def _grave(page: Page) -> list[tuple[str, str]]:
    """What axe finds that keeps somebody out: its rule, and where it is broken first."""
    found = Axe().run(page).response["violations"]
    return [(each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in SERIOUS]


def _section(page: Page, heading: str) -> Locator:
    return page.locator("section").filter(has=page.get_by_role("heading", name=heading, exact=True))


def _downloaded(page: Page, text: str, folder: Path) -> set[str]:
    """Click what downloads an archive, and return the names of the files in its folder."""
    with page.expect_download() as downloading:
        page.get_by_text(text).click()
    downloading.value.save_as(folder / "archive.tar")
    with tarfile.open(folder / "archive.tar") as tar:
        return {Path(name).name for name in tar.getnames()}


def _worked(thread: CDPSession) -> float:
    """Seconds that the page's thread has been on a core, since this was first asked for."""
    metrics = {found["name"]: found["value"] for found in thread.send("Performance.getMetrics")["metrics"]}
    return float(metrics["TaskDuration"])


def _make_many(service: ApiService) -> None:
    """A job in twenty waits, the others have ended; what one row is was decided by the store."""
    waiting, ended = (service.jobs.submit(replace(a_new_job(sha=sha), tenant="default"))[0] for sha in "ab")
    service.jobs.cancel("default", ended.id)
    with service.database.writing() as connection:
        rows = {row["id"]: dict(row) for row in connection.execute(select(tables.jobs)).mappings()}
        copies = [
            rows[waiting.id if number % 20 == 0 else ended.id]
            | {"id": new_job_id(), "created_at": rows[ended.id]["created_at"] + number}
            for number in range(2, MANY)
        ]
        connection.execute(insert(tables.jobs), copies)


def _sign_in(page: Page, process: ApiProcess) -> None:
    page.goto(process.url)
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("heading", name="Jobs").wait_for(timeout=PATIENCE)

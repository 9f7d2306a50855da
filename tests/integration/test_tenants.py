"""Quotas and the fair share, on both databases: what a tenant may have, and that many at once get no more."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event, text

from graft_shared.errors import QuotaExceeded
from graft_shared.jobs import Job, JobState, Stage, StoredObject
from graft_shared.store import Database, Files, JobQuery, Jobs, Leases, Quotas, Tenants, Upload, open_database, tables
from tests.fakes.clock import FakeClock
from tests.invariants import the_claim_was_fair
from tests.store_factories import a_new_job

LEASE = timedelta(days=7)  # longer than any run: nobody renews here
TRAIN: dict[str, Any] = {"stage": Stage.TRAIN, "gpu_classes": ["cpu"]}
MANY = 12  # at once


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(now=datetime(2026, 11, 28, 12, tzinfo=UTC).timestamp())


@pytest.fixture(params=["sqlite", "postgres"])
def timed(request: pytest.FixtureRequest, clock: FakeClock) -> Iterator[Database]:
    """A database of each kind whose clock the test moves."""
    opened = (
        clock.open_sqlite()
        if request.param == "sqlite"
        else clock.open_postgres(request.getfixturevalue("postgres_url"))
    )
    yield opened
    opened.close()


def waiting(database: Database, tenant: str, quotas: Quotas, **spec: Any) -> Job:
    """A job that waits for a worker that trains."""
    jobs, leases = Jobs(database, quotas), Leases(database, LEASE, quotas)
    job, _ = jobs.submit(a_new_job(tenant=tenant, **spec))
    claimed = leases.claim("preparer", stage=Stage.PREPARE, gpu_classes=[])
    assert claimed is not None and claimed.id == job.id
    return leases.hand_to_training(job.id, claimed.epoch, {"report": {}})


def end(leases: Leases, job: Job) -> None:
    leases.settle_success(job.id, job.epoch, adapter={"epoch": job.epoch}, metrics={}, memory={})


def at_once(database: Database, count: int, call: Callable[[Database], Any]) -> list[Any]:
    """Make the same call so often at the same time, from two pools of connections, as two processes would."""
    url = database.engine.url.render_as_string(hide_password=False)
    others = [open_database(url), open_database(url)]

    def one(number: int) -> Any:
        try:
            return call(others[number % 2])
        except QuotaExceeded as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(one, range(count)))
    for other in others:
        other.close()
    return answers


def upload(files: Files, name: str, size: int, tenant: str = "a") -> None:
    stored = StoredObject(key=f"k/{name}", size=size, sha256="0" * 64)
    files.announce(stored.key)
    files.add(id=f"file-{name}", tenant=tenant, filename="rows.jsonl", object=stored, report={})


def test_many_submissions_at_once_fill_a_queue_and_no_more(database: Database) -> None:
    quotas = Quotas(queued_jobs=5)
    answers = at_once(database, MANY, lambda own: Jobs(own, quotas).submit(a_new_job(tenant="a")))
    refused = [answer for answer in answers if isinstance(answer, QuotaExceeded)]
    assert len(refused) == MANY - 5
    assert refused[0].facts == {"quota": "queued_jobs", "limit": 5, "used": 5, "retry_after_seconds": 30}
    other, is_new = Jobs(database, quotas).submit(a_new_job(tenant="b"))
    assert is_new and other.tenant == "b", "another tenant has places of its own"


def test_many_uploads_at_once_fill_the_room_and_no_more(database: Database) -> None:
    quotas, names = Quotas(stored_bytes=35), iter(range(MANY))
    answers = at_once(database, MANY, lambda own: upload(Files(own, quotas), f"{next(names)}", 10))
    assert sum(isinstance(answer, QuotaExceeded) for answer in answers) == MANY - 3
    files = Files(database, quotas)
    assert sum(file.object.size for file in files.list("a", limit=100)[0]) == 30
    files.require_room("a", 5)
    with pytest.raises(QuotaExceeded, match="30 of the 35 bytes"):
        files.require_room("a", 6)
    files.delete("a", files.list("a")[0][0].id)
    upload(files, "later", 10)


def test_links_count_for_what_they_may_bring_until_they_have_brought_it(database: Database) -> None:
    files = Files(database, Quotas(stored_bytes=35))
    first = an_upload("first", 20)
    files.await_upload(first)
    with pytest.raises(QuotaExceeded, match="20 of the 35 bytes"):
        files.await_upload(an_upload("second", 20))
    with pytest.raises(QuotaExceeded, match="20 of the 35 bytes"):
        upload(files, "other", 20)
    files.await_upload(an_upload("third", 15))
    files.announce("kept")
    kept = StoredObject(key="kept", size=20, sha256="0" * 64)
    files.add(id="file-kept", tenant="a", filename="rows", object=kept, report={}, upload=first)
    with pytest.raises(QuotaExceeded, match="35 of the 35 bytes"):
        files.await_upload(an_upload("fourth", 1))


def an_upload(name: str, size: int) -> Upload:
    announced = StoredObject(key=f"uploads/{name}", size=size, sha256="0" * 64)
    return Upload(id=f"upload-{name}", tenant="a", filename=name, object=announced)


def test_many_claims_at_once_begin_as_many_runs_as_may_be(database: Database) -> None:
    quotas = Quotas(running_jobs=3)
    for tenant in ("a",) * 6 + ("b",) * 6:
        waiting(database, tenant, quotas)
    claims = at_once(database, MANY, lambda own: Leases(own, LEASE, quotas).claim("w", **TRAIN))
    assert Counter(job.tenant for job in claims if job is not None) == {"a": 3, "b": 3}
    leases = Leases(database, LEASE, quotas)
    assert leases.claim("w", **TRAIN) is None
    end(leases, next(job for job in claims if job is not None and job.tenant == "b"))
    following = leases.claim("w", **TRAIN)
    assert following is not None and following.tenant == "b"


def test_one_key_makes_one_job_though_it_takes_the_last_place(database: Database) -> None:
    quotas = Quotas(queued_jobs=1)
    answers = at_once(database, MANY, lambda own: Jobs(own, quotas).submit(a_new_job(tenant="a", key="k")))
    assert len({job.id for job, _ in answers}) == 1
    assert sum(is_new for _, is_new in answers) == 1


def test_preparing_counts_as_queued_and_training_does_not(database: Database) -> None:
    quotas = Quotas(queued_jobs=1)
    jobs, leases = Jobs(database, quotas), Leases(database, LEASE, quotas)
    job = waiting(database, "a", quotas)
    jobs.pause("a", job.id)
    with pytest.raises(QuotaExceeded):
        jobs.submit(a_new_job(tenant="a"))  # a paused job keeps its place, and takes one
    jobs.resume("a", job.id)
    assert leases.claim("w", **TRAIN) is not None
    jobs.submit(a_new_job(tenant="a"))
    assert leases.claim("p", stage=Stage.PREPARE, gpu_classes=[]) is not None
    with pytest.raises(QuotaExceeded):
        jobs.submit(a_new_job(tenant="a"))


def test_a_month_whose_gpu_hours_are_used_up_begins_nothing_and_the_next_one_does(
    timed: Database, clock: FakeClock
) -> None:
    quotas = Quotas(gpu_hours=2.0)
    jobs, leases = Jobs(timed, quotas), Leases(timed, LEASE, quotas)
    for _ in range(3):
        waiting(timed, "a", quotas)
    running = leases.claim("w", **TRAIN)
    assert running is not None
    clock.now += 2 * 3600 + 1
    assert leases.claim("w", **TRAIN) is None, "what is at it counts too"
    end(leases, running)
    (held, *_) = [job for job in jobs.list("a", JobQuery())[0] if job.state is JobState.QUEUED]
    place = jobs.place_in_line(held)
    assert place is not None and place.position is None and place.held_by is not None
    assert (place.held_by.quota, place.held_by.limit) == ("gpu_hours", 2.0)
    with pytest.raises(QuotaExceeded, match=r"used 2.00 of the 2 GPU-hours .* 2026-12-01") as refused:
        jobs.submit(a_new_job(tenant="a"))
    assert refused.value.facts["retry_after_seconds"] == pytest.approx(
        datetime(2026, 12, 1, tzinfo=UTC).timestamp() - clock.now, abs=2
    )
    waiting(timed, "b", quotas)
    other = leases.claim("w", **TRAIN)
    assert other is not None and other.tenant == "b"
    clock.now = datetime(2026, 12, 1, 0, 0, 1, tzinfo=UTC).timestamp()
    assert (following := leases.claim("w", **TRAIN)) is not None and following.tenant == "a"
    assert jobs.submit(a_new_job(tenant="a"))[1]


def test_a_deleted_jobs_gpu_time_stays_used(timed: Database, clock: FakeClock) -> None:
    leases, tenants = Leases(timed, LEASE), Tenants(timed, Quotas())
    job = waiting(timed, "a", Quotas())
    running = leases.claim("w", **TRAIN)
    assert running is not None
    clock.now += 1800
    end(leases, running)
    Jobs(timed).delete("a", job.id)
    with timed.writing() as connection:
        connection.execute(text("delete from jobs"))
    assert tenants.get("a").gpu_hours == pytest.approx(0.5, abs=1e-3)


def test_what_the_operator_says_of_one_tenant_goes_before_the_settings(database: Database) -> None:
    quotas = Quotas(queued_jobs=1, running_jobs=1)
    jobs, tenants = Jobs(database, quotas), Tenants(database, quotas)
    jobs.submit(a_new_job(tenant="a"))
    with pytest.raises(QuotaExceeded):
        jobs.submit(a_new_job(tenant="a"))
    told = tenants.set("a", {"queued_jobs": 2, "share": 3.0})
    assert (told.quotas, told.share, told.queued_jobs) == (Quotas(queued_jobs=2, running_jobs=1), 3.0, 1)
    jobs.submit(a_new_job(tenant="a"))
    assert tenants.set("a", {"queued_jobs": None}).quotas == quotas
    assert tenants.get("a").share == 3.0
    with pytest.raises(QuotaExceeded):
        jobs.submit(a_new_job(tenant="a"))
    assert [use.name for use in tenants.list()] == ["a"]


def test_each_tenant_is_held_to_its_own_limits_whatever_others_may(database: Database) -> None:
    quotas = Quotas(queued_jobs=3)
    jobs, tenants = Jobs(database, quotas), Tenants(database, quotas)
    for tenant, limit in {"low": 1, "high": 4, "none": None}.items():
        tenants.set(tenant, {"queued_jobs": limit, "gpu_hours": 10.0 * (limit or 1)})
    most = {"low": 1, "high": 4, "none": 3, "unheard of": 3}
    for number in range(4):
        for tenant, limit in most.items():
            with nullcontext() if number < limit else pytest.raises(QuotaExceeded, match=f"{limit}"):
                jobs.submit(a_new_job(tenant=tenant))
    tenants.set("high", {"queued_jobs": 100, "gpu_hours": 0.0})
    tenants.set("low", {"queued_jobs": 100})
    with pytest.raises(QuotaExceeded, match="GPU-hours"):
        jobs.submit(a_new_job(tenant="high"))
    jobs.submit(a_new_job(tenant="low"))


def test_while_tenants_wait_each_claim_is_for_the_one_of_which_less_runs(timed: Database, clock: FakeClock) -> None:
    """Whatever each submits, and however long its jobs are."""
    draw, shares, workers = random.Random(7), {"a": 1.0, "b": 1.0, "c": 2.0}, 8
    longest = {"a": 5.0, "b": 50.0, "c": 500.0}  # how long a tenant's jobs are, at most
    for tenant, share in shares.items():
        Tenants(timed, Quotas()).set(tenant, {"share": share})
    leases, running, queued = Leases(timed, LEASE), list[tuple[float, Job]](), Counter[str]()
    for _ in range(30):
        for tenant in shares:
            while queued[tenant] < 2:
                waiting(timed, tenant, Quotas())
                queued[tenant] += 1
        claimed = leases.claim("w", **TRAIN)
        assert claimed is not None
        the_claim_was_fair(claimed.tenant, Counter(job.tenant for _, job in running), shares)
        queued[claimed.tenant] -= 1
        clock.tick()
        running.append((clock.now + draw.uniform(1, longest[claimed.tenant]), claimed))
        if len(running) == workers:
            running.sort(key=lambda each: each[0])
            until, over = running.pop(0)
            clock.now = max(clock.now, until)
            end(leases, over)


def test_on_one_worker_tenants_have_had_as_much_of_it_to_one_job(timed: Database, clock: FakeClock) -> None:
    leases, used, longest = Leases(timed, LEASE), Counter[str](), 90
    lengths = {"a": itertools.cycle([10]), "b": itertools.cycle([longest, 20])}
    for tenant in ("a",) * 18 + ("b",) * 4:
        waiting(timed, tenant, Quotas())
    for _ in range(14):
        claimed = leases.claim("w", **TRAIN)
        assert claimed is not None
        seconds = next(lengths[claimed.tenant])
        clock.now += seconds
        end(leases, claimed)
        used[claimed.tenant] += seconds
        assert abs(used["a"] - used["b"]) <= longest, used
    assert min(used.values()) > longest


def test_nobody_who_has_waited_is_passed_by_for_what_was_used_the_day_before_yesterday(
    timed: Database, clock: FakeClock
) -> None:
    leases = Leases(timed, LEASE)
    waiting(timed, "a", Quotas())
    running = leases.claim("w", **TRAIN)
    assert running is not None
    clock.now += 3600
    end(leases, running)
    clock.now += 86_400
    waiting(timed, "a", Quotas())
    waiting(timed, "b", Quotas())
    first = leases.claim("w", **TRAIN)
    assert first is not None and first.tenant == "b", "a used an hour yesterday"
    end(leases, first)
    clock.now += 2 * 86_400
    for tenant in ("a", "b"):
        waiting(timed, tenant, Quotas())
    following = leases.claim("w", **TRAIN)
    assert following is not None and following.tenant == "a", "whose job is the oldest"


def test_places_in_line_are_the_order_of_the_claims(timed: Database, clock: FakeClock) -> None:
    jobs, leases = Jobs(timed), Leases(timed, LEASE)
    Tenants(timed, Quotas()).set("c", {"share": 2.0})
    for tenant in "aab":
        waiting(timed, tenant, Quotas())
        assert leases.claim("w", **TRAIN) is not None
        clock.now += 7
    line = [waiting(timed, tenant, Quotas()) for tenant in "aaabbbccc"]
    places = {job.id: jobs.place_in_line(job) for job in line}
    for number in range(1, len(line) + 1):
        clock.tick()
        claimed = leases.claim("w", **TRAIN)
        assert claimed is not None
        place = places[claimed.id]
        assert place is not None and place.position == number, claimed.tenant


def test_preparing_is_shared_by_the_time_it_took(timed: Database, clock: FakeClock) -> None:
    jobs, leases = Jobs(timed), Leases(timed, LEASE)
    for tenant in ("a", "a", "a", "b", "b"):
        clock.tick()
        jobs.submit(a_new_job(tenant=tenant))
    served = []
    for _ in range(4):
        claimed = leases.claim("p", stage=Stage.PREPARE, gpu_classes=[])
        assert claimed is not None
        clock.now += 5 if claimed.tenant == "a" else 6
        leases.hand_to_training(claimed.id, claimed.epoch, {"report": {}})
        served.append(claimed.tenant)
    assert served == ["a", "b", "a", "b"]


def test_the_queue_is_claimed_by_one_query_and_ten_thousand_rows_are_no_burden(database: Database) -> None:
    jobs, leases = Jobs(database), Leases(database, LEASE)
    job = waiting(database, "a", Quotas())
    _copies_of(database, job.id, 10_000)
    asked: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda *arguments: asked.append(arguments[2]))
    began = datetime.now(UTC)
    for _ in range(5):
        claimed = leases.claim("w", **TRAIN)
        assert claimed is not None
    seconds = (datetime.now(UTC) - began).total_seconds() / 5
    assert sum("ORDER BY" in statement for statement in asked) == 5
    assert seconds < 1.0, "some tens of milliseconds, on a machine that does nothing else"
    place = jobs.place_in_line(jobs.list("t3", JobQuery(limit=1))[0][0])
    assert place is not None and place.position is not None and place.position > 5000


def _copies_of(database: Database, job_id: str, count: int) -> None:
    """So many rows like this one, of ten tenants."""
    with database.writing() as connection:
        own = {"id", "tenant", "created_at", "idempotency_key"}
        names = ", ".join(column.name for column in tables.jobs.columns if column.name not in own)
        connection.execute(
            text(
                f"with recursive n(i) as (select 1 union all select i + 1 from n where i < {count}) "
                f"insert into jobs (id, tenant, created_at, {names}) "
                f"select 'copy-' || i, 't' || (i % 10), created_at + i * 0.001, {names} "
                f"from jobs, n where jobs.id = :job"
            ),
            {"job": job_id},
        )

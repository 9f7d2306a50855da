"""A hundred jobs at once, and two tenants in one queue: four workers, two APIs, real neighbours, a toy trainer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from graft_shared.jobs import JobEvent
from graft_shared.store import Database, Jobs, open_database
from tests.factories import make_tiny_base
from tests.fleet import JSONL, Cluster, cluster
from tests.invariants import Run, assert_history_holds, waits_beside_an_idle_worker
from tests.waiting import wait_until
from tests.witness import steps_made

ROOT = Path(__file__).parents[2]
WORKERS, PREPARERS = 4, 2
RED, BLUE = "r" * 24, "b" * 24


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("load")
    make_tiny_base(folder / "state" / "models" / "graft" / "tiny")
    environment = {
        "PYTHONPATH": str(ROOT),
        "GRAFT_API_KEYS": f"red={RED},blue={BLUE}",
        "GRAFT_LEASE_SECONDS": "60",
        "GRAFT_HEARTBEAT_SECONDS": "15",
    }
    wanted = {"apis": 2, "trainers_wanted": WORKERS, "preparers": PREPARERS, "api_key": RED}
    with cluster(folder, worker_module="tests.fakes.worker", environment=environment, **wanted) as made:
        yield made


@pytest.fixture
def database(fleet: Cluster) -> Iterator[Database]:
    opened = open_database(fleet.environment["GRAFT_DATABASE_URL"])
    yield opened
    opened.close()


def post_all(fleet: Cluster, specs: list[dict[str, Any]]) -> list[str]:
    """Post them from twenty threads, each request to the next API."""
    with ThreadPoolExecutor(20) as pool:
        return [job["id"] for job in pool.map(fleet.post, specs)]


def toy(fleet: Cluster, file_id: str, *, steps: int, **changes: Any) -> dict[str, Any]:
    witness = {"witness": str(fleet.state_dir), "steps": str(steps)}
    return {"base_model": "graft/tiny", "dataset": {"file": file_id}, "metadata": witness, **changes}


def histories(database: Database, ids: list[str], tenant: str = "red") -> dict[str, list[JobEvent]]:
    jobs = Jobs(database)
    return {job_id: list(jobs.events(tenant, job_id, limit=1000)[0]) for job_id in ids}


def runs_of(history: list[JobEvent], stage: str) -> Iterator[Run]:
    """The runs of one stage; a job can be prepared from its submission on, and trained once it is prepared."""
    times = {event.type: event.created_at.timestamp() for event in history}
    ready, end = ("submitted", "prepared") if stage == "prepare" else ("prepared", "succeeded")
    for event in history:
        if event.type == "claimed" and event.data["stage"] == stage:
            yield Run(
                job_id=event.job_id,
                worker=event.data["worker"],
                ready_at=times[ready],
                claimed_at=event.created_at.timestamp(),
                ended_at=times[end],
            )


def wait_for(fleet: Cluster, key: str, ids: list[str], *, status: str) -> None:
    """Wait until all of a tenant's jobs show this status."""

    def all_show_it() -> bool:
        fleet.api_key = key
        shown: dict[str, str] = {}
        with fleet.client() as client:
            for wanted in (status, "failed"):
                query: dict[str, Any] = {"status": wanted, "limit": 100}
                while True:
                    page = client.get("/jobs", params=query).json()
                    shown |= {job["id"]: job["status"] for job in page["data"]}
                    if not page["has_more"]:
                        break
                    query["after"] = page["last_id"]
        assert "failed" not in {shown.get(job_id) for job_id in ids}
        return all(shown.get(job_id) == status for job_id in ids)

    wait_until(all_show_it, seconds=300, what=f"{len(ids)} jobs that are {status}", every=3.0)


def test_a_hundred_jobs_at_once_are_each_trained_once_and_no_worker_idles_beside_a_waiting_job(
    fleet: Cluster, database: Database
) -> None:
    file_id = fleet.upload(JSONL)
    ids = post_all(fleet, [toy(fleet, file_id, steps=100)] * 100)
    assert len(set(ids)) == 100
    wait_for(fleet, RED, ids, status="succeeded")
    told = histories(database, ids)
    for history in told.values():
        assert_history_holds([{"id": e.id, "type": e.type, "epoch": e.epoch, "data": e.data} for e in history])
        assert history[-1].type == "succeeded"
    trained = [run for history in told.values() for run in runs_of(history, "train")]
    prepared = [run for history in told.values() for run in runs_of(history, "prepare")]
    assert Counter(run.job_id for run in trained) == dict.fromkeys(ids, 1)
    assert len({run.worker for run in trained}) == WORKERS
    assert len({run.worker for run in prepared}) == PREPARERS
    steps = Counter((step.job_id, step.number) for step in steps_made(fleet.state_dir))
    assert steps == {(job_id, number): 1 for job_id in ids for number in range(1, 101)}, "each made each step once"
    for runs in (prepared, trained):
        assert waits_beside_an_idle_worker(runs, longer_than=1.0) == []


def test_priorities_and_fairness_hold_between_two_tenants(fleet: Cluster, database: Database) -> None:
    """Fifty jobs of red are queued before fifty of blue, ten of each are urgent; only then do workers come."""
    for number in range(WORKERS):
        fleet.stop_worker(f"train-{number}")
    ids: dict[str, list[str]] = {}
    urgent: set[str] = set()
    for tenant, key in (("red", RED), ("blue", BLUE)):
        fleet.api_key = key
        file_id = fleet.upload(JSONL)
        ids[tenant] = post_all(fleet, [toy(fleet, file_id, steps=5)] * 40)
        high = post_all(fleet, [toy(fleet, file_id, steps=5, priority="high")] * 10)
        ids[tenant] += high
        urgent |= set(high)
    for tenant, key in (("red", RED), ("blue", BLUE)):
        wait_for(fleet, key, ids[tenant], status="queued")
    for number in range(WORKERS):
        fleet.start_worker(f"train-{number}")
    for tenant, key in (("red", RED), ("blue", BLUE)):
        wait_for(fleet, key, ids[tenant], status="succeeded")
    told = histories(database, ids["red"]) | histories(database, ids["blue"], "blue")
    claims = sorted((run for history in told.values() for run in runs_of(history, "train")), key=lambda r: r.claimed_at)
    order = [run.job_id for run in claims]
    assert len(order) == 100
    assert set(order[:20]) == urgent, "urgent jobs are taken before all others"
    for part in (order[:20], order[20:]):
        for length in range(1, len(part) + 1):
            reds = sum(job_id in ids["red"] for job_id in part[:length])
            assert abs(2 * reds - length) <= WORKERS, "neither tenant is ever further ahead than there are workers"

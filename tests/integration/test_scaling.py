"""How many workers KEDA is told to want, held against the claims that the store would let them have."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import insert, select

from graft_shared.defaults import load_capacity
from graft_shared.jobs import Failure, FailureReason, Stage
from graft_shared.store import Database, Jobs, Leases, Quotas, Tenants, Workers, open_database
from graft_shared.store.engine import day_began
from graft_shared.store.migrate import migrate
from graft_shared.store.tables import worker_time
from tests.deployed import ROOT, chart_values, render
from tests.store_factories import a_beat, a_new_job

LEASE = timedelta(seconds=60)
QUOTAS = Quotas(running_jobs=2, gpu_hours=10)  # those of ci/ingress-keda.yaml
WORKERS = {"small-1": "24gb", "small-2": "24gb", "big-1": "80gb", "big-2": "80gb"}
TENANTS = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def queries() -> dict[str, str]:
    """What KEDA asks for each class."""
    scaled = [each for each in render(chart_values("ingress-keda")) if each["kind"] == "ScaledObject"]
    return {
        each["metadata"]["name"].removeprefix("graft-worker-"): each["spec"]["triggers"][0]["metadata"]["query"]
        for each in scaled
    }


@pytest.fixture
def fleet(postgres_url: str) -> Iterator[Database]:
    database = open_database(postgres_url)
    migrate(database)
    for name, gpu_class in WORKERS.items():
        Workers(database).beat(**a_beat(name, gpu_class=gpu_class))
    yield database
    database.close()


def wanted(database: Database, query: str) -> int:
    """The answer as KEDA gets it: one number, over a connection that is not ours."""
    url = database.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url) as connection:
        ((number,),) = connection.execute(query.encode()).fetchall()
    return int(number)


def add_job(database: Database, tenant: str, gpu_class: str) -> str:
    job, _ = Jobs(database).submit(a_new_job(tenant=tenant, gpu_class=gpu_class))
    claimed = Leases(database, LEASE).claim("preparer/prepare", stage=Stage.PREPARE, gpu_classes=[])
    assert claimed is not None
    Leases(database, LEASE).hand_to_training(job.id, claimed.epoch, {"report": {}})
    return job.id


def train(database: Database, tenant: str, hours: float, *, days_ago: int) -> None:
    """Have it that a tenant has trained for so long on that day."""
    with database.writing() as connection:
        day = connection.execute(select(day_began())).scalar_one() - days_ago * 86400
        used = {"tenant": tenant, "stage": "train", "day": day, "seconds": hours * 3600}
        connection.execute(insert(worker_time).values(used))


def claim(database: Database, worker: str, *classes: str) -> Any:
    return Leases(database, LEASE, QUOTAS).claim(f"{worker}/train", stage=Stage.TRAIN, gpu_classes=list(classes))


def test_nothing_waits_and_nobody_is_wanted(fleet: Database, queries: dict[str, str]) -> None:
    assert {name: wanted(fleet, query) for name, query in queries.items()} == {"24gb": 0, "80gb": 0}


def test_a_worker_that_trains_counts_where_it_runs_whatever_class_its_job_is_of(
    fleet: Database, queries: dict[str, str]
) -> None:
    add_job(fleet, "a", "24gb")
    assert claim(fleet, "big-1", "80gb", "24gb") is not None
    assert {name: wanted(fleet, query) for name, query in queries.items()} == {"24gb": 0, "80gb": 1}


def test_jobs_that_are_paused_wait_for_a_retry_or_are_being_prepared_want_nobody(
    fleet: Database, queries: dict[str, str]
) -> None:
    Jobs(fleet).pause("a", add_job(fleet, "a", "24gb"))
    add_job(fleet, "b", "24gb")
    failed = claim(fleet, "small-1", "24gb")
    Leases(fleet, LEASE).settle_failure(failed.id, failed.epoch, Failure(reason=FailureReason.CRASH, message="x"))
    Jobs(fleet).submit(a_new_job(tenant="c", gpu_class="24gb"))
    assert wanted(fleet, queries["24gb"]) == 0


@pytest.mark.parametrize("seed", range(4))
def test_as_many_are_wanted_as_would_get_a_job(fleet: Database, queries: dict[str, str], seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(16):
        add_job(fleet, chance.choice(TENANTS), "24gb")
    for tenant in TENANTS:
        if chance.random() < 0.5:
            limits = {"running_jobs": chance.choice([None, 0, 1, 3, 9]), "gpu_hours": chance.choice([None, 1, 30])}
            Tenants(fleet, QUOTAS).set(tenant, limits)
        train(fleet, tenant, chance.choice([0.5, 5, 20]), days_ago=0)
        train(fleet, tenant, 100, days_ago=70)  # in another month, which has its own hours
    running = [claim(fleet, worker, "24gb") for worker in chance.sample(sorted(WORKERS), chance.randrange(4))]
    small = sum(job is not None and WORKERS[job.worker.partition("/")[0]] == "24gb" for job in running)
    said = wanted(fleet, queries["24gb"])
    got = 0
    while claim(fleet, f"new-{got}", "24gb") is not None:
        got += 1
    assert said == small + got, (said, small, got)
    assert wanted(fleet, queries["24gb"]) == small, "what cannot begin wants nobody"


def test_a_class_that_no_worker_is_of_wakes_those_of_the_smallest_class_that_takes_it(
    fleet: Database, queries: dict[str, str]
) -> None:
    for gpu_class in ("16gb", "40gb", "48gb", "141gb"):
        add_job(fleet, "a" if gpu_class == "16gb" else "b", gpu_class)
    assert {name: wanted(fleet, query) for name, query in queries.items()} == {"24gb": 1, "80gb": 2}


@pytest.mark.parametrize("own", [True, False])
def test_the_chart_knows_which_class_is_smaller(own: bool) -> None:
    capacity = (ROOT / "deploy" / "capacity.yaml").read_text() if own else ""
    for gpu_class in load_capacity().classes:
        if gpu_class.name in ("cpu", "16gb"):
            continue
        values = {**chart_values("ingress-keda"), "workers": [{"class": gpu_class.name}], "capacity": capacity}
        (scaled,) = [each for each in render(values) if each["kind"] == "ScaledObject"]
        (names,) = re.findall(r"gpu_class in \((.*)\)", scaled["spec"]["triggers"][0]["metadata"]["query"])
        smaller = {each.name for each in load_capacity().classes if each.name != "cpu"}
        smaller &= {each.name for each in load_capacity().classes if each.memory_bytes <= gpu_class.memory_bytes}
        assert set(re.findall(r"'(.*?)'", names)) == smaller

"""Forecasts of when a job that waits will start."""

from __future__ import annotations

import heapq
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import update

from graft_api.jobs.starts import NEAR_ENOUGH_SECONDS, start_of
from graft_shared.jobs import Stage
from graft_shared.store.tables import jobs
from tests.api_service import ApiService
from tests.store_factories import a_beat


def simulated(number: int, free_in: list[float], mean: float) -> float:
    free = list(free_in)
    heapq.heapify(free)
    for _ in range(number):
        heapq.heapreplace(free, free[0] + mean)
    return free[0]


@given(
    st.integers(0, 300),
    st.lists(st.floats(0, 1e5), min_size=1, max_size=12),
    st.floats(1.0, 1e4),
)
def test_a_start_is_what_a_simulation_of_the_line_finds(number: int, free_in: list[float], mean: float) -> None:
    found = start_of(number, free_in, mean)
    assert found == pytest.approx(simulated(number, free_in, mean), abs=2 * NEAR_ENOUGH_SECONDS)


def test_without_any_ended_job_only_as_many_starts_are_told_as_there_are_workers() -> None:
    assert [start_of(number, [30.0, 10.0], None) for number in range(3)] == [10.0, 30.0, None]
    assert start_of(0, [], 60.0) is None


def test_a_waiting_job_tells_when_it_is_likely_to_start(api: ApiService, nothing_is_held: None) -> None:
    first, second, third = (api.new_job()["id"] for _ in range(3))

    def start_in(job_id: str) -> float | None:
        start = api.http.get(f"/jobs/{job_id}").json()["queue"]["predicted_start"]
        return None if start is None else start - time.time()

    assert start_in(first) is None, "its data is not prepared"
    for job_id in (first, second, third):
        api.leases.hand_to_training(job_id, api.claim(job_id).epoch, {"report": {}})
    assert start_in(first) is None, "nobody is alive to train it"
    api.workers.beat(**a_beat("worker-1", gpu_class="16gb"))
    assert start_in(first) == pytest.approx(0, abs=5)
    assert start_in(second) is None, "no job has ended that would tell how long one takes"
    running = api.claim(first, Stage.TRAIN)
    assert start_in(second) is None, "it loads"
    api.leases.record_progress(first, running.epoch, progress={"eta_seconds": 500.0}, metrics={}, steps=[])
    assert start_in(second) == pytest.approx(500, abs=5)
    assert start_in(third) is None
    with api.database.writing() as connection:
        connection.execute(update(jobs).values(claimed_at=jobs.c.claimed_at - 600).where(jobs.c.id == first))
    api.leases.settle_success(first, running.epoch, adapter={}, metrics={}, memory={})
    assert start_in(second) == pytest.approx(0, abs=5)
    assert start_in(third) == pytest.approx(600, abs=5)

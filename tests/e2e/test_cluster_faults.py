"""A cluster whose parts are killed in mid-training: the job goes on from its last checkpoint, and nothing twice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.factories import make_tiny_base
from tests.fleet import Cluster, a_job, cluster, parent_of
from tests.invariants import assert_history_holds, steps_redone
from tests.waiting import wait_until

STEPS, SAVE_STEPS = 400, 25
BUCKET_AWAY_SECONDS = 20.0


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("twins")
    make_tiny_base(folder / "state" / "models" / "graft" / "tiny")
    with cluster(folder, apis=2, trainers_wanted=2) as made:
        yield made


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("single")
    make_tiny_base(folder / "state" / "models" / "graft" / "tiny")
    with cluster(folder) as made:
        yield made


def in_mid_training(fleet: Cluster) -> dict[str, Any]:
    """Post a job and wait for its first checkpoint."""
    job = fleet.post(a_job(fleet, training={"max_steps": STEPS, "save_steps": SAVE_STEPS}))
    wait_until(lambda: fleet.checkpoints(job["id"]) >= 1, seconds=120, what="a checkpoint", every=0.1)
    return job


def worker_of(fleet: Cluster, job_id: str) -> str:
    """The worker that took the job last."""
    claims = [event for event in fleet.events(job_id) if event["type"] == "claimed"]
    return str(claims[-1]["data"]["worker"]).partition("/")[0]


def assert_goes_on(fleet: Cluster, job_id: str, *, runs: int) -> list[dict[str, Any]]:
    """The job succeeds after so many runs of training, from its checkpoints, and nobody trained beside another."""
    ended = fleet.wait(job_id)
    assert ended["status"] == "succeeded", (ended["error"], fleet.log())
    events = fleet.events(job_id)
    assert_history_holds(events)
    claims = [event for event in events if event["type"] == "claimed" and event["data"]["stage"] == "train"]
    assert len(claims) == runs, [event["data"] for event in claims]
    assert steps_redone(events) <= (runs - 1) * 2 * SAVE_STEPS, "at most the steps since the last stored checkpoint"
    assert ended["progress"]["step"] == STEPS
    assert ended["attempt"] == 1
    assert fleet.trainers() == []
    return events


def kill_trainer(fleet: Cluster, _job_id: str) -> None:
    (trainer,) = fleet.trainers()
    os.kill(trainer, signal.SIGKILL)


def kill_pool_process(fleet: Cluster, job_id: str) -> None:
    (trainer,) = fleet.trainers()
    pool_process = parent_of(trainer)
    assert parent_of(pool_process) == fleet.running[worker_of(fleet, job_id)].pid, "Celery's child holds the job"
    os.kill(pool_process, signal.SIGKILL)
    wait_until(lambda: trainer not in fleet.trainers(), seconds=10, what="the end of the trainer, with its parent")


@pytest.mark.parametrize("fault", [kill_trainer, kill_pool_process])
def test_a_killed_process_costs_a_run_and_no_job(twins: Cluster, fault: Callable[[Cluster, str], None]) -> None:
    job = in_mid_training(twins)
    fault(twins, job["id"])
    assert_goes_on(twins, job["id"], runs=2)


def test_a_killed_worker_is_replaced_by_the_other(twins: Cluster) -> None:
    job = in_mid_training(twins)
    victim = worker_of(twins, job["id"])
    twins.kill_worker(victim)
    wait_until(lambda: twins.trainers() == [], seconds=10, what="the end of the trainer, with its worker")
    assert_goes_on(twins, job["id"], runs=2)
    assert worker_of(twins, job["id"]) != victim
    twins.start_worker(victim)


def test_a_single_worker_that_was_killed_and_started_again_takes_its_job_back(single: Cluster) -> None:
    job = in_mid_training(single)
    single.kill_worker("train-0")
    single.start_worker("train-0")
    assert_goes_on(single, job["id"], runs=2)


def test_redis_restarted_and_flushed_costs_nothing(twins: Cluster) -> None:
    job = in_mid_training(twins)
    twins.redis.flush()
    twins.redis.stop(signal.SIGKILL)
    twins.redis.start()
    waiting = twins.post(a_job(twins, training={"max_steps": 3}))
    assert_goes_on(twins, job["id"], runs=1)
    assert twins.wait(waiting["id"])["status"] == "succeeded"


def test_postgres_restarted_costs_nothing(twins: Cluster) -> None:
    job = in_mid_training(twins)
    twins.postgres.stop()
    twins.postgres.start()
    assert_goes_on(twins, job["id"], runs=1)


def test_a_bucket_that_is_away_for_20_seconds_is_waited_for(single: Cluster) -> None:
    job = in_mid_training(single)
    single.swift.stop()
    gone_at = time.monotonic()
    wait_until(lambda: time.monotonic() > gone_at + BUCKET_AWAY_SECONDS, what="the operator")
    single.swift.start()
    assert_goes_on(single, job["id"], runs=1)


def test_a_worker_started_while_redis_is_away_finds_its_work_by_looking(tmp_path: Path) -> None:
    make_tiny_base(tmp_path / "state" / "models" / "graft" / "tiny")
    with cluster(tmp_path, environment={"GRAFT_LOOK_SECONDS": "1"}) as fleet:
        fleet.redis.stop(signal.SIGKILL)
        for name in ("prepare-0", "train-0"):
            fleet.kill_worker(name)
        fleet.start_worker("prepare-0", stage="prepare")
        fleet.start_worker("train-0")
        ended = fleet.wait(fleet.post(a_job(fleet, training={"max_steps": 3}))["id"])
        assert ended["status"] == "succeeded", (ended["error"], fleet.log())

"""A cluster whose parts are killed in mid-training: the job goes on from its last checkpoint, and is trained by one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.factories import make_tiny_base
from tests.fleet import Cluster, a_job, cluster, parent_of
from tests.invariants import (
    assert_history_holds,
    steps_redone,
    trainers_beside_each_other,
    trainers_came_in_turn,
    trainings_go_on_from_the_last_checkpoint,
)
from tests.waiting import wait_until
from tests.witness import Witness, watching

STEPS, SAVE_STEPS = 400, 20
CHECKPOINTS = 4  # before each fault: a run that began again from the first step would redo more than may be redone
BUCKET_AWAY_SECONDS = 20.0
# The kernel kills a trainer with its parent, and no trainer changes anything within a second of its start: it imports
# torch first. What a look at two processes cannot tell apart is one that is being torn down while the next one starts.
TEARDOWN_SECONDS = 0.5


@pytest.fixture(
    scope="module", params=[pytest.param(1, id="single", marks=pytest.mark.again), pytest.param(2, id="twins")]
)
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One API and one worker that trains; or two of each."""
    folder = tmp_path_factory.mktemp("fleet")
    make_tiny_base(folder / "state" / "models" / "graft" / "tiny")
    with cluster(folder, apis=request.param, trainers_wanted=request.param) as made:
        yield made


@pytest.fixture
def witness(fleet: Cluster) -> Iterator[Witness]:
    with watching(fleet.state_dir) as made:
        yield made


def in_mid_training(fleet: Cluster) -> dict[str, Any]:
    """Post a job and wait for some checkpoints."""
    job = fleet.post(a_job(fleet, training={"max_steps": STEPS, "save_steps": SAVE_STEPS}))
    wait_for_checkpoints(fleet, job["id"])
    return job


def wait_for_checkpoints(fleet: Cluster, job_id: str) -> None:
    """Wait for some more checkpoints than there are."""
    wanted = fleet.checkpoints(job_id) + CHECKPOINTS
    wait_until(lambda: fleet.checkpoints(job_id) >= wanted, seconds=60, what="checkpoints", every=0.1)


def worker_of(fleet: Cluster, job_id: str) -> str:
    """The worker that took the job last."""
    claims = [event for event in fleet.events(job_id) if event["type"] == "claimed"]
    return str(claims[-1]["data"]["worker"]).partition("/")[0]


def assert_goes_on(fleet: Cluster, witness: Witness, job_id: str, *, runs: int) -> None:
    """The job succeeds after so many runs of training, from its checkpoints, and nobody trained beside another."""
    ended = fleet.wait(job_id)
    assert ended["status"] == "succeeded", (ended["error"], fleet.log())
    events = fleet.events(job_id)
    assert_history_holds(events)
    claims = [event for event in events if event["type"] == "claimed" and event["data"]["stage"] == "train"]
    assert len(claims) == runs, [event["data"] for event in claims]
    trainings_go_on_from_the_last_checkpoint(events)
    assert steps_redone(events) <= (runs - 1) * 2 * SAVE_STEPS, "at most the steps since the last stored checkpoint"
    assert ended["progress"]["step"] == STEPS
    assert ended["attempt"] == 1
    assert fleet.trainers(job_id) == []
    seen = [sighting for sighting in witness.sightings() if sighting.job_id == job_id]
    assert {sighting.epoch for sighting in seen} == {claim["epoch"] for claim in claims}, "the witness saw every run"
    assert trainers_beside_each_other(seen, longer_than=TEARDOWN_SECONDS) == []
    trainers_came_in_turn(seen)


def kill_trainer(fleet: Cluster, job_id: str) -> None:
    (trainer,) = fleet.trainers(job_id)
    os.kill(trainer, signal.SIGKILL)


def kill_pool_process(fleet: Cluster, job_id: str) -> None:
    (trainer,) = fleet.trainers(job_id)
    pool_process = parent_of(trainer)
    assert parent_of(pool_process) == fleet.running[worker_of(fleet, job_id)].pid, "Celery's child holds the job"
    os.kill(pool_process, signal.SIGKILL)
    wait_until(lambda: trainer not in fleet.trainers(), seconds=10, what="the end of the trainer, with its parent")


def kill_worker(fleet: Cluster, job_id: str) -> None:
    fleet.kill_worker(worker_of(fleet, job_id))
    wait_until(lambda: fleet.trainers() == [], seconds=10, what="the end of the trainer, with its worker")


def restart_redis(fleet: Cluster) -> None:
    fleet.redis.flush()
    fleet.redis.stop(signal.SIGKILL)
    fleet.redis.start()


def restart_postgres(fleet: Cluster) -> None:
    fleet.postgres.stop()
    fleet.postgres.start()


def test_each_killed_process_costs_a_run_and_no_job(fleet: Cluster, witness: Witness) -> None:
    job = in_mid_training(fleet)
    kill_trainer(fleet, job["id"])
    wait_for_checkpoints(fleet, job["id"])
    kill_pool_process(fleet, job["id"])
    assert_goes_on(fleet, witness, job["id"], runs=3)


def test_a_killed_worker_is_replaced_by_another_or_takes_its_job_back(fleet: Cluster, witness: Witness) -> None:
    job = in_mid_training(fleet)
    victim = worker_of(fleet, job["id"])
    kill_worker(fleet, job["id"])
    if fleet.trainers_wanted == 1:
        fleet.start_worker(victim)
    assert_goes_on(fleet, witness, job["id"], runs=2)
    if fleet.trainers_wanted > 1:
        assert worker_of(fleet, job["id"]) != victim
        fleet.start_worker(victim)


def test_restarted_neighbours_cost_nothing(fleet: Cluster, witness: Witness) -> None:
    job = in_mid_training(fleet)
    restart_redis(fleet)
    wait_for_checkpoints(fleet, job["id"])
    restart_postgres(fleet)
    waiting = fleet.post(a_job(fleet, training={"max_steps": 3}))
    assert_goes_on(fleet, witness, job["id"], runs=1)
    assert fleet.wait(waiting["id"])["status"] == "succeeded", "bells are heard again"


def test_a_bucket_that_is_away_for_20_seconds_is_waited_for(fleet: Cluster, witness: Witness) -> None:
    job = in_mid_training(fleet)
    before = fleet.logged("neighbour_waited_for")
    fleet.swift.stop()
    gone_at = time.monotonic()
    wait_until(lambda: time.monotonic() > gone_at + BUCKET_AWAY_SECONDS, what="the operator")
    assert fleet.get(job["id"])["status"] == "running", "it could not end without its bucket"
    fleet.swift.start()
    assert fleet.logged("neighbour_waited_for") > before, "the outage was felt"
    assert_goes_on(fleet, witness, job["id"], runs=1)


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

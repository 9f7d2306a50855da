"""How long a job stands still: its trainer is killed, or the whole machine that it is trained on is gone."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graft_shared.clock import boottime
from tests.chaos.clients import SAVE_STEPS, STEP_SECONDS, Submitted
from tests.chaos.faults import Hit
from tests.chaos.judge import figures, gather
from tests.chaos.service import ServiceInTrouble
from tests.fleet import JSONL
from tests.outages.stream import small_job
from tests.outages.wanted import Played, Wanted, come_to_rest, neighbours, running, verdict_of
from tests.waiting import wait_until
from tests.witness import Trainer, steps_made, trainers_below

AT_ONCE = 2  # jobs, each hit by a fault of its own, so that twenty lost machines do not take half an hour
TRAINERS = 2 * AT_ONCE  # as many are idle
STEPS = 200
LATEST_HIT_SECONDS = STEPS * STEP_SECONDS / 5  # for each of them in turn: none has ended by then
AWAY_LEASES = 2.0  # a machine that comes back before others have noticed would give its jobs back itself
TRAINER_SECONDS = 10.0
NOTICED_SECONDS = 15.0  # after a lease: a reconciler looks, a bell rings, and what a killed trainer takes

Fault = Callable[[ServiceInTrouble, Trainer], None]


def measured(folder: Path, wanted: Wanted) -> Played:
    """Seconds from the fault to the job's next step, while other workers are idle: trainers killed, machines lost."""
    patience = AWAY_LEASES * wanted.lease_seconds + 60
    with neighbours(folder, wanted) as (redis, postgres):
        service = ServiceInTrouble(folder / "state", redis, postgres, wanted.lease_seconds, TRAINERS)
        with running(service):
            file_id, draw = service.upload(JSONL), random.Random(wanted.seed)
            submitted, hits = list[Submitted](), list[Hit]()
            for name, fault in (("kill_trainer", _kill_trainer), ("lose_worker", _lose_worker)):
                for _ in range(0, wanted.kills, AT_ONCE):
                    wait_until(lambda: _all_are_there(service), seconds=patience, what="idle workers")
                    jobs = [_post(service, file_id, len(submitted) + number) for number in range(AT_ONCE)]
                    submitted += jobs
                    hits += [_hit(service, job, name, fault, draw) for job in jobs]
                    come_to_rest(service)
            service.stop()
            evidence = gather(service, submitted, hits)
    seconds: dict[str, Any] = figures(evidence)["seconds_to_next_step"]
    violations = verdict_of(evidence)
    limits = {"kill_trainer": TRAINER_SECONDS, "lose_worker": wanted.lease_seconds + NOTICED_SECONDS}
    for name, limit in limits.items():
        found = seconds.get(name, {"count": 0})
        late = found["count"] < len([hit for hit in hits if hit.fault == name]) or found["p95"] > limit
        violations[f"{name}: p95 of the seconds to the next step is at most {limit:g}"] = [str(found)] if late else []
    return Played(
        figures={"seconds_to_next_step": seconds, "save_steps": SAVE_STEPS, "step_seconds": STEP_SECONDS},
        violations=violations,
    )


def _post(service: ServiceInTrouble, file_id: str, number: int) -> Submitted:
    job = Submitted(key=f"recovery-{number}", steps=STEPS)
    body = small_job(service, file_id, steps=STEPS, step_seconds=str(STEP_SECONDS))
    with service.client() as http:
        job.ids.add(str(http.post("/jobs", json=body, headers={"idempotency-key": job.key}).json()["id"]))
    return job


def _hit(service: ServiceInTrouble, job: Submitted, name: str, fault: Fault, draw: random.Random) -> Hit:
    """Let it happen to this job, at some moment of its training."""
    (job_id,) = job.ids

    def training() -> bool:
        return any(step.job_id == job_id for step in steps_made(service.state_dir))

    wait_until(training, seconds=120, what=f"a step of {job_id}")
    time.sleep(draw.uniform(0, LATEST_HIT_SECONDS))
    (trainer,) = [trainer for trainer in trainers_below(service.state_dir) if trainer.job_id == job_id]
    at = boottime()
    fault(service, trainer)
    return Hit(name, at, trainer.job_id, trainer.epoch)


def _kill_trainer(_service: ServiceInTrouble, trainer: Trainer) -> None:
    os.kill(trainer.pid, signal.SIGKILL)


def _lose_worker(service: ServiceInTrouble, trainer: Trainer) -> None:
    assert service.kill(trainer.worker, away_seconds=AWAY_LEASES * service.lease_seconds)


def _all_are_there(service: ServiceInTrouble) -> bool:
    with service.client() as http:
        known = {worker["name"] for worker in http.get("/capacity").json()["workers"]}
    return all(name in known and name in service.running for name in service.training_workers)

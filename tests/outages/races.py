"""Races: a cancel against the finish, and a worker that is told to leave while it trains."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import select

from graft_shared.jobs import JobState
from graft_shared.store.tables import job_events
from tests.outages.service import UNSCALED_LEASE_SECONDS, Outage, above, outage, spread
from tests.waiting import wait_until
from tests.witness import steps_made

GONE_SECONDS = 60.0
STEPS = 4


@dataclass(frozen=True, kw_only=True)
class CancelAgainstFinish:
    """Cancel each job within a moment of its last step."""

    db: str = "postgres"
    races: int = 500
    workers: int = 4
    widest_seconds: float = 0.4  # after the last step; publishing takes about this long
    lease_seconds: float = UNSCALED_LEASE_SECONDS

    def run(self, folder: Path) -> dict[str, Any]:
        """Race, then compare every answer with its row."""
        settings = {"GRAFT_ORDERS_SECONDS": "0.1"}  # the order reaches the run while it publishes
        with outage(
            folder, database=self.db, trainers=self.workers, preparers=2, settings=settings, lease_seconds=60
        ) as made:
            draw = random.Random(1)
            leads = [draw.uniform(-0.1, self.widest_seconds) for _ in range(self.races)]
            last_steps = _LastSteps(made)
            with ThreadPoolExecutor(max_workers=self.workers + 3) as racers:
                told = dict(racers.map(lambda lead: self._race(made, last_steps, lead), leads))
            last_steps.end.set()
            made.wait_for_all(120)
            return self._compare(made, told)

    def _race(self, made: Outage, last_steps: _LastSteps, lead: float) -> tuple[str, str]:
        job_id = made.submit(steps=STEPS, step_seconds=0.1)
        wait_until(lambda: job_id in last_steps.seen_at, seconds=300, what=f"the last step of {job_id}", every=0.005)
        time.sleep(max(0.0, lead))
        with httpx.Client(base_url=made.service.url, timeout=30) as http:
            answer = http.post(f"/jobs/{job_id}/cancel")
        return job_id, answer.json()["status"] if answer.status_code == 200 else str(answer.status_code)

    def _compare(self, made: Outage, told: dict[str, str]) -> dict[str, Any]:
        leases = made.leases
        with made.database.reading() as connection:
            ends = Counter(
                connection.execute(
                    select(job_events.c.job_id).where(job_events.c.type.in_(["succeeded", "failed", "cancelled"]))
                ).scalars()
            )
        pairs: Counter[str] = Counter()
        disagree = []
        for job_id, answer in told.items():
            job = leases.read(job_id)
            state = job.state if job is not None else None
            pairs[f"{answer} → {state}"] += 1
            if state not in _AGREES.get(answer, ()):
                disagree.append(f"{job_id} was answered {answer} and is {state}")
        violations = {
            **made.violations(),
            "one terminal event": [f"{job_id}: {ends[job_id]}" for job_id in told if ends[job_id] != 1],
            "the answer agrees with the row": disagree,
        }
        return {"races": len(told), "answer_and_row": dict(pairs), "violations": violations}


# `cancelling` promises that the run is asked to stop; what it commits before it hears of that counts.
_AGREES = {
    "cancelled": (JobState.CANCELLED,),
    "cancelling": (JobState.CANCELLED, JobState.SUCCEEDED),
    "409": (JobState.SUCCEEDED,),
}


class _LastSteps:
    """Reads the trainers' testimony as it is written: when each job made its last step but one."""

    def __init__(self, made: Outage) -> None:
        self.seen_at: dict[str, float] = {}
        self.end = threading.Event()
        self._log = made.service.state_dir / "steps.log"
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        while not self._log.exists():
            if self.end.wait(0.05):
                return
        with self._log.open() as log:
            while not self.end.is_set():
                line = log.readline()
                if not line.endswith("\n"):
                    time.sleep(0.01)
                    continue
                job_id, _, number, _ = line.split()
                if int(number) == STEPS:
                    self.seen_at[job_id] = time.monotonic()


@dataclass(frozen=True, kw_only=True)
class Drain:
    """Tell a worker that trains to leave, again and again."""

    db: str = "postgres"
    drains: int = 50
    workers: int = 3
    lease_seconds: float = UNSCALED_LEASE_SECONDS

    def run(self, folder: Path) -> dict[str, Any]:
        """Drain, and look at what it cost."""
        with outage(folder, database=self.db, trainers=self.workers) as made:
            jobs = [made.submit(steps=1_000_000) for _ in range(self.workers)]
            gone: list[float] = []
            charged: list[str] = []
            while len(gone) < self.drains:
                self._drain_all(made, jobs, gone, charged)
            for job_id in jobs:
                httpx.post(f"{made.service.url}/jobs/{job_id}/cancel", timeout=30).raise_for_status()
            made.wait_for_all(120)
            violations = made.violations()
            return {
                "drains": len(gone),
                "seconds_until_gone": spread(gone),
                "violations": {
                    **violations,
                    f"gone within {GONE_SECONDS:.0f} s": above(GONE_SECONDS, gone, "a drain"),
                    "no attempt is charged": charged,
                },
            }

    def _drain_all(self, made: Outage, jobs: list[str], gone: list[float], charged: list[str]) -> None:
        """Wait until each worker trains, tell all of them to leave, and look at the rows."""
        service = made.service
        leases = made.leases
        steps_before = len(steps_made(service.state_dir))
        wait_until(
            lambda: (
                all(service.trainers_of(name) for name in service.training_workers)
                and len(steps_made(service.state_dir)) > steps_before + 20 * self.workers
            ),
            seconds=180,
            what="all workers to train",
            every=0.2,
        )
        processes = {name: service.running[name] for name in service.training_workers}
        began = time.monotonic()
        for process in processes.values():
            os.kill(process.pid, signal.SIGTERM)
        for process in processes.values():
            process.wait(timeout=120)
            gone.append(time.monotonic() - began)
        for job_id in jobs:
            job = leases.read(job_id)
            assert job is not None
            paid = job.attempt - (job.state is JobState.RUNNING)  # `claim` counts a run in advance
            if paid:
                charged.append(f"{job_id}: attempt {job.attempt} while {job.state}")

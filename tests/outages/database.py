"""PostgreSQL stops at once again and again; the API is killed again and again on SQLite."""

from __future__ import annotations

import random
import signal
import sqlite3
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.chaos.clients import Submitted
from tests.chaos.judge import gather
from tests.chaos.service import ServiceInTrouble
from tests.fleet import JSONL
from tests.outages.stream import SMALL_STEPS, small_job, under_a_stream
from tests.outages.wanted import Played, Wanted, neighbours, running, spread, verdict_of
from tests.waiting import wait_until

STOP_EVERY_SECONDS = 15.0
CLIENTS = 4
MOST_ANSWERS_BETWEEN_KILLS = 12
LONGEST_PAUSE_BEFORE_A_KILL_SECONDS = 0.05  # a few requests long: a kill may fall anywhere in one
PAUSE_SECONDS = 0.05
OF_ACCEPTANCE = ("every accepted job exists", "a key makes one job")


def postgres_stopped(folder: Path, wanted: Wanted) -> Played:
    """PostgreSQL's immediate stop (SIGQUIT) and its recovery every fifteen seconds, under submits and training."""

    def fault(service: ServiceInTrouble) -> None:
        assert service.postgres is not None, "this needs --db postgres"
        service.postgres.stop(signal.SIGQUIT)
        service.postgres.start()

    return under_a_stream(folder, wanted, every_seconds=STOP_EVERY_SECONDS, fault=fault)


def api_killed(folder: Path, wanted: Wanted) -> Played:
    """The API killed while clients submit and try again with their key. Nobody works here: only acceptance counts."""
    with neighbours(folder, wanted) as (redis, postgres):
        service = ServiceInTrouble(folder / "state", redis, postgres, wanted.lease_seconds, 0, preparers=0)
        with running(service):
            submitters = Submitters(service, service.upload(JSONL))
            submitters.start()
            draw = random.Random(wanted.seed)
            kills = 0
            while kills < wanted.kills:
                enough = submitters.answered + draw.randint(1, MOST_ANSWERS_BETWEEN_KILLS)
                wait_until(lambda enough=enough: submitters.answered >= enough, what="answers", every=0.002)
                time.sleep(draw.uniform(0, LONGEST_PAUSE_BEFORE_A_KILL_SECONDS))
                kills += service.kill("api")
            submitters.join()
            service.stop()
            evidence = gather(service, submitters.submitted, [], away=True)
    found = verdict_of(evidence)
    violations = {promise: found[promise] for promise in OF_ACCEPTANCE}
    if service.postgres is None:
        said = _integrity(folder / "state" / "graft.db")
        violations["the database is whole"] = [] if said == ["ok"] else said
    repeated = [job for job in submitters.submitted if job.tries > 1]
    there_before = [job for job in repeated if _created_at(evidence.events, job) < job.last_try_at]
    return Played(
        figures={
            "kills": kills,
            "clients": CLIENTS,
            "jobs_accepted": len(submitters.submitted),
            "jobs_in_the_database": len(evidence.jobs),
            "keys_tried_again": len(repeated),
            "of_these_committed_before_the_kill": len(there_before),
            "post_seconds_with_all_tries": spread([job.seconds for job in submitters.submitted]),
        },
        violations=violations,
    )


@dataclass
class KeyedPost(Submitted):
    """A job that a client posted until it was answered."""

    tries: int = 0
    last_try_at: float = 0.0  # Unix seconds
    seconds: float = 0.0


@dataclass
class Submitters:
    """Clients that do nothing but submit, each job under a key of its own."""

    service: ServiceInTrouble
    file_id: str
    submitted: list[KeyedPost] = field(default_factory=list)
    _end: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    @property
    def answered(self) -> int:
        """How many jobs were accepted so far."""
        return len(self.submitted)

    def start(self) -> None:
        """Begin."""
        for number in range(CLIENTS):
            thread = threading.Thread(target=self._submit, args=[number], name=f"client-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def join(self) -> None:
        """End once every key that was tried has been answered."""
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _submit(self, number: int) -> None:
        body = small_job(self.service, self.file_id)
        turn = 0
        with self.service.client() as http:
            while not self._end.is_set():
                job = KeyedPost(key=f"key-{number}-{turn}", steps=SMALL_STEPS)
                began = time.monotonic()
                while not self._try(http, body, job):
                    time.sleep(PAUSE_SECONDS)
                job.seconds = time.monotonic() - began
                self.submitted.append(job)
                turn += 1

    def _try(self, http: httpx.Client, body: dict[str, object], job: KeyedPost) -> bool:
        job.tries += 1
        job.last_try_at = time.time()
        try:
            answer = http.post("/jobs", json=body, headers={"idempotency-key": job.key})
        except httpx.TransportError:
            return False
        if answer.status_code == 202:
            job.ids.add(str(answer.json()["id"]))
        return answer.status_code == 202


def _created_at(events: dict[str, list[dict[str, float]]], job: KeyedPost) -> float:
    (job_id,) = job.ids
    return events[job_id][0]["created_at"]


def _integrity(path: Path) -> list[str]:
    """What SQLite says of its file: `ok`, or what is broken."""
    connection = sqlite3.connect(path)
    try:
        return [str(line) for (line,) in connection.execute("PRAGMA integrity_check")]
    finally:
        connection.close()

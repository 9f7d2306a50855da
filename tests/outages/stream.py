"""Toy jobs on their way while something goes wrong: a stream that keeps workers busy, or single ones that are timed."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.chaos.clients import SAVE_STEPS, Clients, Submitted
from tests.chaos.judge import figures, gather
from tests.chaos.service import ServiceInTrouble
from tests.fleet import JSONL
from tests.outages.wanted import Played, Wanted, come_to_rest, neighbours, running, spread, verdict_of

TRAINERS = 3
SMALL_STEPS = 10
SMALL_STEP_SECONDS = 0.02
PAUSE_SECONDS = 0.5


def under_a_stream(
    folder: Path, wanted: Wanted, *, every_seconds: float, fault: Callable[[ServiceInTrouble], None]
) -> Played:
    """Let something happen every few seconds while clients submit and workers train; judge what came of it."""
    with neighbours(folder, wanted) as (redis, postgres):
        service = ServiceInTrouble(folder / "state", redis, postgres, wanted.lease_seconds, TRAINERS)
        with running(service):
            until = time.monotonic() + wanted.seconds
            clients = Clients(
                service, wanted.seed, backlog=TRAINERS + 4, wanted=1, go_on=lambda: time.monotonic() < until
            )
            clients.start()
            faults = 0
            while time.monotonic() + every_seconds <= until:
                time.sleep(every_seconds)
                fault(service)
                faults += 1
            clients.join()
            rest_seconds = come_to_rest(service)
            service.stop()
            evidence = gather(service, clients.submitted, [], away=postgres is not None)
    found = figures(evidence)
    told = {name: found[name] for name in ("jobs", "steps", "steps_lost_by_interruption")}
    return Played(
        figures={
            "faults": faults,
            "every_seconds": every_seconds,
            **told,
            "posts_repeated": clients.posts_repeated,
            "longest_post_seconds": round(clients.longest_post_seconds, 2),
            "processes_started_again": service.restarts,
            "seconds_until_the_last_job_ended": round(rest_seconds, 1),
        },
        violations=verdict_of(evidence),
    )


def small_job(service: ServiceInTrouble, file_id: str, *, steps: int = SMALL_STEPS, **metadata: str) -> dict[str, Any]:
    """The body of a toy job that is trained within a second."""
    told = {"witness": str(service.state_dir), "steps": str(steps), "save_steps": str(SAVE_STEPS)}
    told |= {"step_seconds": str(SMALL_STEP_SECONDS), **metadata}
    return {"base_model": "graft/tiny", "dataset": {"file": file_id}, "metadata": told}


def post_stubbornly(service: ServiceInTrouble, *, steps: int, **metadata: str) -> Submitted:
    """Upload a file and post a job on it, each again and again until it is taken."""
    job = Submitted(key="stubborn", steps=steps)
    with service.client() as http:
        file_id = _until_taken(lambda: http.post("/files", files={"file": ("rows.jsonl", JSONL)}, timeout=60))
        body = small_job(service, file_id, steps=steps, **metadata)
        job.ids.add(_until_taken(lambda: http.post("/jobs", json=body, headers={"idempotency-key": job.key})))
    return job


def _until_taken(ask: Callable[[], httpx.Response]) -> str:
    """Ask until something was made; returns its id."""
    while True:
        with contextlib.suppress(httpx.TransportError):
            answer = ask()
            if answer.status_code < 300:
                return str(answer.json()["id"])
        time.sleep(PAUSE_SECONDS)


@dataclass
class TimedPosts:
    """One job after the other, each posted once; how long each POST took and what it was answered."""

    service: ServiceInTrouble
    file_id: str
    submitted: list[Submitted] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def post_for(self, seconds: float, *, every_seconds: float) -> list[Submitted]:
        """Post for so long, and return what was accepted."""
        until, before = time.monotonic() + seconds, len(self.submitted)
        pause = threading.Event()
        with self.service.client() as http:
            while time.monotonic() < until:
                self._post(http)
                pause.wait(every_seconds)
        return self.submitted[before:]

    def figures(self) -> dict[str, Any]:
        """Of the POSTs."""
        return {"answered_202": len(self.submitted), "answered_otherwise": len(self.refused), **spread(self.seconds)}

    def _post(self, http: httpx.Client) -> None:
        job = Submitted(key=f"timed-{len(self.seconds)}", steps=SMALL_STEPS)
        began = time.monotonic()
        try:
            answer = http.post(
                "/jobs", json=small_job(self.service, self.file_id), headers={"idempotency-key": job.key}
            )
        except httpx.TransportError as error:
            self.refused.append(f"{job.key}: {error!r}")
            return
        finally:
            self.seconds.append(time.monotonic() - began)
        if answer.status_code != 202:
            self.refused.append(f"{job.key}: {answer.status_code} {answer.text}")
            return
        job.ids.add(str(answer.json()["id"]))
        self.submitted.append(job)

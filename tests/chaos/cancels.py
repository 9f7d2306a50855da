"""Cancels that race with the finish of their job: asked around the moment that decides, which is learnt on the way."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from graft_shared.clock import boottime
from graft_shared.jobs import Job, JobState
from tests.chaos.clients import Submitted
from tests.chaos.judge import Evidence, spread
from tests.chaos.service import ServiceInTrouble
from tests.fleet import JSONL, TERMINAL
from tests.invariants import TERMINAL_TYPES, Event
from tests.outages.stream import small_job
from tests.witness import Listener

STEP_SECONDS = 0.05
FEWEST_STEPS = 8
LOOKS_A_RUN = 1.5  # a run lasts longer than one look for orders, so that a cancel can be early enough to be heard
WAITING_JOBS = 2  # beside those in training, so that no trainer waits for the next
LEARNING_RATE = 0.1  # of the spread, by which every outcome moves the aim
LONGEST_WAIT_SECONDS = 180.0  # for a first step or an end, on a machine that has too much to do
LOOK_SECONDS = 0.2
WATCHED_LOOK_SECONDS = 0.02
LEAST_SHARE = 0.1  # of either outcome, or it was no race
ENOUGH_TO_TELL = 30  # races; fewer may well end in one way

LAWFUL_ENDS = {
    "cancelled": {JobState.CANCELLED},
    "cancelling": {JobState.CANCELLED, JobState.SUCCEEDED},  # whichever commits first
    "409 succeeded": {JobState.SUCCEEDED},
}
LAWFUL_LOOKS = {
    "cancelled": {"cancelled"},
    "cancelling": {"cancelling", "cancelled", "succeeded"},
    "409 succeeded": {"succeeded"},
}
ANSWERS_ONCE_ENDED = {JobState.CANCELLED: "cancelled", JobState.SUCCEEDED: "409 succeeded"}


@dataclass(kw_only=True)
class Race(Submitted):
    """A job that was cancelled about when it ended, and all that its user was told: statuses, or 409 and a status.

    Args:
        after_seconds: How long after the first step the cancel was to be asked.
        answered_at: When it was answered, in Unix seconds.
        looked: The status that was read right after the answer.
        answer_once_ended: What the same cancel is answered when all is over.
    """

    rank: float
    after_seconds: float = 0.0
    answered_at: float = 0.0
    answer: str = ""
    looked: str = ""
    answer_once_ended: str = ""


@dataclass
class Aim:
    """When to cancel, in seconds after a job's first step: around where as many are cancelled as succeed."""

    centre: float
    width: float
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def seconds(self, rank: float) -> float:
        """Where in the width around the centre, for a rank from 0 to 1."""
        return max(0.0, self.centre + (2 * rank - 1) * self.width)

    def learn(self, end: str) -> None:
        """Aim earlier after a success, later after a cancel."""
        with self._lock:
            self.centre += LEARNING_RATE * self.width * (1 if end == JobState.CANCELLED else -1)


@dataclass
class Cancels:
    """Submits toy jobs, several at once, and cancels each about when it ends."""

    service: ServiceInTrouble
    steps_heard: Listener
    seed: int
    wanted: int
    races: list[Race] = field(default_factory=list)
    undisturbed: list[Submitted] = field(default_factory=list)
    finish_seconds: list[float] = field(default_factory=list)  # of those, from the first step to the end

    def run(self) -> None:
        """Run all of them; returns when the last job has ended."""
        draw = random.Random(f"{self.seed}-cancels")
        self.races = [Race(key=f"race-{n}", steps=self._steps(), rank=draw.random()) for n in range(self.wanted)]
        warm = range(2 * self.service.trainers_wanted)
        self.undisturbed = [Submitted(key=f"undisturbed-{n}", steps=self._steps()) for n in warm]
        with self.service.client() as http, ThreadPoolExecutor(self._at_once()) as pool:
            body = small_job(
                self.service, self.service.upload(JSONL), steps=self._steps(), step_seconds=str(STEP_SECONDS)
            )
            self.finish_seconds = list(pool.map(lambda job: self._finish(http, body, job), self.undisturbed))
            aim = self._first_aim()
            for _ in pool.map(lambda race: self._race(http, body, race, aim), self.races):
                pass

    def _first_aim(self) -> Aim:
        looks = self._seconds_between_looks()
        finish = statistics.median(self.finish_seconds)
        return Aim(centre=max(0.0, finish - looks), width=looks + statistics.pstdev(self.finish_seconds))

    def _seconds_between_looks(self) -> float:
        return float(self.service.environment["GRAFT_ORDERS_SECONDS"])

    def _steps(self) -> int:
        return max(FEWEST_STEPS, round(LOOKS_A_RUN * self._seconds_between_looks() / STEP_SECONDS))

    def _at_once(self) -> int:
        return self.service.trainers_wanted + WAITING_JOBS

    def _finish(self, http: httpx.Client, body: dict[str, Any], job: Submitted) -> float:
        """Let a job end, and return how long after its first step that was."""
        job_id = _post(http, body, job)
        first = self.steps_heard.wait_for(job_id, 1, seconds=LONGEST_WAIT_SECONDS)
        _end_of(http, job_id, job, every=WATCHED_LOOK_SECONDS)
        return boottime() - first.at

    def _race(self, http: httpx.Client, body: dict[str, Any], race: Race, aim: Aim) -> None:
        job_id = _post(http, body, race)
        first = self.steps_heard.wait_for(job_id, 1, seconds=LONGEST_WAIT_SECONDS)
        race.after_seconds = aim.seconds(race.rank)
        time.sleep(max(0.0, first.at + race.after_seconds - boottime()))
        race.answer = _cancel(http, job_id)
        race.answered_at = time.time()
        race.looked = _look(http, job_id, race)
        aim.learn(_end_of(http, job_id, race, every=LOOK_SECONDS))
        race.answer_once_ended = _cancel(http, job_id)


def broken_promises(races: Sequence[Race], evidence: Evidence) -> dict[str, list[str]]:
    """Of every race, what its user was told and the row is not; and whether these were races at all."""
    found: dict[str, list[str]] = {"a cancel's answer is true": [], "a row ends as its last event says": []}
    for race in races:
        for job_id in race.ids & evidence.jobs.keys():  # the judge misses the others
            job = evidence.jobs[job_id]
            found["a cancel's answer is true"] += lies(race, job)
            found["a row ends as its last event says"] += disagreements(job, evidence.events[job_id])
    found["both ends of a race are frequent"] = list(_one_sided(ends(races, evidence)))
    return found


def lies(race: Race, job: Job) -> Iterator[str]:
    """Answers that cannot be, where the job ended as it did."""
    if job.state not in LAWFUL_ENDS.get(race.answer, ()):
        yield f"{job.id}: cancel answered {race.answer!r}, and it ended {job.state}"
    if race.looked not in LAWFUL_LOOKS.get(race.answer, ()):
        yield f"{job.id}: cancel answered {race.answer!r}, and it was {race.looked!r} right after"
    if race.answer_once_ended != ANSWERS_ONCE_ENDED.get(job.state):
        yield f"{job.id}: it ended {job.state}, and then cancel answered {race.answer_once_ended!r}"


def disagreements(job: Job, events: Sequence[Event]) -> Iterator[str]:
    """A row that is not what its terminal events tell, or that tells less or more than one."""
    told = [event["type"] for event in events if event["type"] in TERMINAL_TYPES]
    if told != [job.state]:
        yield f"{job.id} is {job.state}, its events say {told}"


def ends(races: Sequence[Race], evidence: Evidence) -> Counter[str]:
    """How many ended in each way."""
    return Counter(evidence.jobs[job_id].state.value for race in races for job_id in race.ids & evidence.jobs.keys())


def figures(cancels: Cancels, evidence: Evidence) -> dict[str, Any]:
    """The numbers of the report."""
    told = Counter(
        f"{race.answer}, then {evidence.jobs[job_id].state}"
        for race in cancels.races
        for job_id in race.ids & evidence.jobs.keys()
    )
    return {
        "races": len(cancels.races),
        "ended": dict(ends(cancels.races, evidence)),
        "answered": dict(sorted(told.items())),
        "steps_a_job": cancels.races[0].steps if cancels.races else 0,
        "undisturbed_seconds_from_first_step_to_end": spread(cancels.finish_seconds),
        "cancelled_seconds_after_first_step": spread([race.after_seconds for race in cancels.races]),
        "seconds_between_cancel_and_success": spread(list(_distances(cancels.races, evidence))),
    }


def _one_sided(ended: Counter[str]) -> Iterator[str]:
    count = ended.total()
    for end in (JobState.CANCELLED, JobState.SUCCEEDED):
        if count >= ENOUGH_TO_TELL and ended[end] < LEAST_SHARE * count:
            yield f"{ended[end]} of {count} ended {end}: the harness did not race"


def _distances(races: Sequence[Race], evidence: Evidence) -> Iterator[float]:
    """How far from the commit of its success each lost cancel was answered, before or after."""
    for race in races:
        for job_id in race.ids & evidence.jobs.keys():
            end = evidence.events[job_id][-1]
            if end["type"] == JobState.SUCCEEDED:
                yield abs(race.answered_at - end["created_at"])


def _post(http: httpx.Client, body: dict[str, Any], job: Submitted) -> str:
    answer = http.post("/jobs", json=body, headers={"idempotency-key": job.key})
    assert answer.status_code == 202, answer.text
    job_id = str(answer.json()["id"])
    job.ids.add(job_id)
    return job_id


def _cancel(http: httpx.Client, job_id: str) -> str:
    """The status that was answered; after 409 the one that the refusal names."""
    answer = http.post(f"/jobs/{job_id}/cancel")
    if answer.status_code == 200:
        return str(answer.json()["status"])
    return f"{answer.status_code} {answer.json()['error'].get('status', answer.text)}"


def _look(http: httpx.Client, job_id: str, job: Submitted) -> str:
    status = str(http.get(f"/jobs/{job_id}").raise_for_status().json()["status"])
    if status == JobState.CANCELLED and job.cancelled_at is None:
        job.cancelled_at = boottime()
    return status


def _end_of(http: httpx.Client, job_id: str, job: Submitted, *, every: float) -> str:
    """The status that the job ended with, or the last one if it does not end: the judge says so."""
    until = time.monotonic() + LONGEST_WAIT_SECONDS
    while (status := _look(http, job_id, job)) not in TERMINAL and time.monotonic() < until:
        time.sleep(every)
    return status

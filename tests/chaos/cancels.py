"""Cancels that race with the finish of their job.

Two moments decide: the last one at which a worker hears of a cancel, and the commit of the finish, from which on there
is nothing to cancel. One half of the cancels is aimed at either; where they are is learnt on the way.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import httpx

from graft_shared.clock import boottime
from graft_shared.jobs import JobState
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
LEARNING_RATE = 0.1  # of an aim's width, by which every outcome moves it
EARLIER_STEPS = 2  # from which the first aim counts, than a look before the last one
NARROWEST_SECONDS, WIDEST_SECONDS = 0.05, 0.25  # to either side of an aim, beside what is heard late
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


class Moment(StrEnum):
    """What comes in between: the worker hears of no cancel any more, or the finish is committed."""

    HEARD = "heard"
    COMMITTED = "committed"


@dataclass(kw_only=True)
class Aim:
    """When to cancel, in seconds after a step: around where as many cancels are in time as are too late."""

    moment: Moment
    step: int
    centre: float
    width: float
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def seconds(self, rank: float) -> float:
        """Where in the width around the centre, for a rank from 0 to 1."""
        return max(0.0, self.centre + (2 * rank - 1) * self.width)

    def learn(self, *, was_in_time: bool) -> None:
        """Aim later if the cancel was in time, else earlier."""
        with self._lock:
            self.centre += LEARNING_RATE * self.width * (1 if was_in_time else -1)


@dataclass(kw_only=True)
class Race(Submitted):
    """A job that was cancelled about when it ended, and all that its user was told: statuses, or 409 and a status.

    Args:
        rank: From 0 to 1: where the cancel falls in the width of its aim.
        after_seconds: How long after the aim's step it was to be asked.
        answered_at: When it was answered, in Unix seconds.
        looked: The status that was read right after the answer.
        answer_once_ended: What the same cancel is answered when all is over.
    """

    aim: Aim
    rank: float
    after_seconds: float = 0.0
    answered_at: float = 0.0
    answer: str = ""
    looked: str = ""
    answer_once_ended: str = ""

    def was_in_time(self, end: str) -> bool:
        """Whether its moment had not come yet, for a job that ended so."""
        return end == JobState.CANCELLED if self.aim.moment is Moment.HEARD else self.answer == "cancelling"


@dataclass
class Cancels:
    """Submits toy jobs, several at once, and cancels each about when it ends."""

    service: ServiceInTrouble
    steps_heard: Listener
    seed: int
    wanted: int
    races: list[Race] = field(default_factory=list)
    undisturbed: list[Submitted] = field(default_factory=list)
    finish_seconds: list[float] = field(default_factory=list)  # of those, from the last step to the end

    def run(self) -> None:
        """Run all of them; returns when the last job has ended."""
        file_id = self.service.upload(JSONL)
        body = small_job(self.service, file_id, steps=self._steps(), step_seconds=str(STEP_SECONDS))
        self.undisturbed = [
            Submitted(key=f"undisturbed-{number}", steps=self._steps())
            for number in range(self.service.trainers_wanted)
        ]
        with self.service.client() as http, ThreadPoolExecutor(self._at_once()) as pool:
            self.finish_seconds = list(pool.map(lambda job: self._finish(http, body, job), self.undisturbed))
            self.races = self._drawn(self._first_aims())
            for _ in pool.map(lambda race: self._race(http, body, race), self.races):
                pass

    def _drawn(self, aims: Sequence[Aim]) -> list[Race]:
        draw = random.Random(f"{self.seed}-cancels")
        return [
            Race(key=f"race-{number}", steps=self._steps(), aim=aims[number % len(aims)], rank=draw.random())
            for number in range(self.wanted)
        ]

    def _first_aims(self) -> list[Aim]:
        looks, last = self._seconds_between_looks(), self._steps()
        width = min(WIDEST_SECONDS, max(NARROWEST_SECONDS, statistics.pstdev(self.finish_seconds)))
        step = max(1, last - EARLIER_STEPS - round(looks / STEP_SECONDS))
        heard = (last - step) * STEP_SECONDS - looks / 2
        return [
            Aim(moment=Moment.HEARD, step=step, centre=heard, width=looks / 2 + width),
            Aim(moment=Moment.COMMITTED, step=last, centre=statistics.median(self.finish_seconds), width=width),
        ]

    def _seconds_between_looks(self) -> float:
        return float(self.service.environment["GRAFT_ORDERS_SECONDS"])

    def _steps(self) -> int:
        return max(FEWEST_STEPS, round(LOOKS_A_RUN * self._seconds_between_looks() / STEP_SECONDS))

    def _at_once(self) -> int:
        return self.service.trainers_wanted + WAITING_JOBS

    def _finish(self, http: httpx.Client, body: dict[str, Any], job: Submitted) -> float:
        """Let a job end, and return how long after its last step that was."""
        job_id = _post(http, body, job)
        last = self.steps_heard.wait_for(job_id, job.steps, seconds=LONGEST_WAIT_SECONDS)
        _end_of(http, job_id, job, every=WATCHED_LOOK_SECONDS)
        return boottime() - last.at

    def _race(self, http: httpx.Client, body: dict[str, Any], race: Race) -> None:
        job_id = _post(http, body, race)
        try:
            step = self.steps_heard.wait_for(job_id, race.aim.step, seconds=LONGEST_WAIT_SECONDS)
        except TimeoutError:
            return  # it was never raced with, and that is judged
        race.after_seconds = race.aim.seconds(race.rank)
        time.sleep(max(0.0, step.at + race.after_seconds - boottime()))
        race.answer = _cancel(http, job_id)
        race.answered_at = time.time()
        race.looked = _look(http, job_id, race)
        race.aim.learn(was_in_time=race.was_in_time(_end_of(http, job_id, race, every=LOOK_SECONDS)))
        race.answer_once_ended = _cancel(http, job_id)


def broken_promises(races: Sequence[Race], evidence: Evidence) -> dict[str, list[str]]:
    """Of every race, what its user was told and the row is not; and whether these were races at all."""
    found: dict[str, list[str]] = {"a cancel's answer is true": [], "a row ends as its last event says": []}
    for race in races:
        for job_id in race.ids & evidence.jobs.keys():  # the judge misses the others
            state, events = evidence.jobs[job_id].state, evidence.events[job_id]
            found["a cancel's answer is true"] += (f"{job_id}: {lie}" for lie in lies(race, state))
            found["a row ends as its last event says"] += (f"{job_id} {said}" for said in disagreements(state, events))
    found["both ends of a race are frequent"] = list(one_sided(ends(races, evidence)))
    return found


def lies(race: Race, state: JobState) -> Iterator[str]:
    """Answers that cannot be, where the job's row ended in this state."""
    if state not in LAWFUL_ENDS.get(race.answer, ()):
        yield f"cancel answered {race.answer!r}, and it ended {state}"
    if race.looked not in LAWFUL_LOOKS.get(race.answer, ()):
        yield f"cancel answered {race.answer!r}, and it was {race.looked!r} right after"
    if race.answer_once_ended != ANSWERS_ONCE_ENDED.get(state):
        yield f"it ended {state}, and then cancel answered {race.answer_once_ended!r}"


def disagreements(state: JobState, events: Sequence[Event]) -> Iterator[str]:
    """Whether the row's state is not the one terminal event that there should be."""
    told = [event["type"] for event in events if event["type"] in TERMINAL_TYPES]
    if told != [state]:
        yield f"is {state}, its events say {told}"


def one_sided(ended: Counter[str]) -> Iterator[str]:
    """Ends that are so rare that nothing was raced; of few races it tells nothing."""
    count = ended.total()
    for end in (JobState.CANCELLED, JobState.SUCCEEDED):
        if count >= ENOUGH_TO_TELL and ended[end] < LEAST_SHARE * count:
            yield f"{ended[end]} of {count} ended {end}: the harness did not race"


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
        "undisturbed_seconds_from_last_step_to_end": spread(cancels.finish_seconds),
        "aimed_at": {
            aim.moment.value: {
                "after_step": aim.step,
                "seconds": spread([race.after_seconds for race in cancels.races if race.aim is aim]),
            }
            for aim in {race.aim.moment: race.aim for race in cancels.races}.values()
        },
        "seconds_between_commit_and_lost_cancel": spread(list(_distances(cancels.races, evidence))),
    }


def _distances(races: Sequence[Race], evidence: Evidence) -> Iterator[float]:
    """How far from the commit of its success each lost cancel that was aimed at it was answered, before or after."""
    for race in (race for race in races if race.aim.moment is Moment.COMMITTED):
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

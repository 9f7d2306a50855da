"""Workers that are told to leave while they train, as in a deployment: how soon they are gone, and at what cost."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft_shared.clock import boottime
from graft_shared.jobs import FailureReason, JobState
from tests.chaos.clients import STEP_SECONDS, Submitted
from tests.chaos.faults import Hit
from tests.chaos.judge import Evidence, spread
from tests.chaos.service import ServiceInTrouble
from tests.fleet import JSONL
from tests.invariants import Event
from tests.outages.stream import small_job
from tests.waiting import wait_until
from tests.witness import Listener, pids, trainers_below

STEPS = 120
LATEST_STEP = 60  # at which a drain is sent: the job is not to end before the order reaches it
AT_ONCE = 2  # workers that leave; another one can take their jobs up
LONGEST_SECONDS = 60.0  # that a worker may take to be gone
WATCHED_SECONDS = 2 * LONGEST_SECONDS
LONGEST_WAIT_SECONDS = 180.0  # for a step, on a machine that has too much to do
LOOK_SECONDS = 0.05


@dataclass(kw_only=True)
class Drain(Submitted):
    """A job whose worker was told to leave at one of its steps.

    Args:
        sent_at: When it was told so, by CLOCK_BOOTTIME.
        gone_seconds: Until no process of the worker was left, its trainer included.
        exit_code: Of the worker; None if it did not leave.
    """

    at_step: int
    worker: str = ""
    epoch: int = 0
    sent_at: float = 0.0
    gone_seconds: float = 0.0
    processes: int = 0
    exit_code: int | None = None

    @property
    def hits(self) -> list[Hit]:
        """As one of the faults that the judge knows."""
        return [Hit("drain_worker", self.sent_at, job_id, self.epoch) for job_id in self.ids]


@dataclass
class Drains:
    """Submits jobs, and tells the worker of each to leave; whoever keeps the service starts it again."""

    service: ServiceInTrouble
    steps_heard: Listener
    seed: int
    wanted: int
    drains: list[Drain] = field(default_factory=list)

    def run(self) -> None:
        """Do all of them; returns when the last worker has left. Its job may be in training still."""
        draw = random.Random(f"{self.seed}-drains")
        self.drains = [
            Drain(key=f"drain-{number}", steps=STEPS, at_step=draw.randint(1, LATEST_STEP))
            for number in range(self.wanted)
        ]
        file_id = self.service.upload(JSONL)
        body = small_job(self.service, file_id, steps=STEPS, step_seconds=str(STEP_SECONDS))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for _ in pool.map(lambda drain: self._drain(drain, body), self.drains):
                pass

    def _drain(self, drain: Drain, body: dict[str, Any]) -> None:
        job_id = str(self.service.post(body, **{"idempotency-key": drain.key})["id"])
        drain.ids.add(job_id)
        with contextlib.suppress(TimeoutError):
            self.steps_heard.wait_for(job_id, drain.at_step, seconds=LONGEST_WAIT_SECONDS)
        trainer = next((one for one in trainers_below(self.service.state_dir) if one.job_id == job_id), None)
        if trainer is None:
            return  # nobody was drained, and that is judged
        drain.worker, drain.epoch = trainer.worker, trainer.epoch
        leader = self.service.running[trainer.worker]
        family = Family(leader.pid)
        drain.sent_at = boottime()
        assert self.service.terminate(trainer.worker), f"{trainer.worker} trains and has ended"
        with contextlib.suppress(TimeoutError):  # it took too long, and that is judged
            wait_until(lambda: not family.living(), seconds=WATCHED_SECONDS, what="its end", every=LOOK_SECONDS)
        drain.gone_seconds = boottime() - drain.sent_at
        drain.processes = len(family.births)
        with contextlib.suppress(TimeoutError):
            drain.exit_code = leader.wait(1)


@dataclass
class Family:
    """A process and all that descends from it, however far it has gone its own ways."""

    leader: int
    births: dict[int, str] = field(default_factory=dict)  # of all that were seen; an id may be given anew

    def __post_init__(self) -> None:
        self.births[self.leader] = _origin(self.leader)[1]
        self.living()

    def living(self) -> list[int]:
        """Those that have not ended; who was born since is found first."""
        origins = {pid: _origin(pid) for pid in pids()}
        living = {pid for pid, (_, born) in origins.items() if born and self.births.get(pid) == born}
        while born_since := {pid for pid, (parent, _) in origins.items() if parent in living} - living:
            self.births.update({pid: origins[pid][1] for pid in born_since})
            living |= born_since
        return sorted(living)


def broken_promises(drains: Sequence[Drain], evidence: Evidence) -> dict[str, list[str]]:
    """What was not kept of what a drain promises."""
    within = f"a drained worker is gone within {LONGEST_SECONDS:g} s"
    found: dict[str, list[str]] = {within: [], "a drained job goes on at no charge": []}
    for drain in drains:
        if drain.gone_seconds > LONGEST_SECONDS:
            found[within].append(f"{drain.worker} of {drain.key} took {drain.gone_seconds:.1f} s")
        elif drain.exit_code != 0:
            found[within].append(f"{drain.worker} of {drain.key} left with {drain.exit_code}")
        for job_id in drain.ids & evidence.jobs.keys():  # the judge misses the others
            found_of_it = costs(evidence.events[job_id], drain.epoch, attempt_at_the_end=evidence.jobs[job_id].attempt)
            found["a drained job goes on at no charge"] += (f"{job_id}: {cost}" for cost in found_of_it)
    return found


def costs(events: Sequence[Event], epoch: int, *, attempt_at_the_end: int) -> Iterator[str]:
    """What the drain of this epoch cost: the job should be taken up again with the attempt that it had, and succeed."""
    claims = [event for event in events if event["type"] == "claimed" and event["epoch"] >= epoch]
    released = [event["data"]["reason"] for event in events if event["type"] == "requeued"]
    attempts = [claim["data"]["attempt"] for claim in claims]
    if released != [FailureReason.DRAINED]:
        yield f"given back for {released}"
    if len(claims) < 2 or {*attempts, attempt_at_the_end} != {attempts[0]}:
        yield f"attempts {attempts} by its claims, {attempt_at_the_end} at its end"
    if events[-1]["type"] != JobState.SUCCEEDED:
        yield f"ended with {events[-1]['type']}"


def figures(drains: Sequence[Drain], evidence: Evidence) -> dict[str, Any]:
    """The numbers of the report."""
    heirs = Counter(heir for drain in drains for job_id in drain.ids for heir in _heirs(drain, evidence.events[job_id]))
    return {
        "drains": len(drains),
        "seconds_until_gone": spread([drain.gone_seconds for drain in drains]),
        "processes_a_worker": dict(Counter(drain.processes for drain in drains)),
        "taken_up_by": dict(heirs),
        "ended": dict(Counter(evidence.jobs[job_id].state.value for drain in drains for job_id in drain.ids)),
    }


def _heirs(drain: Drain, events: Sequence[Event]) -> Iterator[str]:
    for event in events:
        if event["type"] == "claimed" and event["epoch"] > drain.epoch:
            yield "its replacement" if event["data"]["worker"] == drain.worker else "another worker"


def _origin(pid: int) -> tuple[int, str]:
    """A process's parent and when it began, in clock ticks; zero and nothing for one that has ended."""
    try:
        state, parent, *more = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0, ""
    return (0, "") if state == "Z" else (int(parent), more[17])

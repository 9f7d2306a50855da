"""What must hold of every job's history, whatever happened to it. One function each; reliability is judged by these."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Event = dict[str, Any]

TERMINAL_TYPES = ("succeeded", "failed", "cancelled")


def assert_history_holds(events: Sequence[Event]) -> None:
    """All of them at once."""
    events_are_numbered_without_gaps(events)
    epochs_only_grow(events)
    no_step_of_an_old_epoch_follows_a_newer_one(events)
    there_is_one_terminal_event_and_it_is_the_last(events)
    the_checkpoint_step_never_falls(events)


def events_are_numbered_without_gaps(events: Sequence[Event]) -> None:
    """Events replay in order: 1, 2, 3 …"""
    assert [event["id"] for event in events] == list(range(1, len(events) + 1))


def epochs_only_grow(events: Sequence[Event]) -> None:
    """Every claim has a larger epoch than the one before."""
    epochs = [event["epoch"] for event in events if event["type"] == "claimed"]
    assert epochs == sorted(set(epochs)), epochs


def no_step_of_an_old_epoch_follows_a_newer_one(events: Sequence[Event]) -> None:
    """Nobody trains a job that another epoch has taken over."""
    epochs = [event["epoch"] for event in events if event["type"] in ("metrics", "checkpoint")]
    assert epochs == sorted(epochs), epochs


def there_is_one_terminal_event_and_it_is_the_last(events: Sequence[Event]) -> None:
    """A job ends once."""
    ends = [event["type"] for event in events if event["type"] in TERMINAL_TYPES]
    assert len(ends) == 1, ends
    assert events[-1]["type"] == ends[0]


def the_checkpoint_step_never_falls(events: Sequence[Event]) -> None:
    """What was saved once is never gone back behind."""
    steps = [event["data"]["step"] for event in events if event["type"] == "checkpoint"]
    assert steps == sorted(steps), steps


@dataclass(frozen=True, kw_only=True)
class Message:
    """One webhook as the store has it when everything is over."""

    id: str
    job_id: str
    type: str
    tries: int
    is_delivered: bool
    is_due: bool


def webhooks_are_delivered_or_exhausted(
    ended: Mapping[str, str], messages: Sequence[Message], taken: Collection[tuple[str, str, str]], *, most_tries: int
) -> list[str]:
    """What is wrong with the messages about jobs that have ended, each of which wanted one.

    Args:
        ended: The jobs, and how each of them ended.
        taken: Id, job and type of what the receiver took; the same one may have come several times.
        most_tries: After so many in vain a message is given up.
    """
    found = []
    wanted = sorted((job_id, f"fine_tuning.job.{state}") for job_id, state in ended.items())
    written = sorted((message.job_id, message.type) for message in messages)
    if written != wanted:
        found.append(f"messages were written about {written}, and {wanted} have ended")
    for message in messages:
        arrived = (message.id, message.job_id, message.type) in taken
        if message.is_delivered and not arrived:
            found.append(f"{message.id} is said to be delivered, and nobody took it")
        if not message.is_delivered and (message.is_due or message.tries < most_tries):
            found.append(f"{message.id} was left after {message.tries} tries, neither delivered nor given up")
    strangers = {id for id, *_ in taken} - {message.id for message in messages}
    return found + [f"{id} was taken, and nobody has written it" for id in sorted(strangers)]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One claim of one job: when the job could be taken, when it was, until when, and by whom. Unix seconds."""

    job_id: str
    worker: str
    ready_at: float
    claimed_at: float
    ended_at: float


def waits_beside_an_idle_worker(runs: Sequence[Run], *, longer_than: float) -> list[str]:
    """The waits of jobs beside a worker that had nothing to do, though each of these may take each of the jobs.

    A worker counts from the first claim of any of them; `longer_than` is in seconds.
    """
    begin = min(run.claimed_at for run in runs)
    found = []
    for worker in {run.worker for run in runs}:
        own = sorted((run for run in runs if run.worker == worker), key=lambda run: run.claimed_at)
        frees = [begin, *(run.ended_at for run in own)]
        busies = [*(run.claimed_at for run in own), float("inf")]
        for free, busy in zip(frees, busies, strict=True):
            for run in runs:
                since = max(run.ready_at, free)
                waited = min(run.claimed_at, busy) - since
                if waited > longer_than:
                    found.append(
                        f"{worker} idle and {run.job_id} waiting for {waited:.2f} s from {since - begin:.2f} s"
                    )
    return found


def steps_redone(events: Sequence[Event]) -> int:
    """How many optimizer steps were made twice."""
    steps = [event["data"]["step"] for event in events if event["type"] == "metrics" and "loss" in event["data"]]
    return len(steps) - len(set(steps))


def trainings_go_on_from_the_last_checkpoint(events: Sequence[Event]) -> None:
    """The first step of every run of training follows the last checkpoint that was stored before its claim."""
    claims = [event for event in events if event["type"] == "claimed" and event["data"]["stage"] == "train"]
    for claim in claims:
        stored = [e["data"]["step"] for e in events if e["type"] == "checkpoint" and e["id"] < claim["id"]]
        steps = [
            event["data"]["step"]
            for event in events
            if event["type"] == "metrics" and event["epoch"] == claim["epoch"] and "loss" in event["data"]
        ]
        assert steps[:1] == [max(stored, default=0) + 1], (claim, stored, steps[:1])


@dataclass(frozen=True)
class Step:
    """An optimizer step as a toy trainer told it; it asked for leave `at`, CLOCK_BOOTTIME in seconds."""

    job_id: str
    epoch: int
    number: int
    at: float


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """One trainer's process, as somebody who looked at the machine again and again saw it. Seconds of one clock."""

    job_id: str
    epoch: int
    pid: int
    first_at: float
    last_at: float


def trainers_beside_each_other(sightings: Sequence[Sighting], *, longer_than: float) -> list[str]:
    """The pairs of trainers of one job that lived at the same time, for more than so many seconds."""
    found = []
    for one, other in itertools.combinations(sightings, 2):
        together = min(one.last_at, other.last_at) - max(one.first_at, other.first_at)
        if one.job_id == other.job_id and together > longer_than:
            found.append(f"{one.job_id}: epochs {one.epoch} and {other.epoch} side by side for {together:.2f} s")
    return found


def trainers_came_in_turn(sightings: Sequence[Sighting]) -> None:
    """Epochs of one job are seen one after the other, never an older one again."""
    for job_id in {sighting.job_id for sighting in sightings}:
        own = [sighting for sighting in sightings if sighting.job_id == job_id]
        begun = [sighting.epoch for sighting in sorted(own, key=lambda sighting: sighting.first_at)]
        ended = [sighting.epoch for sighting in sorted(own, key=lambda sighting: sighting.last_at)]
        assert begun == ended == sorted(set(begun)), (job_id, begun, ended)


def nobody_steps_after_a_newer_epoch(steps: Sequence[Step]) -> list[str]:
    """The zombie steps: those of an epoch that were begun after the first of a newer one of the same job."""
    found = []
    newest: dict[str, int] = {}
    for step in sorted(steps, key=lambda step: step.at):
        epoch = newest.get(step.job_id, 0)
        if step.epoch < epoch:
            found.append(f"{step.job_id}: step {step.number} of epoch {step.epoch} after the first of epoch {epoch}")
        newest[step.job_id] = max(epoch, step.epoch)
    return found


def runs_begin_behind_their_checkpoint(events: Sequence[Event], steps: Sequence[Step]) -> list[str]:
    """The runs whose first step is not the one after the last checkpoint that was committed before their claim."""
    found = []
    first: dict[int, int] = {}
    for step in sorted(steps, key=lambda step: step.at):
        first.setdefault(step.epoch, step.number)
    stored = 0
    for event in events:
        if event["type"] == "checkpoint":
            stored = event["data"]["step"]
        elif event["type"] == "claimed" and first.get(event["epoch"], stored + 1) != stored + 1:
            found.append(f"epoch {event['epoch']} began with step {first[event['epoch']]}, {stored} were stored")
    return found


def lost_by_interruption(steps: Sequence[Step]) -> list[int]:
    """How many steps of each run of a job its next run made again, in the order of the runs."""
    runs = itertools.pairwise(runs_of(steps))
    return [max(0, before[-1].number - after[0].number + 1) for before, after in runs]


def accounting_closes(steps: Sequence[Step], needed: int) -> bool:
    """Whether every step was made, none twice in one run, and interruptions explain what was made again."""
    runs = [[step.number for step in run] for run in runs_of(steps)]
    without_gaps = all(run == list(range(run[0], run[-1] + 1)) for run in runs)
    all_made = {step.number for step in steps} == set(range(1, needed + 1))
    return without_gaps and all_made and len(steps) - needed == sum(lost_by_interruption(steps))


def runs_of(steps: Sequence[Step]) -> list[list[Step]]:
    """The steps of each run of a job, in the order in which they were made."""
    by_epoch: dict[int, list[Step]] = {}
    for step in sorted(steps, key=lambda step: (step.epoch, step.at)):
        by_epoch.setdefault(step.epoch, []).append(step)
    return list(by_epoch.values())


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one tenant may have, as the operator said; None is no limit."""

    running_jobs: int | None = None
    queued_jobs: int | None = None
    gpu_hours: float | None = None


def budgets_hold(
    budgets: Mapping[str, Budget], histories: Mapping[str, Sequence[Event]], tenants: Mapping[str, str]
) -> list[str]:
    """What began though its tenant's budget was used up, by the events of all jobs and the tenant of each.

    Submissions are held, and claims for training. Jobs that came back to the queue from training are left out: their
    events tell when they were about to, and whoever counted a moment later may have counted before that was committed.
    """
    leaves_first = sorted(
        (event["created_at"], event["type"] in ("submitted", "claimed"), job_id, event["id"], event)
        for job_id, events in histories.items()
        for event in events
        if event["type"] in _MOVES
    )
    found, place = [], dict.fromkeys(histories, "nowhere")
    counts: dict[str, Counter[str]] = {"queued": Counter(), "training": Counter()}
    began, seconds = dict[str, float](), Counter[str]()
    for at, _, job_id, _, event in leaves_first:
        tenant, budget = tenants[job_id], budgets[tenants[job_id]]
        before, after = place[job_id], _place_after(place[job_id], event)
        place[job_id] = after
        if before == after:
            continue
        for name, count in counts.items():
            count[tenant] += (after == name) - (before == name)
        if before == "training":
            seconds[tenant] += at - began.pop(job_id)
        if after == "training":
            began[job_id] = at
            found += _exceeded(job_id, "train", counts["training"][tenant], budget.running_jobs)
            if budget.gpu_hours is not None and seconds[tenant] >= budget.gpu_hours * 3600:
                found.append(f"{job_id} began though {tenant} had used up {budget.gpu_hours} GPU-hours")
        if event["type"] == "submitted":
            found += _exceeded(job_id, "wait", counts["queued"][tenant], budget.queued_jobs)
    return found


_MOVES = ("submitted", "claimed", "requeued", "paused", "prepared", *TERMINAL_TYPES)


def _place_after(before: str, event: Event) -> str:
    if event["type"] in TERMINAL_TYPES:
        return "ended"
    if event["type"] == "claimed" and event["data"]["stage"] == "train":
        return "training"
    return "back" if before in ("training", "back") else "queued"


def _exceeded(job_id: str, do: str, count: int, limit: int | None) -> list[str]:
    return [f"{job_id}: {count} jobs {do} then, and {limit} may"] if limit is not None and count > limit else []


def the_claim_was_fair(chosen: str, running: Mapping[str, int], shares: Mapping[str, float]) -> None:
    """Of the tenants that wait, the one is chosen of which less runs than of any other, by its share."""
    by_share = {tenant: running[tenant] / share for tenant, share in shares.items()}
    assert by_share[chosen] == min(by_share.values()), (chosen, by_share)


def a_foreign_id_answers_as_an_unknown_one(foreign: Answered, unknown: Answered) -> None:
    """Nothing that an answer tells differs: its status, its headers, its bytes."""
    assert foreign == unknown


@dataclass(frozen=True)
class Answered:
    """All that an answer tells, with the ids that its caller brought and the ids of requests left out."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

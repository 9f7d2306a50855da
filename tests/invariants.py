"""What must hold of every job's history, whatever happened to it. One function each; reliability is judged by these."""

from __future__ import annotations

import itertools
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
    """An optimizer step as a toy trainer told it; `at` is CLOCK_BOOTTIME in seconds."""

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
    """The zombie steps: those of an epoch that were made after the first of a newer one of the same job."""
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
    return [max(0, before[-1] - after[0] + 1) for before, after in itertools.pairwise(_runs(steps))]


def accounting_closes(steps: Sequence[Step], needed: int) -> bool:
    """Whether every step was made, none twice in one run, and interruptions explain what was made again."""
    runs = _runs(steps)
    without_gaps = all(run == list(range(run[0], run[-1] + 1)) for run in runs)
    all_made = {step.number for step in steps} == set(range(1, needed + 1))
    return without_gaps and all_made and len(steps) - needed == sum(lost_by_interruption(steps))


def _runs(steps: Sequence[Step]) -> list[list[int]]:
    """The numbers of the steps of each run of a job, in the order in which they were made."""
    by_epoch: dict[int, list[int]] = {}
    for step in sorted(steps, key=lambda step: (step.epoch, step.at)):
        by_epoch.setdefault(step.epoch, []).append(step.number)
    return list(by_epoch.values())

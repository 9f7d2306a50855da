"""What must hold of one job after everything that befell it: functions over what was found, each an invariant."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graft_shared.artifacts import AdapterManifest
from graft_shared.jobs import REMEDIES, TERMINAL_STATES, FailureReason, Job, JobState, Retry
from tests import invariants
from tests.fakes.child import weights_after
from tests.invariants import TERMINAL_TYPES
from tests.witness import Step

Event = dict[str, Any]  # id, epoch, type, data, at (Unix seconds)

CLOCKS_AGREE_WITHIN_SECONDS = 0.01  # the database tells milliseconds, and a step is noted just after it was made
GPU_SECONDS_TOLERANCE = 0.3  # of a run: its two edges and their events have times of their own
LOST_NOTICED_WITHIN_SECONDS = 1.5  # a lost run is counted to its lease's end, and told of when a reconciler sees that


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of a job of a toy trainer once all faults are over."""

    job: Job
    events: Sequence[Event]
    steps: Sequence[Step]  # of this job, in the order they were made; `at` in Unix seconds
    objects: Mapping[str, bytes]  # of this job, by key
    steps_wanted: int
    save_steps: int
    kept_within_seconds: float  # a checkpoint may be lost that was made so shortly before its run was interrupted
    steps_under_way: int = 0  # that may come late: their deadline was checked before trainer and worker stood still
    stood_still_seconds: float = 0.0  # when nobody renewed, and a run is counted to its lease's end at least


def violations(evidence: Evidence) -> list[str]:
    """What does not hold, in words; empty when everything does."""
    late = steps_late(evidence.steps)
    if 0 < len(late) <= evidence.steps_under_way:
        evidence = replace(evidence, steps=[step for step in evidence.steps if step not in late])
    checks: tuple[Callable[[Evidence], None], ...] = (
        the_history_holds,
        no_trainer_stepped_after_a_newer_one,
        every_run_made_its_steps_in_turn,
        runs_began_after_the_last_checkpoint,
        what_was_saved_is_kept,
        the_steps_add_up,
        nothing_was_trained_after_the_end,
        the_row_is_what_its_events_tell,
        attempts_count_charged_runs_alone,
        gpu_time_was_counted_once,
        success_has_its_objects,
    )
    return [said for check in checks if (said := _said_by(check, evidence))]


def steps_late(steps: Sequence[Step]) -> list[Step]:
    """Those that were made after a step of a newer epoch."""
    late, newest = [], 0
    for step in steps:
        if step.epoch < newest:
            late.append(step)
        newest = max(newest, step.epoch)
    return late


def recovery_seconds(events: Sequence[Event], struck_at: float) -> float | None:
    """How long after a strike a newer epoch had the job, or it had ended; None if it had ended before."""
    before = max((event["epoch"] for event in events if event["at"] <= struck_at), default=0)
    ends = (e["at"] for e in events if e["type"] in TERMINAL_TYPES or (e["type"] == "claimed" and e["epoch"] > before))
    return next((round(at - struck_at, 3) for at in ends if at > struck_at), None)


def the_history_holds(evidence: Evidence) -> None:
    """The invariants of histories."""
    invariants.assert_history_holds(evidence.events)


def no_trainer_stepped_after_a_newer_one(evidence: Evidence) -> None:
    """Once an epoch has made a step, no older one does."""
    late = steps_late(evidence.steps)
    assert not late, late


def every_run_made_its_steps_in_turn(evidence: Evidence) -> None:
    """An epoch leaves out no step and makes none twice."""
    for numbers in _runs(evidence).values():
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), numbers


def runs_began_after_the_last_checkpoint(evidence: Evidence) -> None:
    """A claim goes on from the last checkpoint that was committed before it."""
    runs = _runs(evidence)
    for claim in _claims(evidence):
        stored = [e["data"]["step"] for e in _checkpoints(evidence) if e["id"] < claim["id"]]
        made = runs.get(claim["epoch"], [])
        assert made[:1] in ([], [max(stored, default=0) + 1]), (claim["epoch"], stored, made)


def what_was_saved_is_kept(evidence: Evidence) -> None:
    """An interruption costs the steps since the last checkpoint, and those made while another was on its way.

    How long one may be on its way is the trial's to say: a supervisor that is away for a lease has lost the job.
    """
    for claim in _claims(evidence)[:-1]:
        made = [step for step in evidence.steps if step.epoch == claim["epoch"]]
        stored = [
            e["data"]["step"] for e in evidence.events if e["type"] == "checkpoint" and e["epoch"] <= claim["epoch"]
        ]
        unsaved = [step for step in made if step.number >= max(stored, default=0) + evidence.save_steps]
        seconds = unsaved[-1].at - unsaved[0].at if unsaved else 0.0
        assert seconds <= evidence.kept_within_seconds, (claim["epoch"], stored, seconds)


def the_steps_add_up(evidence: Evidence) -> None:
    """Steps made by all epochs, less the steps that were needed, are the steps made again."""
    if evidence.job.state is JobState.SUCCEEDED:
        made, again = len(evidence.steps), sum(_redone(evidence).values())
        assert made - evidence.steps_wanted == again, (made, evidence.steps_wanted, again)


def nothing_was_trained_after_the_end(evidence: Evidence) -> None:
    """When a job says that it has ended, no trainer is at it any more."""
    ended = next((event["at"] for event in evidence.events if event["type"] in TERMINAL_TYPES), float("inf"))
    late = [step for step in evidence.steps if step.at > ended + CLOCKS_AGREE_WITHIN_SECONDS]
    assert not late, late


def the_row_is_what_its_events_tell(evidence: Evidence) -> None:
    """State, epoch, checkpoint and adapter follow from the history."""
    job, events = evidence.job, evidence.events
    assert job.state in TERMINAL_STATES, job.state
    assert job.state.value == events[-1]["type"], (job.state, events[-1]["type"])
    assert job.epoch >= max((event["epoch"] for event in events), default=0), job.epoch
    stored = _checkpoints(evidence)
    last = (stored[-1]["data"]["step"], stored[-1]["epoch"]) if stored else None
    assert (job.checkpoint and (job.checkpoint.step, job.checkpoint.epoch)) == last, (job.checkpoint, last)
    assert (job.adapter is not None) == (job.state is JobState.SUCCEEDED), job.adapter
    assert (job.worker, job.lease_expires_at, job.phase) == (None, None, None), (job.worker, job.lease_expires_at)


def attempts_count_charged_runs_alone(evidence: Evidence) -> None:
    """Each run that was charged cost one attempt, and the run that ended the job is one; lost runs cost none."""
    claims = _claims(evidence)
    if not claims:
        return
    requeued = [event for event in evidence.events if event["type"] == "requeued" and event["id"] > claims[0]["id"]]
    reasons = [event["data"]["reason"] for event in requeued]
    charged = sum(REMEDIES[FailureReason(reason)].retry is Retry.CHARGED for reason in reasons)
    ended_by_a_run = not requeued or requeued[-1]["id"] < claims[-1]["id"]  # or by a cancel while it was queued
    assert evidence.job.attempt == charged + ended_by_a_run, (evidence.job.attempt, reasons)


def gpu_time_was_counted_once(evidence: Evidence) -> None:
    """The time that training held a GPU is the sum over its runs, each from claim to end."""
    held, since, unseen = 0.0, None, evidence.stood_still_seconds
    runs = 0
    for event in evidence.events:
        if event["type"] == "claimed" and event["data"]["stage"] == "train":
            since, runs = event["at"], runs + 1
        elif since is not None and event["type"] in ("requeued", *TERMINAL_TYPES):
            held, since = held + event["at"] - since, None
            if event["data"].get("reason") == FailureReason.WORKER_LOST:
                unseen += LOST_NOTICED_WITHIN_SECONDS
    counted, tolerance = evidence.job.gpu_seconds, GPU_SECONDS_TOLERANCE * runs
    assert held - unseen - tolerance <= counted <= held + tolerance, (counted, held)


def success_has_its_objects(evidence: Evidence) -> None:
    """`succeeded` means that manifest and files are there as the row says, and hold what an unbroken run makes."""
    adapter = evidence.job.adapter
    if adapter is None:
        return
    written = adapter["manifest"]
    manifest = AdapterManifest.model_validate_json(_proven(evidence.objects, written["key"], written))
    assert manifest.epoch == adapter["epoch"]
    assert manifest.files
    for file in manifest.files:
        data = _proven(evidence.objects, adapter["prefix"] + file.name, file.model_dump())
        if file.name == "adapter_model.safetensors":
            assert data.decode() == weights_after(evidence.steps_wanted), "other weights than an unbroken run makes"


def _proven(objects: Mapping[str, bytes], key: str, said: Mapping[str, Any]) -> bytes:
    assert key in objects, f"{key} is missing"
    data = objects[key]
    assert (len(data), hashlib.sha256(data).hexdigest()) == (said["size"], said["sha256"]), f"{key} is not as recorded"
    return data


def _claims(evidence: Evidence) -> list[Event]:
    return [event for event in evidence.events if event["type"] == "claimed" and event["data"]["stage"] == "train"]


def _checkpoints(evidence: Evidence) -> list[Event]:
    return [event for event in evidence.events if event["type"] == "checkpoint"]


def _runs(evidence: Evidence) -> dict[int, list[int]]:
    """The steps that were made, by epoch."""
    runs: dict[int, list[int]] = {}
    for step in evidence.steps:
        runs.setdefault(step.epoch, []).append(step.number)
    return runs


def _redone(evidence: Evidence) -> dict[int, int]:
    """How many steps each epoch made that an earlier one had made, those without any left out."""
    redone, furthest = {}, 0
    for epoch, numbers in sorted(_runs(evidence).items()):
        again = sum(number <= furthest for number in numbers)
        if again:
            redone[epoch] = again
        furthest = max(furthest, *numbers)
    return redone


def _said_by(check: Callable[[Evidence], None], evidence: Evidence) -> str:
    try:
        check(evidence)
    except AssertionError as found:
        return f"{check.__name__}: {found}"
    return ""

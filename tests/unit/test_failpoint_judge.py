"""The judge of failpoint trials: a job that went well is acquitted, and each kind of wrong is named."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from graft_shared.artifacts import AdapterManifest, FileProof
from graft_shared.jobs import Checkpoint, Job, JobState, Stage, StoredObject
from tests.failpoints.judge import Evidence, recovery_seconds, steps_late, violations
from tests.fakes.child import weights_after
from tests.witness import Step

PREFIX = "tenants/t/jobs/j/e4/adapter/"
WEIGHTS = weights_after(6).encode()


def object_of(key: str, data: bytes) -> dict[str, Any]:
    return {"key": key, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def manifest() -> bytes:
    weights = object_of("", WEIGHTS)
    proof = FileProof(name="adapter_model.safetensors", size=weights["size"], sha256=weights["sha256"])
    facts: dict[str, Any] = {"base_model": "b", "base_revision": "r", "proof": {}, "versions": {}}
    return AdapterManifest(job_id="j", epoch=4, files=(proof,), **facts).to_bytes()


def event(number: int, epoch: int, type: str, at: float, **data: Any) -> dict[str, Any]:
    return {"id": number, "epoch": epoch, "type": type, "at": at, "data": data}


def a_history() -> list[dict[str, Any]]:
    """Prepared in epoch 1; trained to step 5 in epoch 2, which was lost; trained on from step 3 in epoch 4."""
    return [
        event(1, 0, "submitted", 0.0),
        event(2, 1, "claimed", 1.0, stage="prepare"),
        event(3, 1, "prepared", 2.0),
        event(4, 2, "claimed", 3.0, stage="train"),
        event(5, 2, "checkpoint", 3.5, step=3),
        event(6, 2, "requeued", 6.0, reason="worker_lost"),
        event(7, 4, "claimed", 7.0, stage="train"),
        event(8, 4, "checkpoint", 7.5, step=6),
        event(9, 4, "succeeded", 8.0),
    ]


def steps_of(epoch: int, numbers: range, since: float) -> list[Step]:
    return [Step("j", epoch, number, since + 0.1 * place) for place, number in enumerate(numbers)]


def a_job(**changes: Any) -> Job:
    moment = datetime.fromtimestamp(0, tz=UTC)
    stored = StoredObject(key="c", size=1, sha256="s")
    adapter = {"epoch": 4, "prefix": PREFIX, "manifest": object_of(PREFIX + "manifest.json", manifest())}
    facts: dict[str, Any] = {
        "id": "j", "tenant": "t", "state": JobState.SUCCEEDED, "stage": Stage.TRAIN, "epoch": 4, "attempt": 1,
        "runs_without_progress": 0, "spec": {}, "plan": {}, "placement": {}, "gpu_class": "cpu", "phase": None,
        "cancel_requested": False, "pause_requested": False, "progress": {}, "metrics": {}, "memory": {},
        "warnings": [], "error": None, "prepared": {}, "checkpoint": Checkpoint(step=6, epoch=4, object=stored),
        "adapter": adapter, "worker": None, "created_at": moment, "started_at": moment,
        "finished_at": moment, "claimed_at": moment, "lease_expires_at": None, "gpu_seconds": 4.0,
    }  # fmt: skip
    return Job(**{**facts, **changes})


def a_trial() -> Evidence:
    return Evidence(
        job=a_job(),
        events=a_history(),
        steps=[*steps_of(2, range(1, 6), 3.1), *steps_of(4, range(4, 7), 7.1)],
        objects={PREFIX + "manifest.json": manifest(), PREFIX + "adapter_model.safetensors": WEIGHTS},
        steps_wanted=6,
        save_steps=3,
        kept_within_seconds=2.0,
    )


def test_a_job_that_went_on_from_its_checkpoint_is_acquitted() -> None:
    assert violations(a_trial()) == []


def with_steps(*steps: Step) -> Callable[[Evidence], Evidence]:
    return lambda trial: replace(trial, steps=[*trial.steps, *steps])


def with_job(**changes: Any) -> Callable[[Evidence], Evidence]:
    return lambda trial: replace(trial, job=a_job(**changes))


def without_event(number: int) -> Callable[[Evidence], Evidence]:
    def change(trial: Evidence) -> Evidence:
        return replace(trial, events=[event for event in trial.events if event["id"] != number])

    return change


def began_at(first: int) -> Callable[[Evidence], Evidence]:
    """The second run of training begins with this step."""
    return lambda trial: replace(trial, steps=[*trial.steps[:5], *steps_of(4, range(first, 7), 7.1)])


def with_object(name: str, data: bytes) -> Callable[[Evidence], Evidence]:
    return lambda trial: replace(trial, objects={**trial.objects, PREFIX + name: data})


WRONGS: dict[str, tuple[Callable[[Evidence], Evidence], str]] = {
    "a gap in the history": (without_event(3), "the_history_holds"),
    "a zombie": (with_steps(Step("j", 2, 6, 7.9)), "no_trainer_stepped_after_a_newer_one"),
    "a step left out": (with_steps(Step("j", 4, 8, 7.9)), "every_run_made_its_steps_in_turn"),
    "begun before the checkpoint": (began_at(3), "runs_began_after_the_last_checkpoint"),
    "begun behind the checkpoint": (began_at(5), "runs_began_after_the_last_checkpoint"),
    "a step too many": (with_steps(Step("j", 4, 7, 7.9)), "the_steps_add_up"),
    "a step after the end": (with_steps(Step("j", 4, 7, 8.1)), "nothing_was_trained_after_the_end"),
    "another end than told": (with_job(state=JobState.FAILED, adapter=None), "the_row_is_what_its_events_tell"),
    "a lease that stays": (with_job(worker="w"), "the_row_is_what_its_events_tell"),
    "a lost run that was charged": (with_job(attempt=2), "attempts_count_charged_runs_alone"),
    "a run counted twice": (with_job(gpu_seconds=7.0), "gpu_time_was_counted_once"),
    "other weights": (with_object("adapter_model.safetensors", b"x" * len(WEIGHTS)), "success_has_its_objects"),
    "half a manifest": (with_object("manifest.json", manifest()[:50]), "success_has_its_objects"),
    "no adapter": (lambda trial: replace(trial, objects={}), "success_has_its_objects"),
}


@pytest.mark.parametrize("wrong", WRONGS)
def test_each_wrong_is_named(wrong: str) -> None:
    change, name = WRONGS[wrong]
    assert name in [said.partition(":")[0] for said in violations(change(a_trial()))]


def test_time_may_end_at_a_lease_that_nobody_could_renew_or_whose_end_was_seen_late() -> None:
    """The trial has one lost run, which a reconciler may see a second and a half late."""
    trial, counted = a_trial(), a_trial().job.gpu_seconds
    for stood_still, seconds, is_wrong in (
        (2, -3.5, False),
        (2, -5, True),
        (2, 2, True),
        (0, -1.5, False),
        (0, -3, True),
    ):
        changed = replace(with_job(gpu_seconds=counted + seconds)(trial), stood_still_seconds=stood_still)
        assert bool(violations(changed)) is is_wrong


def test_a_job_that_was_cancelled_while_it_was_queued_again_has_cost_no_attempt() -> None:
    trial = a_trial()
    events = [*trial.events[:6], event(7, 2, "cancelled", 6.5)]
    checkpoint = Checkpoint(step=3, epoch=2, object=StoredObject(key="c", size=1, sha256="s"))
    ended = {"state": JobState.CANCELLED, "adapter": None, "checkpoint": checkpoint, "gpu_seconds": 3.0}
    cancelled = replace(trial, events=events, steps=trial.steps[:5])
    assert violations(replace(cancelled, job=a_job(attempt=0, **ended))) == []
    assert violations(replace(cancelled, job=a_job(attempt=1, **ended))) != []


def test_a_checkpoint_that_was_long_made_and_is_lost_is_named() -> None:
    trial = a_trial()
    events = [event for event in trial.events if event["type"] != "checkpoint"]
    steps = [*steps_of(2, range(1, 6), 3.1), *steps_of(4, range(1, 7), 7.1)]
    lost = replace(trial, events=events, steps=steps, kept_within_seconds=0.1)
    assert "what_was_saved_is_kept" in [said.partition(":")[0] for said in violations(lost)]


def test_a_step_that_was_under_way_may_come_late_and_a_second_may_not() -> None:
    late = [Step("j", 2, 6, 7.9), Step("j", 2, 7, 7.95)]
    assert violations(replace(with_steps(late[0])(a_trial()), steps_under_way=1)) == []
    assert violations(replace(with_steps(*late)(a_trial()), steps_under_way=1)) != []
    assert steps_late([*a_trial().steps, *late]) == late


def test_recovery_is_the_time_until_a_newer_epoch_has_the_job() -> None:
    assert recovery_seconds(a_history(), struck_at=3.9) == pytest.approx(3.1)
    assert recovery_seconds(a_history(), struck_at=7.9) == pytest.approx(0.1)
    assert recovery_seconds(a_history(), struck_at=9.0) is None

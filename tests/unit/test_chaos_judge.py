"""The judge of chaos: a job that was interrupted and ended well is acquitted, and each broken promise is named."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from graft_shared.artifacts import MANIFEST_NAME, AdapterManifest, FileProof
from graft_shared.buckets.directory import DirectoryBucket
from graft_shared.jobs import Job, JobState, Stage
from tests.chaos.clients import SAVE_STEPS, STEP_SECONDS, Submitted
from tests.chaos.faults import Hit
from tests.chaos.judge import MAY_LOSE, Evidence, judge, told_as_the_jobs_own
from tests.fakes.child import weights_after
from tests.invariants import Event, Step

STEPS = 200
LEASE_SECONDS = 4.0
A_LEASE = int(LEASE_SECONDS / STEP_SECONDS)
PREFIX = "tenants/t/jobs/j/e9/adapter/"
THERE = datetime(2026, 1, 1, tzinfo=UTC)

Run = tuple[int, int, int]  # epoch, first step, last step


def a_job(bucket: DirectoryBucket, *, weights: bytes | None) -> Job:
    """One that succeeded, with these weights in the bucket, or without a file."""
    files = ()
    if weights is not None:
        bucket.put_bytes(PREFIX + "adapter_model.safetensors", weights)
        sha256 = hashlib.sha256(weights).hexdigest()
        files = (FileProof(name="adapter_model.safetensors", size=len(weights), sha256=sha256),)
    facts: dict[str, Any] = {"base_model": "b", "base_revision": "r", "proof": {}, "versions": {}}
    manifest = AdapterManifest(job_id="j", epoch=9, files=files, **facts)
    written = asdict(bucket.put_bytes(PREFIX + MANIFEST_NAME, manifest.to_bytes()))
    nothing: dict[str, Any] = dict.fromkeys(("phase", "error", "prepared", "checkpoint", "worker", "lease_expires_at"))
    empty: dict[str, Any] = {name: {} for name in ("spec", "plan", "placement", "progress", "metrics", "memory")}
    times: dict[str, Any] = dict.fromkeys(("created_at", "started_at", "finished_at", "claimed_at"), THERE)
    return Job(
        id="j",
        tenant="t",
        state=JobState.SUCCEEDED,
        stage=Stage.TRAIN,
        epoch=9,
        attempt=1,
        runs_without_progress=0,
        gpu_class="cpu",
        cancel_requested=False,
        pause_requested=False,
        warnings=[],
        gpu_seconds=0,
        adapter={"prefix": PREFIX, "manifest": written},
        **nothing,
        **empty,
        **times,
    )


def steps_of(runs: Sequence[Run]) -> list[Step]:
    made = [(epoch, number) for epoch, first, last in runs for number in range(first, last + 1)]
    return [Step("j", epoch, number, at * STEP_SECONDS) for at, (epoch, number) in enumerate(made)]


def events_of(runs: Sequence[Run], saved_in: Sequence[int], reason: str) -> list[Event]:
    told: list[tuple[str, int, dict[str, Any]]] = [("submitted", 0, {})]
    for epoch, first, last in runs:
        told.append(("claimed", epoch, {"stage": "train"}))
        saved = range(first + -first % SAVE_STEPS, last + 1, SAVE_STEPS) if epoch in saved_in else ()
        told += [("checkpoint", epoch, {"step": step}) for step in saved]
        told.append(("requeued", epoch, {"reason": reason}))
    told[-1] = ("succeeded", runs[-1][0], {})
    return [{"id": id, "type": type, "epoch": epoch, "data": data} for id, (type, epoch, data) in enumerate(told, 1)]


def evidence(
    folder: Path,
    runs: Sequence[Run],
    *,
    saved_in: Sequence[int] = (2, 3),
    reason: str = "worker_lost",
    hits: Sequence[Hit] = (),
    one_lock: bool = False,
    weights: bytes | None = weights_after(STEPS).encode(),
) -> Evidence:
    bucket = DirectoryBucket(folder)
    return Evidence(
        jobs={"j": a_job(bucket, weights=weights)},
        events={"j": events_of(runs, saved_in, reason)},
        steps={"j": steps_of(runs)},
        submitted=[Submitted(key="k", steps=STEPS, ids={"j"})],
        hits=hits,
        bucket=bucket,
        lease_seconds=LEASE_SECONDS,
        one_lock=one_lock,
    )


def frozen(job_id: str, at: float) -> Hit:
    return Hit("freeze_supervisor", at, job_id, 2)


NOTHING_KEPT = [(2, 1, MAY_LOSE + A_LEASE), (3, 1, STEPS)]


@pytest.mark.parametrize(
    "given",
    [
        {"runs": [(2, 1, STEPS)]},
        {"runs": [(2, 1, 103), (3, 101, STEPS)]},
        {"runs": NOTHING_KEPT, "saved_in": [3], "hits": [frozen("j", 0.5)]},
        {"runs": NOTHING_KEPT, "saved_in": [3], "hits": [Hit("stop_postgres", 0.5, "another", 2)]},
        {"runs": NOTHING_KEPT, "saved_in": [3], "hits": [frozen("another", 0.5)], "one_lock": True},
    ],
)
def test_a_lawful_run_is_acquitted(tmp_path: Path, given: dict[str, Any]) -> None:
    found = evidence(tmp_path, **given)
    assert judge(found).holds, judge(found).violations
    assert told_as_the_jobs_own(found.events) == []


COST = "an interruption costs a checkpoint interval, and a lease where nobody could commit"
RIGHT = "succeeded means that the adapter is there, and the right one"


@pytest.mark.parametrize(
    ("promise", "given"),
    [
        (COST, {"runs": NOTHING_KEPT, "saved_in": [3]}),
        (COST, {"runs": NOTHING_KEPT, "saved_in": [3], "hits": [frozen("another", 0.5)]}),
        (COST, {"runs": NOTHING_KEPT, "saved_in": [3], "hits": [frozen("j", 99.0)]}),
        (COST, {"runs": [(2, 1, MAY_LOSE + A_LEASE + 1), (3, 1, STEPS)], "saved_in": [3], "hits": [frozen("j", 0.5)]}),
        ("long runs are saved", {"runs": [(2, 1, STEPS)], "saved_in": []}),
        ("runs go on from the committed checkpoint", {"runs": [(2, 1, 103), (3, 99, STEPS)]}),
        ("the steps add up", {"runs": [(2, 1, 100), (3, 102, STEPS)]}),
        (RIGHT, {"runs": [(2, 1, STEPS)], "weights": None}),
        (RIGHT, {"runs": [(2, 1, STEPS)], "weights": weights_after(STEPS - 1).encode()}),
    ],
)
def test_a_broken_promise_is_named(tmp_path: Path, promise: str, given: dict[str, Any]) -> None:
    assert judge(evidence(tmp_path, **given)).violations[promise]


@pytest.mark.parametrize("reason", ["crash", "artifact_corrupt", "disk_full"])
def test_what_chaos_did_may_not_be_told_as_the_jobs_own(tmp_path: Path, reason: str) -> None:
    (said,) = told_as_the_jobs_own(evidence(tmp_path, [(2, 1, 103), (3, 101, STEPS)], reason=reason).events)
    assert reason in said

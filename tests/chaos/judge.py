"""What came of it: every promise held against the store, the bucket, the clients and the trainers' testimony."""

from __future__ import annotations

import hashlib
import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sqlalchemy import func, select, update

from graft_shared.artifacts import MANIFEST_NAME, AdapterManifest
from graft_shared.buckets import Bucket
from graft_shared.buckets.directory import DirectoryBucket
from graft_shared.jobs import MAX_RUNS_WITHOUT_PROGRESS, REMEDIES, TERMINAL_STATES, Job, JobState, Retry
from graft_shared.store import Database, open_database
from graft_shared.store.engine import now
from graft_shared.store.outbox import PAUSES
from graft_shared.store.rows import job_from
from graft_shared.store.tables import job_events, jobs, webhooks
from tests.chaos.clients import SAVE_STEPS, STEP_SECONDS, Submitted
from tests.chaos.faults import ENDS_THE_RUN, FROZEN_LEASES, Hit
from tests.chaos.receiver import Taken
from tests.chaos.service import ServiceInTrouble
from tests.fakes.child import weights_after
from tests.invariants import (
    Event,
    Message,
    Step,
    accounting_closes,
    assert_history_holds,
    lost_by_interruption,
    nobody_steps_after_a_newer_epoch,
    runs_begin_behind_their_checkpoint,
    runs_of,
    webhooks_are_delivered_or_exhausted,
)
from tests.witness import steps_made

# Steps, at one interruption: those until the next checkpoint is saved, those that are saved and not yet committed, and
# what is made in the seconds that a commit may take on a machine that has too much to do.
MAY_LOSE = 2 * SAVE_STEPS + int(4.0 / STEP_SECONDS)


@dataclass(frozen=True)
class Evidence:
    """Everything that is known after the service came to rest."""

    jobs: dict[str, Job]
    events: dict[str, list[Event]]
    steps: dict[str, list[Step]]
    submitted: Sequence[Submitted]
    hits: Sequence[Hit]
    bucket: Bucket
    lease_seconds: float
    one_lock: bool  # a process that is frozen in a transaction keeps all others from writing
    away: bool = False  # nobody could commit for a while, whatever was hit
    messages: Sequence[Message] = ()

    @cached_property
    def by_id(self) -> dict[str, Submitted]:
        return {job_id: submitted for submitted in self.submitted for job_id in submitted.ids}


@dataclass
class Verdict:
    """What was found, by promise."""

    violations: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def note(self, promise: str, found: Iterable[str]) -> None:
        """Remember what broke a promise."""
        self.violations[promise] += found

    @property
    def holds(self) -> bool:
        return not any(self.violations.values())


def gather(
    service: ServiceInTrouble,
    submitted: Sequence[Submitted],
    hits: Sequence[Hit],
    bucket: Bucket | None = None,
    *,
    away: bool = False,
) -> Evidence:
    """Read the store, the bucket (the service's folder, if no other is given) and the testimonies, past the service.

    Args:
        away: Store or bucket were not to be had for a while, so that nobody could commit.
    """
    database = open_database(service.database_url)
    steps: dict[str, list[Step]] = defaultdict(list)
    for step in steps_made(service.state_dir):
        steps[step.job_id].append(step)
    try:
        return Evidence(
            jobs=_jobs(database),
            events=_events(database),
            steps=steps,
            submitted=submitted,
            hits=hits,
            bucket=bucket or DirectoryBucket(service.state_dir / "bucket"),
            lease_seconds=service.lease_seconds,
            one_lock=service.postgres is None,
            away=away,
            messages=_messages(database),
        )
    finally:
        database.close()


def undelivered(database: Database) -> int:
    """Let what waits for its next try wait no longer; return how many messages there are still to deliver."""
    due = webhooks.c.next_try_at.is_not(None)
    with database.writing() as connection:
        connection.execute(update(webhooks).where(due).values(next_try_at=now()))
        return int(connection.execute(select(func.count()).select_from(webhooks).where(due)).scalar_one())


def unfinished(database: Database) -> int:
    """How many jobs have not ended."""
    with database.reading() as connection:
        states = connection.execute(select(jobs.c.state)).scalars().all()
    return sum(JobState(state) not in TERMINAL_STATES for state in states)


def judge(evidence: Evidence) -> Verdict:
    """Hold every promise against the evidence."""
    verdict = Verdict()
    verdict.note("every accepted job exists", _lost(evidence))
    verdict.note("a key makes one job", _doubled(evidence))
    for job_id, job in evidence.jobs.items():
        steps, events = evidence.steps.get(job_id, []), evidence.events[job_id]
        verdict.note("every job ends", [] if job.state in TERMINAL_STATES else [f"{job_id} is {job.state}"])
        verdict.note("the history holds", _broken(job_id, lambda events=events: assert_history_holds(events)))
        verdict.note("no step of an old epoch after a newer one", nobody_steps_after_a_newer_epoch(steps))
        verdict.note("runs go on from the committed checkpoint", runs_begin_behind_their_checkpoint(events, steps))
        verdict.note("nothing runs after it was told to be cancelled", _steps_after_cancel(evidence, job_id, steps))
        verdict.note("a failure is a lawful one", _unlawful_failure(job, events))
        if job.state is JobState.SUCCEEDED:
            verdict.note("succeeded means that the adapter is there, and the right one", _adapter(evidence, job))
            closes = accounting_closes(steps, evidence.by_id[job_id].steps) if job_id in evidence.by_id else True
            too_many = _too_many_lost(evidence, job_id, steps)
            verdict.note("an interruption costs a checkpoint interval, and a lease where nobody could commit", too_many)
            verdict.note("long runs are saved", _never_saved(job_id, steps, events))
            verdict.note("the steps add up", [] if closes else [f"{job_id}: {len(steps)} steps"])
    return verdict


def told_as_the_jobs_own(events: Mapping[str, Sequence[Event]]) -> list[str]:
    """The runs that chaos ended and that were charged to the job, or said to have ended by what lies in it."""
    free = {reason.value for reason, remedy in REMEDIES.items() if remedy.retry in (Retry.FREE, Retry.UNCOUNTED)}
    return [
        f"{job_id}: {event['data']['reason']} in epoch {event['epoch']}"
        for job_id, history in events.items()
        for event in history
        if event["type"] == "requeued" and event["data"]["reason"] not in free
    ]


def judge_webhooks(evidence: Evidence, taken: Sequence[Taken]) -> list[str]:
    """What is wrong with what the receiver of all jobs' webhooks was told."""
    return webhooks_are_delivered_or_exhausted(
        {job_id: job.state.value for job_id, job in evidence.jobs.items()},
        evidence.messages,
        {(message.id, message.job_id, message.type) for message in taken},
        most_tries=len(PAUSES) + 1,
    )


def figures(evidence: Evidence) -> dict[str, Any]:
    """The numbers of the report."""
    outcomes = Counter(_outcome(job) for job in evidence.jobs.values())
    succeeded = [job_id for job_id, job in evidence.jobs.items() if job.state is JobState.SUCCEEDED]
    lost = [count for job_id in succeeded for count in lost_by_interruption(evidence.steps[job_id])]
    made = sum(len(evidence.steps[job_id]) for job_id in succeeded)
    needed = sum(evidence.by_id[job_id].steps for job_id in succeeded)
    return {
        "jobs": {"accepted": len(evidence.by_id), **dict(outcomes)},
        "steps": {"made": made, "needed": needed, "redone": made - needed},
        "steps_lost_by_interruption": {"save_steps": SAVE_STEPS, **spread(lost)},
        "faults_that_hit_a_running_job": dict(Counter(hit.fault for hit in _first_of_each(evidence.hits))),
        "jobs_hit": dict(Counter(hit.fault for hit in evidence.hits)),
        "seconds_to_next_step": {fault: spread(times) for fault, times in sorted(_recoveries(evidence).items())},
    }


def spread(numbers: Sequence[float]) -> dict[str, float]:
    """Their count, median, 95th percentile and highest, to a thousandth."""
    if not numbers:
        return {"count": 0}
    ordered = sorted(numbers)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    facts = {"p50": statistics.median(ordered), "p95": p95, "highest": ordered[-1]}
    return {"count": len(ordered), **{name: round(value, 3) for name, value in facts.items()}}


def _lost(evidence: Evidence) -> Iterator[str]:
    return (f"{job_id} was accepted and is gone" for job_id in evidence.by_id if job_id not in evidence.jobs)


def _doubled(evidence: Evidence) -> Iterator[str]:
    yield from (f"{job.key} is {sorted(job.ids)}" for job in evidence.submitted if len(job.ids) != 1)
    yield from (f"nobody was told of {job_id}" for job_id in evidence.jobs if job_id not in evidence.by_id)


def _broken(job_id: str, check: Callable[[], None]) -> list[str]:
    try:
        check()
    except AssertionError as error:
        return [f"{job_id}: {error}"]
    return []


def _steps_after_cancel(evidence: Evidence, job_id: str, steps: Sequence[Step]) -> list[str]:
    told = evidence.by_id[job_id].cancelled_at if job_id in evidence.by_id else None
    return [f"{job_id}: step {step.number}" for step in steps if told is not None and step.at > told]


def _too_many_lost(evidence: Evidence, job_id: str, steps: Sequence[Step]) -> list[str]:
    """Interruptions that cost more than what was under way, or more than a lease where nobody could commit."""
    found = []
    for before, after in itertools.pairwise(runs_of(steps)):
        lost = [step for step in before if step.number >= after[0].number]
        if len(lost) > MAY_LOSE and not (
            len(lost) <= MAY_LOSE + evidence.lease_seconds / STEP_SECONDS
            and (evidence.away or _nobody_could_commit(evidence, job_id, lost))
        ):
            found.append(f"{job_id}: {len(lost)} steps of epoch {before[0].epoch}")
    return found


def _nobody_could_commit(evidence: Evidence, job_id: str, lost: Sequence[Step]) -> bool:
    """Whether, while these steps were made, the job's supervisor stood still, or the database did.

    A trainer whose supervisor stands still goes on until its deadline.
    """
    began, ended = lost[0].at - FROZEN_LEASES * evidence.lease_seconds, lost[-1].at
    during = [hit for hit in evidence.hits if began <= hit.at <= ended]
    return any(
        hit.fault == "stop_postgres"
        or (hit.fault in ("freeze_supervisor", "freeze_worker") and (evidence.one_lock or hit.job_id == job_id))
        for hit in during
    )


def _never_saved(job_id: str, steps: Sequence[Step], events: Sequence[Event]) -> list[str]:
    saved = any(event["type"] == "checkpoint" for event in events)
    return [f"{job_id}: {len(steps)} steps"] if len(steps) > MAY_LOSE and not saved else []


def _unlawful_failure(job: Job, events: Sequence[Event]) -> list[str]:
    """A job may fail here only as poison: lost or drained, so many times in a row, without a checkpoint between."""
    if job.state is not JobState.FAILED:
        return []
    ends = [event for event in events if event["type"] in ("requeued", "failed", "checkpoint", "prepared")]
    last = ends[-MAX_RUNS_WITHOUT_PROGRESS:]
    poison = all(
        event["type"] in ("requeued", "failed") and event["data"]["reason"] in ("worker_lost", "drained")
        for event in last
    )
    return [] if poison and len(last) == MAX_RUNS_WITHOUT_PROGRESS else [f"{job.id}: {job.error}"]


def _adapter(evidence: Evidence, job: Job) -> Iterator[str]:
    assert job.adapter is not None
    prefix = job.adapter["prefix"]
    content = evidence.bucket.open(prefix + MANIFEST_NAME).read()
    if hashlib.sha256(content).hexdigest() != job.adapter["manifest"]["sha256"]:
        yield f"{job.id}: the manifest is not the one that the row names"
    files = AdapterManifest.model_validate_json(content).files
    if "adapter_model.safetensors" not in {file.name for file in files}:
        yield f"{job.id}: there are no weights among {[file.name for file in files]}"
    for file in files:
        stored = evidence.bucket.open(prefix + file.name).read()
        if (len(stored), hashlib.sha256(stored).hexdigest()) != (file.size, file.sha256):
            yield f"{job.id}: {file.name} is not what the manifest says"
        if job.id in evidence.by_id and stored.decode() != weights_after(evidence.by_id[job.id].steps):
            yield f"{job.id}: {file.name} is not what an uninterrupted run makes"


def _outcome(job: Job) -> str:
    return f"failed: {job.error['code']}" if job.error else job.state.value


def _first_of_each(hits: Sequence[Hit]) -> list[Hit]:
    """One hit of each fault, however many jobs ran."""
    return list({(hit.fault, hit.at): hit for hit in hits}.values())


def _recoveries(evidence: Evidence) -> dict[str, list[float]]:
    """By fault: seconds until the job's next step, for jobs that nothing else hit in between and that went on."""
    found: dict[str, list[float]] = defaultdict(list)
    by_job: dict[str, list[Hit]] = defaultdict(list)
    for hit in evidence.hits:
        by_job[hit.job_id].append(hit)
    for job_id, hits in by_job.items():
        steps = sorted(evidence.steps.get(job_id, []), key=lambda step: step.at)
        ends = [hit.at for hit in hits[1:]] + [float("inf")]
        for hit, until in zip(hits, ends, strict=True):
            epoch = hit.epoch + (hit.fault in ENDS_THE_RUN)
            next_step = next((step for step in steps if step.at > hit.at and step.epoch >= epoch), None)
            if next_step is not None and next_step.at < until:
                found[hit.fault].append(next_step.at - hit.at)
    return found


def _jobs(database: Database) -> dict[str, Job]:
    with database.reading() as connection:
        return {row["id"]: job_from(row) for row in connection.execute(select(jobs)).mappings()}


def _messages(database: Database) -> list[Message]:
    with database.reading() as connection:
        return [
            Message(
                id=row["id"],
                job_id=row["job_id"],
                type=row["type"],
                tries=row["tries"],
                is_delivered=row["delivered_at"] is not None,
                is_due=row["next_try_at"] is not None,
            )
            for row in connection.execute(select(webhooks)).mappings()
        ]


def _events(database: Database) -> dict[str, list[Event]]:
    found: dict[str, list[Event]] = defaultdict(list)
    query = select(job_events).order_by(job_events.c.job_id, job_events.c.id)
    with database.reading() as connection:
        for row in connection.execute(query).mappings():
            found[row["job_id"]].append({name: row[name] for name in ("id", "type", "epoch", "data", "created_at")})
    return found

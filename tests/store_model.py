"""What the store must do, once more, in plain Python and without a database: the model that it is held against.

Nothing here is read from the store's code but the names of its errors: numbers and tables stand here a second time.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from graft_shared.errors import (
    IdempotencyConflict,
    JobCancelling,
    JobFinished,
    JobNotEnded,
    JobNotFound,
    LeaseLost,
    QuotaExceeded,
    WorkerNameTaken,
)
from tests.fakes.clock import FakeClock

LEASE_SECONDS = 60.0
ALIVE_SECONDS = 45.0
REMEMBERED_SECONDS = 86_400.0
RETRY_SECONDS = 5.0
AWAY_SECONDS = 90.0  # instead, where a neighbour or room was missing
SWEEP_SECONDS = 60.0
DAY_SECONDS = 86_400.0
INDISTINCT_SECONDS = 1e-3  # of use: nobody can say which of two tenants that are so near is next
POISON_RUNS = 5
PRIORITIES = {"low": 0, "normal": 1, "high": 2}
FREE = {"worker_lost", "drained"}
AWAY = {"disk_full", "base_model_unavailable", "artifact_upload_failed"}
CHARGED = AWAY | {"host_out_of_memory", "artifact_corrupt", "adapter_not_proven", "crash"}
ENDED = {"succeeded", "failed", "cancelled"}


@dataclass(kw_only=True)
class ModelJob:
    """A row, by the names of its columns, and the types and epochs of its events."""

    id: str
    tenant: str
    gpu_class: str
    priority: int
    max_attempts: int
    idempotency_key: str | None
    request_sha256: str
    sent_before: int | None
    created_at: float
    not_before: float
    state: str = "queued"
    stage: str = "prepare"
    epoch: int = 0
    attempt: int = 0
    runs_without_progress: int = 0
    phase: str | None = None
    cancel_requested: bool = False
    pause_requested: bool = False
    plan: dict[str, Any] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None  # its code
    prepared: dict[str, Any] | None = None
    checkpoint: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None
    worker: str | None = None
    bell_rung_at: float | None = None
    claimed_at: float | None = None
    lease_expires_at: float | None = None
    started_at: float | None = None
    finished_at: float | None = None
    gpu_seconds: float = 0.0
    sweep_at: float | None = None
    deleted_at: float | None = None
    history: list[tuple[str, int]] = field(default_factory=lambda: [("submitted", 0)])

    @property
    def status(self) -> str:
        """The word that users see."""
        if self.state in ENDED:
            return self.state
        if self.cancel_requested:
            return "cancelling"
        if self.pause_requested:
            return "pausing" if self.state == "running" else "paused"
        return "validating_files" if self.stage == "prepare" else self.state

    @property
    def waits(self) -> bool:
        """Whether it is in the queue for a worker."""
        return self.state == "queued" and not self.pause_requested

    def tell(self, type: str, epoch: int | None = None) -> None:
        self.history.append((type, self.epoch if epoch is None else epoch))

    def let_go(self, state: str) -> None:
        self.state, self.worker, self.lease_expires_at, self.phase = state, None, None, None

    def end(self, state: str, now: float) -> None:
        self.let_go(state)
        self.finished_at = now
        self.tell(state)


@dataclass(kw_only=True)
class ModelWorker:
    """A live worker, or one that was seen once."""

    name: str
    place: str
    stages: tuple[str, ...]
    takes_classes: tuple[str, ...]
    seen_at: float
    started_at: float = 0.0  # at this place


@dataclass(frozen=True)
class ModelRun:
    """A run that has ended."""

    tenant: str
    stage: str
    ended_at: float
    seconds: float


@dataclass
class StoreModel:
    """The store's doors, all in one. A method raises what the store must raise, and then has changed nothing."""

    clock: FakeClock
    defaults: dict[str, float | None]  # the quotas of a tenant of which nothing was said
    jobs: dict[str, ModelJob] = field(default_factory=dict)
    workers: dict[str, ModelWorker] = field(default_factory=dict)
    files: dict[str, tuple[str, int]] = field(default_factory=dict)  # their tenants and sizes
    said: dict[str, dict[str, float | None]] = field(default_factory=dict)  # of tenants, by the operator
    runs: list[ModelRun] = field(default_factory=list)

    # The tenants' door.

    def submit(self, new: ModelJob, first_at: float | None) -> tuple[str, bool]:
        """`first_at`: when the request was sent first, if its client counts."""
        own = [job for job in self.jobs.values() if job.tenant == new.tenant]
        if first_at is not None:
            made = [job for job in own if self._was_made_by(job, new, first_at)]
            if made:
                return made[-1].id, False
        for earlier in own:
            if earlier.idempotency_key == new.idempotency_key is not None:
                if earlier.request_sha256 != new.request_sha256:
                    raise IdempotencyConflict(job_id=earlier.id)
                return earlier.id, False
        self._require_place(new.tenant)
        self.jobs[new.id] = new
        return new.id, True

    def _was_made_by(self, job: ModelJob, new: ModelJob, first_at: float) -> bool:
        """Whether a job may be of an earlier sending of the request that is sent now, or of a faster one."""
        same = job.deleted_at is None and job.request_sha256 == new.request_sha256 and job.created_at > first_at - 0.002
        counted = job.sent_before is not None if new.sent_before else (job.sent_before or 0) > 0
        return same and counted

    def _require_place(self, tenant: str) -> None:
        hours, places = self.limit(tenant, "gpu_hours"), self.limit(tenant, "queued_jobs")
        if hours is not None and self.gpu_seconds(tenant) >= hours * 3600:
            raise QuotaExceeded(quota="gpu_hours", limit=hours, used=self.gpu_seconds(tenant))
        if places is not None and self.waiting(tenant) >= places:
            raise QuotaExceeded(quota="queued_jobs", limit=places, used=self.waiting(tenant))

    def add_file(self, file_id: str, tenant: str, size: int) -> None:
        limit, stored = self.limit(tenant, "stored_bytes"), self.stored_bytes(tenant)
        if limit is not None and stored + size > limit:
            raise QuotaExceeded(quota="stored_bytes", limit=limit, used=stored)
        self.files[file_id] = (tenant, size)

    def delete(self, tenant: str, job_id: str) -> None:
        job = self.of_tenant(tenant, job_id)
        if job.state not in ENDED:
            raise JobNotEnded(job_id=job_id, status=job.status)
        job.deleted_at = job.sweep_at = self.clock.now
        job.idempotency_key = None

    def cancel(self, tenant: str, job_id: str) -> ModelJob:
        job = self.of_tenant(tenant, job_id)
        if job.state in ("succeeded", "failed"):
            raise JobFinished(job_id=job_id, status=job.state)
        if job.state == "cancelled" or job.cancel_requested:
            return job
        job.cancel_requested = True
        if job.state == "queued":
            job.end("cancelled", self.clock.now)
        else:
            job.tell("cancel_requested")
        return job

    def pause(self, tenant: str, job_id: str) -> ModelJob:
        job = self._with_a_future(tenant, job_id)
        if not job.pause_requested:
            job.pause_requested = True
            job.tell("paused" if job.state == "queued" else "pause_requested")
        return job

    def resume(self, tenant: str, job_id: str) -> ModelJob:
        job = self._with_a_future(tenant, job_id)
        if job.pause_requested:
            job.pause_requested, job.bell_rung_at = False, None
            job.tell("resumed")
        return job

    def _with_a_future(self, tenant: str, job_id: str) -> ModelJob:
        job = self.of_tenant(tenant, job_id)
        if job.state in ENDED:
            raise JobFinished(job_id=job_id, status=job.state)
        if job.cancel_requested:
            raise JobCancelling(job_id=job_id)
        return job

    def of_tenant(self, tenant: str, job_id: str) -> ModelJob:
        job = self.jobs.get(job_id)
        if job is None or job.tenant != tenant or job.deleted_at is not None:
            raise JobNotFound(job_id=job_id)
        return job

    def place_in_line(self, job: ModelJob) -> tuple[int | None, str | None] | None:
        """The number of the claim that takes it, counted by claiming; or the quota that holds it back."""
        if not job.waits:
            return None
        held_by = self.held_by(job.tenant, job.stage, Counter())
        if held_by is not None:
            return None, held_by
        queue = [other for other in self.jobs.values() if other.waits and _queue(other) == _queue(job)]
        left = [other for other in queue if other is job or other.not_before <= self.clock.now]
        claimed: Counter[str] = Counter()
        while True:
            able = [o for o in left if o.tenant == job.tenant or self.held_by(o.tenant, o.stage, claimed) is None]
            best = min(able, key=lambda other: self._rank(other, job.stage, [job.gpu_class], claimed))
            claimed[best.tenant] += 1
            left.remove(best)
            if best is job:
                return claimed.total(), None

    def can_tell_who_is_next(self, stage: str) -> bool:
        """Whether no two tenants that wait have used so equally much that clocks decide."""
        tenants = {job.tenant for job in self.jobs.values() if job.waits}
        used = sorted(self._lately(tenant, stage) / self.share(tenant) for tenant in tenants)
        return all(more == 0 or more - less > INDISTINCT_SECONDS for less, more in itertools.pairwise(used))

    # The operator's.

    def limit(self, tenant: str, quota: str) -> float | None:
        own = self.said.get(tenant, {}).get(quota)
        return self.defaults[quota] if own is None else own

    def share(self, tenant: str) -> float:
        return self.said.get(tenant, {}).get("share") or 1.0

    def waiting(self, tenant: str) -> int:
        own = [job for job in self.jobs.values() if job.tenant == tenant]
        return sum(job.state == "queued" or (job.state, job.stage) == ("running", "prepare") for job in own)

    def training(self, tenant: str) -> int:
        return len(self._running(tenant, "train"))

    def stored_bytes(self, tenant: str) -> int:
        return sum(size for owner, size in self.files.values() if owner == tenant)

    def gpu_seconds(self, tenant: str) -> float:
        """Since the month began, of runs that have ended in it and those that are at it."""
        moment = datetime.fromtimestamp(self.clock.now, UTC)
        began = moment.replace(day=1, hour=0, minute=0, second=0, microsecond=0).timestamp()
        return self._used(tenant, "train", began)

    def held_by(self, tenant: str, stage: str, claimed: Counter[str]) -> str | None:
        """The quota that lets no further run begin, when so many have been claimed beside those that run."""
        runs, hours = self.limit(tenant, "running_jobs"), self.limit(tenant, "gpu_hours")
        if stage == "train" and hours is not None and self.gpu_seconds(tenant) >= hours * 3600:
            return "gpu_hours"
        if stage == "train" and runs is not None and self.training(tenant) + claimed[tenant] >= runs:
            return "running_jobs"
        return None

    # The workers' door.

    def claim(self, holder: str, stage: str, gpu_classes: list[str], taken: str | None) -> ModelJob | None:
        """`taken`: what the store took; heeded where it cannot be said which of two tenants is next."""
        able = [job for job in self.jobs.values() if self._is_ready(job, stage)]
        able = [job for job in able if self.held_by(job.tenant, stage, Counter()) is None]
        if stage == "train":
            able = [job for job in able if job.gpu_class in gpu_classes]
        if not able:
            return None

        def rank(job: ModelJob) -> tuple[float, ...]:
            return self._rank(job, stage, gpu_classes, Counter())

        job = min(able, key=rank)
        firsts = {other.tenant: other for other in sorted(able, key=rank, reverse=True)}.values()
        as_good = [other for other in firsts if self._is_as_good(other, job, stage, gpu_classes)]
        job = next((other for other in as_good if other.id == taken), job)
        now = self.clock.now
        job.state, job.worker, job.phase = "running", holder, "fetching"
        job.epoch, job.attempt = job.epoch + 1, job.attempt + 1
        job.claimed_at, job.started_at = now, job.started_at or now
        job.lease_expires_at, job.sweep_at = now + LEASE_SECONDS, now + SWEEP_SECONDS
        job.tell("claimed")
        return job

    def orders(self, job_id: str, epoch: int) -> tuple[bool, bool]:
        """Whether to cancel, and whether to pause."""
        job = self.held(job_id, epoch)
        return job.cancel_requested, job.pause_requested

    def renew(self, job_id: str, epoch: int) -> tuple[bool, bool]:
        self.held(job_id, epoch).lease_expires_at = self.clock.now + LEASE_SECONDS
        return self.orders(job_id, epoch)

    def record_phase(self, job_id: str, epoch: int, phase: str) -> None:
        job = self.held(job_id, epoch)
        job.phase = phase
        job.tell("phase")

    def record_progress(self, job_id: str, epoch: int, progress: dict[str, Any], metrics: dict[str, Any]) -> None:
        job = self.held(job_id, epoch)
        job.progress, job.metrics = progress, job.metrics | metrics
        job.tell("metrics")

    def record_warning(self, job_id: str, epoch: int, code: str, message: str) -> None:
        job = self.held(job_id, epoch)
        warning = {"code": code, "message": message}
        if warning not in job.warnings:
            job.warnings = [*job.warnings, warning]
            job.tell("warning")

    def commit_checkpoint(self, job_id: str, epoch: int, checkpoint: dict[str, Any]) -> None:
        job = self.held(job_id, epoch)
        if job.checkpoint is not None and checkpoint["step"] < job.checkpoint["step"]:
            raise ValueError("it lies behind")
        job.checkpoint = checkpoint
        job.lease_expires_at = self.clock.now + LEASE_SECONDS
        job.tell("checkpoint")

    def hand_to_training(self, job_id: str, epoch: int, prepared: dict[str, Any]) -> ModelJob:
        job = self.held(job_id, epoch)
        self._charge(job)
        job.let_go("queued")
        job.stage, job.prepared, job.attempt, job.runs_without_progress = "train", prepared, 0, 0
        job.bell_rung_at = None
        job.tell("prepared")
        if job.cancel_requested:
            job.end("cancelled", self.clock.now)
        elif job.pause_requested:
            job.tell("paused")
        return job

    def settle_success(
        self, job_id: str, epoch: int, adapter: dict[str, Any], metrics: dict[str, Any], memory: dict[str, Any]
    ) -> None:
        job = self.held(job_id, epoch)
        self._charge(job)
        job.adapter, job.metrics, job.memory = adapter, job.metrics | metrics, memory
        job.end("succeeded", self.clock.now)

    def settle_cancelled(self, job_id: str, epoch: int) -> ModelJob:
        job = self.held(job_id, epoch)
        self._charge(job)
        job.end("cancelled", self.clock.now)
        return job

    def settle_failure(
        self, job_id: str, epoch: int, reason: str, other_plan: tuple[str, dict[str, Any], str] | None
    ) -> ModelJob:
        """`other_plan`: its class, plan and summary, where it was planned anew."""
        job = self.held(job_id, epoch)
        self._charge(job)
        self._fail(job, reason, epoch, other_plan)
        return job

    def release_of(self, holder: str, place: str) -> set[str]:
        worker = self.workers.get(holder.partition("/")[0])
        if worker is None or worker.place != place:
            return set()
        own = [job for job in self.jobs.values() if job.worker == holder]
        return self._fence([job for job in own if (job.claimed_at or 0.0) >= worker.started_at])

    def release_expired(self) -> set[str]:
        now = self.clock.now
        return self._fence([job for job in self.jobs.values() if job.lease_expires_at and job.lease_expires_at < now])

    def take_lost_bells(self, older_than: float) -> list[str]:
        idle = self.idle()
        free = sorted(idle, key=lambda worker: (len(worker.takes_classes), worker.name))
        waiting = [job for job in self.jobs.values() if self._is_due(job, older_than)]
        rung = []
        for job in sorted(waiting, key=lambda job: (-job.priority, job.created_at)):
            able = next((worker for worker in free if _takes(worker, job)), None)
            if able is not None:
                free.remove(able)
                rung.append(job.id)
                job.bell_rung_at = self.clock.now
        return rung

    def mark_rung(self, job_id: str) -> None:
        if job_id in self.jobs:
            self.jobs[job_id].bell_rung_at = self.clock.now

    def held(self, job_id: str, epoch: int) -> ModelJob:
        job = self.jobs.get(job_id)
        if job is None or job.state != "running" or job.epoch != epoch:
            raise LeaseLost(job_id=job_id, epoch=epoch)
        return job

    # The fleet.

    def beat(self, worker: ModelWorker) -> None:
        known = self.workers.get(worker.name)
        if known and known.place != worker.place and known.seen_at >= self.clock.now - ALIVE_SECONDS:
            raise WorkerNameTaken(name=worker.name)
        is_known_here = known is not None and known.place == worker.place
        worker.started_at = known.started_at if known and is_known_here else self.clock.now
        self.workers[worker.name] = worker

    def leave(self, name: str, place: str) -> None:
        if name in self.workers and self.workers[name].place == place:
            del self.workers[name]

    def forget_dead(self) -> None:
        now = self.clock.now
        self.workers = {n: w for n, w in self.workers.items() if w.seen_at >= now - REMEMBERED_SECONDS}

    def idle(self) -> list[ModelWorker]:
        busy = {job.worker.partition("/")[0] for job in self.jobs.values() if job.worker}
        alive = [worker for worker in self.workers.values() if worker.seen_at > self.clock.now - ALIVE_SECONDS]
        return sorted((worker for worker in alive if worker.name not in busy), key=lambda worker: worker.name)

    # What they share.

    def _is_ready(self, job: ModelJob, stage: str) -> bool:
        return job.waits and job.stage == stage and job.not_before <= self.clock.now

    def _rank(self, job: ModelJob, stage: str, gpu_classes: list[str], claimed: Counter[str]) -> tuple[float, ...]:
        share, runs = self.share(job.tenant), len(self._running(job.tenant, stage)) + claimed[job.tenant]
        size = gpu_classes.index(job.gpu_class) if stage == "train" else 0
        return (size, -job.priority, runs / share, self._lately(job.tenant, stage) / share, job.created_at)

    def _is_as_good(self, job: ModelJob, best: ModelJob, stage: str, gpu_classes: list[str]) -> bool:
        """Whether a job of another tenant would be next if that had used a hair less."""
        one, other = (self._rank(each, stage, gpu_classes, Counter()) for each in (job, best))
        return one[:3] == other[:3] and 0 <= one[3] - other[3] <= INDISTINCT_SECONDS

    def _running(self, tenant: str, stage: str) -> list[ModelJob]:
        of_stage = [job for job in self.jobs.values() if (job.tenant, job.stage) == (tenant, stage)]
        return [job for job in of_stage if job.state == "running"]

    def _lately(self, tenant: str, stage: str) -> float:
        return self._used(tenant, stage, self.clock.now - self.clock.now % DAY_SECONDS - DAY_SECONDS)

    def _used(self, tenant: str, stage: str, since: float) -> float:
        ended = sum(r.seconds for r in self.runs if (r.tenant, r.stage) == (tenant, stage) and r.ended_at >= since)
        return ended + sum(self._held_seconds(job) for job in self._running(tenant, stage))

    def _held_seconds(self, job: ModelJob) -> float:
        """Of its present run."""
        return min(self.clock.now, job.lease_expires_at or 0.0) - (job.claimed_at or 0.0)

    def _is_due(self, job: ModelJob, older_than: float) -> bool:
        is_old = job.bell_rung_at is None or job.bell_rung_at < self.clock.now - older_than
        return self._is_ready(job, job.stage) and is_old

    def _fence(self, found: list[ModelJob]) -> set[str]:
        for job in found:
            failed_epoch = job.epoch
            self._charge(job)
            job.epoch += 1
            self._fail(job, "worker_lost", failed_epoch, None)
        return {job.id for job in found}

    def _charge(self, job: ModelJob) -> None:
        seconds = self._held_seconds(job)
        self.runs.append(ModelRun(job.tenant, job.stage, self.clock.now, seconds))
        if job.stage == "train":
            job.gpu_seconds += seconds

    def _fail(
        self, job: ModelJob, reason: str, failed_epoch: int, other_plan: tuple[str, dict[str, Any], str] | None
    ) -> None:
        """Follow the table of remedies for a run that has ended so."""
        now, saved, delay = self.clock.now, job.checkpoint, 0.0
        if job.cancel_requested:
            return job.end("cancelled", now)
        progressed = saved is not None and saved["epoch"] == failed_epoch and saved["step"] > 0
        job.runs_without_progress = 0 if progressed else job.runs_without_progress + (reason in FREE)
        if reason in FREE or reason == "paused":
            job.attempt -= 1
            again = job.runs_without_progress < POISON_RUNS
        elif reason in CHARGED:
            again = job.attempt < job.max_attempts
            delay = (AWAY_SECONDS if reason in AWAY else RETRY_SECONDS) * 2 ** (job.attempt - 1)
        else:
            again = other_plan is not None
            job.attempt -= again
        if not again:
            job.error = reason
            return job.end("failed", now)
        job.let_go("queued")
        job.bell_rung_at, job.not_before = None, now + delay
        if not (job.pause_requested and reason == "paused"):
            job.tell("requeued", failed_epoch)
        if job.pause_requested:
            job.tell("paused", failed_epoch)
        if other_plan is not None:
            job.gpu_class, job.plan, summary = other_plan
            job.warnings = [*job.warnings, {"code": "replanned", "message": summary}]
            job.tell("replanned", failed_epoch)
        return None


def _queue(job: ModelJob) -> tuple[str, str]:
    return (job.stage, job.gpu_class if job.stage == "train" else "")


def _takes(worker: ModelWorker, job: ModelJob) -> bool:
    return job.stage in worker.stages and (job.stage == "prepare" or job.gpu_class in worker.takes_classes)

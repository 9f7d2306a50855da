"""How a job lives: its states, the edges between them, and what becomes of a failed attempt.

    POST ──> queued ──claim──> running ──finish──> succeeded | failed | cancelled
               │  <──release──────┘
               │  <──expire───────┘
               └──cancel──> cancelled

`running` means that an epoch holds a lease, whatever the stage: data is prepared first (`Stage.PREPARE`), then the
adapter is trained (`Stage.TRAIN`). What the API shows (`JobStatus`) is derived here from state, stage and flags.

A pause is a flag: a queued job that has it is not claimed and keeps its place; a running one is released as for a
drain. Of a resume and that release the first commit wins: a job that is resumed while its worker leaves goes back to
the queue without the flag, and is taken up again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

MAX_RUNS_WITHOUT_PROGRESS = (
    5  # lost or drained runs in a row that brought no new checkpoint, before a job counts as poison
)


class JobState(StrEnum):
    """The five states of a row."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})


class Stage(StrEnum):
    """What the next claim of a job does."""

    PREPARE = "prepare"
    TRAIN = "train"
    MERGE = "merge"  # of a job of its own kind: see `store/merges.py`


class JobStatus(StrEnum):
    """The words that users see: OpenAI's, and `pausing`, `paused`, `cancelling`."""

    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Phase(StrEnum):
    """What a running epoch is busy with."""

    FETCHING = "fetching"
    PREPARING = "preparing"
    LOADING = "loading"
    PROBING = "probing"
    TRAINING = "training"
    EVALUATING = "evaluating"
    PROVING = "proving"
    MERGING = "merging"
    PUBLISHING = "publishing"


class FailureReason(StrEnum):
    """Why a run ended without its result. Members are added, never renamed."""

    INVALID_TRAINING_FILE = "invalid_training_file"
    NO_TRAINABLE_TOKENS = "no_trainable_tokens"
    INVALID_PARAMETER = "invalid_parameter"
    UNSUPPORTED_BASE_MODEL = "unsupported_base_model"
    GATED_BASE_MODEL = "gated_base_model"
    LOSS_NOT_FINITE = "loss_not_finite"
    CUDA_OUT_OF_MEMORY = "cuda_out_of_memory"
    HOST_OUT_OF_MEMORY = "host_out_of_memory"
    DISK_FULL = "disk_full"
    BASE_MODEL_UNAVAILABLE = "base_model_unavailable"
    ARTIFACT_UPLOAD_FAILED = "artifact_upload_failed"
    ARTIFACT_CORRUPT = "artifact_corrupt"
    ADAPTER_NOT_PROVEN = "adapter_not_proven"
    MAX_DURATION_EXCEEDED = "max_duration_exceeded"
    CRASH = "crash"
    WORKER_LOST = "worker_lost"
    DRAINED = "drained"
    PAUSED = "paused"


class Fault(StrEnum):
    """Who can do something about a failure."""

    USER = "user"
    SERVER = "server"


class Retry(StrEnum):
    """What a failure costs."""

    NEVER = "never"
    CHARGED = "charged"  # again, up to max_attempts
    FREE = "free"  # again, as long as checkpoints advance
    UNCOUNTED = "uncounted"  # again, however often: the user wanted it so
    REPLANNED = "replanned"  # again with another plan, if there is one; never with the same


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """What follows from a failure, and the sentence for the user."""

    retry: Retry
    fault: Fault
    advice: str
    delays: int = 1  # how many of the usual delays lie before another attempt that is charged


MINUTES_LATER = 18  # delays: what is away or full comes back in minutes, and no slot is held until then

REMEDIES: dict[FailureReason, Remedy] = {
    FailureReason.INVALID_TRAINING_FILE: Remedy(
        retry=Retry.NEVER, fault=Fault.USER, advice="Correct the file and post the job again."
    ),
    FailureReason.NO_TRAINABLE_TOKENS: Remedy(
        retry=Retry.NEVER,
        fault=Fault.USER,
        advice="Raise 'max_length', shorten the prompts, or give rows with a completion.",
    ),
    FailureReason.INVALID_PARAMETER: Remedy(
        retry=Retry.NEVER, fault=Fault.USER, advice="Correct the parameter and post the job again."
    ),
    FailureReason.UNSUPPORTED_BASE_MODEL: Remedy(
        retry=Retry.NEVER, fault=Fault.USER, advice="Choose a base model that GET /models lists."
    ),
    FailureReason.GATED_BASE_MODEL: Remedy(
        retry=Retry.NEVER,
        fault=Fault.SERVER,
        advice="Ask the operator to give the service's token access to the base model.",
    ),
    FailureReason.LOSS_NOT_FINITE: Remedy(
        retry=Retry.NEVER, fault=Fault.USER, advice="Lower 'learning_rate', or compute in bfloat16."
    ),
    FailureReason.CUDA_OUT_OF_MEMORY: Remedy(
        retry=Retry.REPLANNED,
        fault=Fault.SERVER,
        advice="No cheaper plan and no larger class is left: lower 'max_length', or ask for a larger 'gpu.class'.",
    ),
    FailureReason.HOST_OUT_OF_MEMORY: Remedy(
        retry=Retry.CHARGED, fault=Fault.SERVER, advice="Ask the operator for workers with more memory."
    ),
    FailureReason.DISK_FULL: Remedy(
        retry=Retry.CHARGED,
        fault=Fault.SERVER,
        advice="Ask the operator to free disk space on the workers.",
        delays=MINUTES_LATER,
    ),
    FailureReason.BASE_MODEL_UNAVAILABLE: Remedy(
        retry=Retry.CHARGED,
        fault=Fault.SERVER,
        advice="Try again once the hub answers.",
        delays=MINUTES_LATER,
    ),
    FailureReason.ARTIFACT_UPLOAD_FAILED: Remedy(
        retry=Retry.CHARGED,
        fault=Fault.SERVER,
        advice="Try again once the object store answers.",
        delays=MINUTES_LATER,
    ),
    FailureReason.ARTIFACT_CORRUPT: Remedy(
        retry=Retry.CHARGED, fault=Fault.SERVER, advice="Ask the operator to check the object store."
    ),
    FailureReason.ADAPTER_NOT_PROVEN: Remedy(
        retry=Retry.CHARGED,
        fault=Fault.SERVER,
        advice="The trained adapter did not pass its proof; see the job's events.",
    ),
    FailureReason.MAX_DURATION_EXCEEDED: Remedy(
        retry=Retry.NEVER, fault=Fault.USER, advice="Raise 'max_duration_seconds' or train fewer steps."
    ),
    FailureReason.CRASH: Remedy(
        retry=Retry.CHARGED,
        fault=Fault.SERVER,
        advice="See the job's events; the operator finds more in the worker's log.",
    ),
    FailureReason.WORKER_LOST: Remedy(
        retry=Retry.FREE,
        fault=Fault.SERVER,
        advice="Workers were lost again and again before a new checkpoint was reached.",
    ),
    FailureReason.DRAINED: Remedy(
        retry=Retry.FREE,
        fault=Fault.SERVER,
        advice="Workers were stopped again and again before a new checkpoint was reached.",
    ),
    FailureReason.PAUSED: Remedy(retry=Retry.UNCOUNTED, fault=Fault.USER, advice="Resume the job."),
}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why one run ended: data, not an exception."""

    reason: FailureReason
    message: str
    param: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Aftermath:
    """Where a job goes after a failed run."""

    state: JobState
    attempt: int
    runs_without_progress: int


def after_failure(
    reason: FailureReason,
    *,
    attempt: int,
    max_attempts: int,
    runs_without_progress: int,
    made_progress: bool,
    cancel_requested: bool,
    replanned: bool = False,
) -> Aftermath:
    """Decide the next state of a job whose run ended with `reason`.

    Args:
        attempt: Charged runs so far, this one included (`claim` counts it in advance).
        runs_without_progress: Lost or drained runs before this one, since the last that brought a new checkpoint.
        made_progress: This run brought one.
        cancel_requested: The user has asked to cancel; then no failure brings the job back.
        replanned: The job has another plan now; these are few, so that such runs need not be counted.
    """
    if cancel_requested:
        return Aftermath(state=JobState.CANCELLED, attempt=attempt, runs_without_progress=runs_without_progress)
    retry = REMEDIES[reason].retry
    counted = 1 if retry is Retry.FREE else 0
    fruitless = 0 if made_progress else runs_without_progress + counted
    if replanned:
        return Aftermath(state=JobState.QUEUED, attempt=attempt - 1, runs_without_progress=fruitless)
    if retry in (Retry.NEVER, Retry.REPLANNED):
        return Aftermath(state=JobState.FAILED, attempt=attempt, runs_without_progress=fruitless)
    if retry is Retry.CHARGED:
        state = JobState.QUEUED if attempt < max_attempts else JobState.FAILED
        return Aftermath(state=state, attempt=attempt, runs_without_progress=fruitless)
    state = JobState.QUEUED if fruitless < MAX_RUNS_WITHOUT_PROGRESS else JobState.FAILED
    return Aftermath(state=state, attempt=attempt - 1, runs_without_progress=fruitless)


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    """One object in the bucket, and what its bytes must be."""

    key: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A training state that a later epoch can go on from."""

    step: int
    epoch: int
    object: StoredObject


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row of the truth, as every room reads it. Times are UTC."""

    id: str
    tenant: str
    state: JobState
    stage: Stage
    epoch: int
    attempt: int
    runs_without_progress: int
    spec: dict[str, Any]
    plan: dict[str, Any]
    placement: dict[str, Any]
    gpu_class: str
    phase: Phase | None
    cancel_requested: bool
    pause_requested: bool
    progress: dict[str, Any]
    metrics: dict[str, Any]
    memory: dict[str, Any]
    warnings: list[dict[str, Any]]
    error: dict[str, Any] | None
    prepared: dict[str, Any] | None
    checkpoint: Checkpoint | None
    adapter: dict[str, Any] | None
    worker: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    claimed_at: datetime | None  # when its present run began, or its last one
    lease_expires_at: datetime | None
    gpu_seconds: float  # that training held a GPU, over all runs that have ended
    merges: str | None = None  # the job whose adapter it merges into its base; None: it is a fine-tune
    traceparent: str | None = None  # of the request that made it, where that was traced
    deleted_at: datetime | None = None  # its tenant sees it no more; the row stays until its objects are gone

    @property
    def status(self) -> JobStatus:
        """The word that the API shows."""
        return status_of(
            self.state, self.stage, cancel_requested=self.cancel_requested, pause_requested=self.pause_requested
        )

    @property
    def may_be_claimed(self) -> bool:
        """Whether it waits in the queue for a worker."""
        return self.state is JobState.QUEUED and not self.pause_requested

    @property
    def is_training(self) -> bool:
        """Whether an epoch holds a lease to train it: then it holds a GPU."""
        return self.state is JobState.RUNNING and self.stage is Stage.TRAIN

    def gpu_seconds_until(self, moment: datetime) -> float:
        """How long its training has held a GPU, the present run included; `moment` is of the database's clock."""
        if not self.is_training or self.claimed_at is None or self.lease_expires_at is None:
            return self.gpu_seconds
        until = min(moment, self.lease_expires_at)
        return self.gpu_seconds + max(0.0, (until - self.claimed_at).total_seconds())


def status_of(state: JobState, stage: Stage, *, cancel_requested: bool, pause_requested: bool) -> JobStatus:
    """The word for a job of this state, stage and flags."""
    if state in TERMINAL_STATES:
        return JobStatus(state.value)
    if cancel_requested:
        return JobStatus.CANCELLING
    if pause_requested:
        return JobStatus.PAUSED if state is JobState.QUEUED else JobStatus.PAUSING
    if stage is Stage.PREPARE:
        return JobStatus.VALIDATING_FILES
    return JobStatus(state.value)


@dataclass(frozen=True, kw_only=True)
class JobEvent:
    """One line of a job's history; `id` grows within the job and is the cursor of paging."""

    id: int
    job_id: str
    epoch: int
    type: str
    level: str
    message: str
    data: dict[str, Any]
    created_at: datetime

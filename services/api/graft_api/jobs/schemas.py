"""How a job and its history look over HTTP."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from graft_api.files.schemas import DataReport
from graft_shared.jobs import Fault, JobEvent, JobStatus, Phase

UnixSeconds = Annotated[int, Field(description="Unix seconds.")]


class Progress(BaseModel):
    """How far training is."""

    step: int = 0
    total_steps: int | None = None
    epoch: float = 0.0
    percent: float = 0.0
    tokens_seen: int = 0
    tokens_per_second: float | None = None
    eta_seconds: float | None = None


class Queue(BaseModel):
    """Where a queued job stands, and what it waits for or will wait for."""

    position: int | None = Field(
        description=(
            "How many claims until its own, by the tenants' fair share as things stand. Null while its data is being "
            "prepared, while it is paused, and while a quota of its tenant holds it back."
        )
    )
    reason: str
    predicted_start: UnixSeconds | None = Field(
        default=None,
        description=(
            "When a worker of its class is likely to take it, by the ETAs of what trains there and by how long the "
            "class's last jobs took. Null where nobody can tell: without a live worker or a place in line, while its "
            "data is being prepared, and behind jobs while none of its class has ended."
        ),
    )


class MemoryForecast(BaseModel):
    """Bytes on the device at the worst moment, by component."""

    components: dict[str, int]
    low_bytes: int
    expected_bytes: int
    high_bytes: int
    host_components: dict[str, int] = Field(
        default_factory=dict, description="What the machine of a GPU may have to hold in its own memory, by component."
    )
    host_bytes: int | None = Field(
        default=None, description="The sum of these, beside the processes' own; null for a job of an earlier version."
    )


class Memory(BaseModel):
    """Bytes on the device at the worst moment."""

    predicted_peak_bytes: int | None = Field(
        description="With full microbatches; once the job has succeeded, with those that its data filled."
    )
    measured_peak_bytes: int | None
    forecast: MemoryForecast | None = Field(
        description="By component, as admission or the last replanning forecast it; null for a job of an early version."
    )
    measured: dict[str, int] = Field(
        description="What else was measured, by name: on a GPU what the peak is made of. Empty until it is."
    )


class Metrics(BaseModel):
    """The last losses, in nats per learnt token, and whatever else the trainer measured."""

    model_config = ConfigDict(extra="allow")

    train_loss: float | None = None
    eval_loss: float | None = None


class AdapterLink(BaseModel):
    """Where the finished adapter is."""

    uri: str
    manifest: str = Field(description="The route that gives the manifest with a link per file.")
    archive: str = Field(description="The route that streams one .tar.")


class JobError(BaseModel):
    """Why a job failed."""

    model_config = ConfigDict(extra="allow")

    code: str
    message: str
    category: Fault
    param: str | None


class JobWarning(BaseModel):
    """Something the user should know, that stops nothing."""

    code: str
    message: str


class JobBody(BaseModel):
    """One fine-tune."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    status: JobStatus
    phase: Phase | None
    created_at: UnixSeconds
    started_at: UnixSeconds | None
    finished_at: UnixSeconds | None
    estimated_finish: UnixSeconds | None
    base_model: str
    spec: dict[str, Any] = Field(description="As posted, normalised: defaults filled in, aliases under one name.")
    plan: dict[str, Any] = Field(description="How it is trained; `mode` is 'speed' or 'memory'.")
    gpu_class: str
    attempt: int
    max_attempts: int
    progress: Progress
    queue: Queue | None
    memory: Memory
    cost: float | None = Field(
        description=(
            "Of all its training runs, lost ones and the present one included: each from its claim to its end, by "
            "the price per hour that the class in `gpu_class` had when the job was placed there, in the operator's "
            "currency. Null for a class without a price."
        )
    )
    metrics: Metrics
    adapter: AdapterLink | None
    error: JobError | None
    warnings: list[JobWarning]
    metadata: dict[str, str]


class EventBody(BaseModel):
    """One line of a job's history; ids count 1, 2, 3 … within the job."""

    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    id: int
    job_id: str
    epoch: int
    type: str
    level: str
    message: str
    data: dict[str, Any]
    created_at: UnixSeconds


def event_body(event: JobEvent) -> EventBody:
    """One line of a job's history as its user sees it."""
    return EventBody(
        id=event.id,
        job_id=event.job_id,
        epoch=event.epoch,
        type=event.type,
        level=event.level,
        message=event.message,
        data=event.data,
        created_at=int(event.created_at.timestamp()),
    )


class CheckpointBody(BaseModel):
    """One checkpoint that was stored, read back and committed while the job trained."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    job_id: str
    epoch: int
    step: int
    size: int
    sha256: str
    created_at: UnixSeconds
    is_stored: bool = Field(description="It is the one that the job goes on from; earlier ones are removed.")
    metrics: Metrics = Field(description="The losses that were logged last up to its step.")


class JobDeleted(BaseModel):
    """A job that is no more."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    deleted: Literal[True] = True


class JobReport(BaseModel):
    """What a job learns from, once its data is prepared."""

    object: Literal["fine_tuning.job.report"] = "fine_tuning.job.report"
    job_id: str
    report: DataReport


class MetricSeries(BaseModel):
    """Values by optimizer step, for plotting: the same length each."""

    steps: list[int]
    values: list[float]


class JobMetrics(BaseModel):
    """What was measured while training; a step that was done twice stands once, as it was done last."""

    object: Literal["fine_tuning.job.metrics"] = "fine_tuning.job.metrics"
    job_id: str
    series: dict[str, MetricSeries]


class AdapterFile(BaseModel):
    """One file of an adapter, its proof, and a link that holds for some minutes."""

    name: str
    size: int
    sha256: str
    url: str


class AdapterBody(BaseModel):
    """The manifest of a finished adapter."""

    object: Literal["adapter"] = "adapter"
    job_id: str
    epoch: int
    base_model: str
    base_revision: str
    files: list[AdapterFile]
    links_expire_at: UnixSeconds
    archive: str
    proof: dict[str, Any]
    versions: dict[str, str]


class MergedModelBody(BaseModel):
    """The full-precision base with a job's adapter in its weights: how far it is, and its files once it is made."""

    object: Literal["merged_model"] = "merged_model"
    job_id: str
    status: JobStatus
    phase: Phase | None
    queue: Queue | None
    created_at: UnixSeconds
    finished_at: UnixSeconds | None
    base_model: str
    base_revision: str
    error: JobError | None
    files: list[AdapterFile]
    links_expire_at: UnixSeconds | None = Field(description="Null until it has succeeded.")
    proof: dict[str, Any]
    versions: dict[str, str]


class MergedModelDeleted(BaseModel):
    """A merged model that is no more."""

    job_id: str
    object: Literal["merged_model"] = "merged_model"
    deleted: Literal[True] = True


class Span(BaseModel):
    """A forecast, and how far off it may be."""

    model_config = ConfigDict(from_attributes=True)

    low: float
    expected: float
    high: float


class SpeedForecast(BaseModel):
    """How fast the job would train, and what that comes to."""

    model_config = ConfigDict(from_attributes=True)

    tokens_per_second: Span = Field(description="Real tokens; padding is not counted.")
    calibrated: bool = Field(description="Measured on this class's cards; else scaled from another by the data sheet.")
    steps: int | None = Field(description="Optimizer steps; null while the number of rows is not known.")
    duration_seconds: Span | None = Field(description="Training alone: no waiting, fetching, loading or evaluating.")
    cost: Span | None = Field(description="By the class's price per hour, in the operator's currency.")


class Estimate(BaseModel):
    """What POST /jobs would decide: this class and plan."""

    object: Literal["estimate"] = "estimate"
    fits: Literal[True] = True
    spec: dict[str, Any]
    gpu_class: str
    plan: dict[str, Any]
    target_modules: list[str]
    memory: MemoryForecast
    speed: SpeedForecast | None = Field(description="Null for a class whose cards the operator has not described.")
    live_workers: int = Field(description="Workers alive now that take jobs of this class.")
    warnings: list[JobWarning]


class Refusal(BaseModel):
    """What POST /jobs would decide: no class of this service holds the job; and what would fit."""

    model_config = ConfigDict(extra="allow")

    object: Literal["estimate"] = "estimate"
    fits: Literal[False] = False
    spec: dict[str, Any]
    code: str
    message: str

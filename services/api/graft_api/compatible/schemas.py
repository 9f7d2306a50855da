"""How files, jobs, events, checkpoints and models look in OpenAI's shapes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from graft_api.jobs.schemas import UnixSeconds
from graft_shared.jobs import JobStatus


class FileObject(BaseModel):
    """One uploaded file; every line of it was checked."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "file-9aQ2mXw7Lk4TzR8vBn3YcD6f",
                    "object": "file",
                    "bytes": 120000,
                    "created_at": 1767225600,
                    "expires_at": None,
                    "filename": "rows.jsonl",
                    "purpose": "fine-tune",
                    "status": "processed",
                    "status_details": None,
                }
            ]
        }
    )

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: UnixSeconds
    expires_at: None = Field(default=None, description="Files stay until they are deleted.")
    filename: str
    purpose: Literal["fine-tune"] = "fine-tune"
    status: Literal["processed"] = "processed"
    status_details: None = None


class JobErrorObject(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class HyperparametersObject(BaseModel):
    """What the job is trained with; `auto` has become a number."""

    batch_size: int = Field(description="Sequences per update.")
    learning_rate_multiplier: float = Field(description="Times our default learning rate.")
    n_epochs: int | float


class SupervisedObject(BaseModel):
    """The method's settings."""

    hyperparameters: HyperparametersObject


class MethodObject(BaseModel):
    """How the base is tuned."""

    type: Literal["supervised"] = "supervised"
    supervised: SupervisedObject


class FineTuningJobObject(BaseModel):
    """One fine-tune; `GET /jobs/{id}` tells more of the same job."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    status: Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
    graft_status: JobStatus = Field(description="The native word, which has `pausing`, `paused` and `cancelling` too.")
    created_at: UnixSeconds
    finished_at: UnixSeconds | None
    estimated_finish: UnixSeconds | None
    model: str = Field(description="The base model.")
    fine_tuned_model: str | None = Field(description="The adapter's name, once it is stored and proven.")
    organization_id: str = Field(description="The tenant.")
    training_file: str = Field(description="A file's id; of a job that was not posted here also a dataset's address.")
    validation_file: str | None
    hyperparameters: HyperparametersObject
    method: MethodObject
    seed: int
    trained_tokens: int | None = Field(description="Null while the job lives.")
    result_files: list[str] = Field(description="Always empty: GET /jobs/{id}/metrics and /adapter have the results.")
    integrations: list[Any]
    error: JobErrorObject | None
    metadata: dict[str, str]


class FineTuningEventObject(BaseModel):
    """One line of a job's history."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: UnixSeconds
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class CheckpointMetrics(BaseModel):
    """The losses that were measured last when the checkpoint was taken."""

    step: int
    train_loss: float | None
    valid_loss: float | None


class FineTuningCheckpointObject(BaseModel):
    """One checkpoint; `GET /jobs/{id}/checkpoints` tells whether it is still stored."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: UnixSeconds
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: CheckpointMetrics


class ModelObject(BaseModel):
    """A base model, or the adapter of a job that has succeeded."""

    id: str
    object: Literal["model"] = "model"
    created: UnixSeconds = Field(description="Of an adapter; 0 for a base model, whose age is not known.")
    owned_by: str

"""From rows to OpenAI's shapes."""

from __future__ import annotations

from typing import Any

from graft_api.compatible.names import fine_tuned_model, param_name
from graft_api.compatible.requests import DEFAULTS
from graft_api.compatible.schemas import (
    CheckpointMetrics,
    FileObject,
    FineTuningCheckpointObject,
    FineTuningEventObject,
    FineTuningJobObject,
    HyperparametersObject,
    JobErrorObject,
    MethodObject,
    ModelObject,
    SupervisedObject,
)
from graft_api.jobs.checkpoints import CommittedCheckpoint, checkpoint_id, event_id
from graft_api.jobs.views import estimated_finish
from graft_api.models.bases import Source
from graft_shared.catalogue import ModelShape
from graft_shared.jobs import TERMINAL_STATES, Job, JobEvent, JobState, JobStatus
from graft_shared.specs import Training
from graft_shared.store import StoredFile

# OpenAI has no word for these. A job that is being cancelled or paused still runs, and may yet succeed; a paused one
# waits in its old place.
_OWN_STATUSES = {JobStatus.CANCELLING: "running", JobStatus.PAUSING: "running", JobStatus.PAUSED: "queued"}
_LEVELS = {"warning": "warn"}
_METRICS = {"loss": "train_loss", "eval_loss": "valid_loss"}


def file_object(file: StoredFile) -> FileObject:
    """One file."""
    created_at = int(file.created_at.timestamp())
    return FileObject(id=file.id, bytes=file.object.size, created_at=created_at, filename=file.filename)


def job_object(job: Job) -> FineTuningJobObject:
    """One job."""
    hyperparameters = _hyperparameters(job.spec["training"])
    ended = job.state in TERMINAL_STATES
    return FineTuningJobObject.model_validate(
        {
            "id": job.id,
            "status": _OWN_STATUSES.get(job.status, job.status.value),
            "graft_status": job.status,
            "created_at": int(job.created_at.timestamp()),
            "finished_at": int(job.finished_at.timestamp()) if job.finished_at is not None else None,
            "estimated_finish": estimated_finish(job),
            "model": job.spec["base_model"],
            "fine_tuned_model": fine_tuned_model(job) if job.state is JobState.SUCCEEDED else None,
            "organization_id": job.tenant,
            "training_file": _training_file(job.spec["dataset"]),
            "validation_file": (job.spec["validation"] or {}).get("file"),
            "hyperparameters": hyperparameters,
            "method": MethodObject(supervised=SupervisedObject(hyperparameters=hyperparameters)),
            "seed": job.spec["training"]["seed"],
            "trained_tokens": job.progress.get("tokens_seen", 0) if ended else None,
            "result_files": [],
            "integrations": [],
            "error": _error(job),
            "metadata": job.spec["metadata"],
        }
    )


def event_object(event: JobEvent) -> FineTuningEventObject:
    """One line of a job's history; losses have OpenAI's names, and other lines say what they tell of."""
    is_metrics = event.type == "metrics"
    data = {_METRICS.get(name, name): value for name, value in event.data.items()} if is_metrics else event.data
    return FineTuningEventObject.model_validate(
        {
            "id": event_id(event.job_id, event.id),
            "created_at": int(event.created_at.timestamp()),
            "level": _LEVELS.get(event.level, event.level),
            "message": event.message,
            "type": "metrics" if is_metrics else "message",
            "data": data if is_metrics else {**data, "event": event.type},
        }
    )


def checkpoint_object(job: Job, checkpoint: CommittedCheckpoint) -> FineTuningCheckpointObject:
    """One checkpoint."""
    return FineTuningCheckpointObject(
        id=checkpoint_id(job.id, checkpoint.number),
        created_at=int(checkpoint.created_at.timestamp()),
        fine_tuned_model_checkpoint=f"{fine_tuned_model(job)}:ckpt-step-{checkpoint.step}",
        fine_tuning_job_id=job.id,
        step_number=checkpoint.step,
        metrics=CheckpointMetrics(
            step=checkpoint.step, train_loss=checkpoint.train_loss, valid_loss=checkpoint.eval_loss
        ),
    )


def base_object(source: Source, shape: ModelShape) -> ModelObject:
    """A base model, owned by its hub organisation, or by this service if it is a registered folder."""
    owner = "graft" if source is Source.REGISTERED else shape.base_model.partition("/")[0]
    return ModelObject(id=shape.base_model, created=0, owned_by=owner)


def adapter_object(job: Job) -> ModelObject:
    """The adapter of a job that has succeeded."""
    created = int((job.finished_at or job.created_at).timestamp())
    return ModelObject(id=fine_tuned_model(job), created=created, owned_by=job.tenant)


def _hyperparameters(training: dict[str, Any]) -> HyperparametersObject:
    recipe = Training.model_validate(training)
    epochs = recipe.num_train_epochs
    return HyperparametersObject(
        batch_size=recipe.sequences_per_update,
        learning_rate_multiplier=float(f"{recipe.learning_rate / DEFAULTS.learning_rate:.9g}"),
        n_epochs=int(epochs) if epochs == int(epochs) else epochs,
    )


def _training_file(dataset: dict[str, Any]) -> str:
    return str(dataset["file"] or dataset["uri"] or f"hub:{dataset['hub']}")


def _error(job: Job) -> JobErrorObject | None:
    if job.error is None:
        return None
    return JobErrorObject(
        code=job.error["code"], message=job.error["message"], param=param_name(job.error.get("param"))
    )

"""The run of a `train` stage: base, tokens and checkpoint in; checkpoints and a proven adapter out."""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from graft_shared.artifacts import adapter_prefix, checkpoint_key
from graft_shared.buckets import read_back
from graft_shared.capacity import CapacityTable, Placement
from graft_shared.catalogue import ModelShape
from graft_shared.errors import NeighbourUnavailable, UnsupportedBaseModel
from graft_shared.jobs import Checkpoint, Failure, FailureReason, Job, StoredObject
from graft_shared.logs import log_event
from graft_shared.memory import GIB, TrainingPlan, estimate
from graft_shared.rows import CHAT_KINDS
from graft_shared.specs import JobSpec
from graft_worker.host import free_memory_bytes
from graft_worker.protocol import PLAIN_CHAT, CheckpointEvent, TrainedEvent, TrainRequest
from graft_worker.supervisor.folders import fetch_folder, store_folder
from graft_worker.supervisor.neighbours import Neighbours
from graft_worker.supervisor.patience import Patience
from graft_worker.supervisor.publishing import publish

MODULE = "graft_worker.training"
SHORT_OF_MEMORY = (FailureReason.CUDA_OUT_OF_MEMORY, FailureReason.HOST_OUT_OF_MEMORY)  # another plan may help
CHECKPOINT_PATIENCE_SECONDS = 20.0  # a checkpoint that cannot be stored soon is left to the next one

logger = logging.getLogger(__name__)


def train_request(job: Job, workdir: Path, neighbours: Neighbours, kept: ExitStack) -> TrainRequest:
    """Fetch and verify what training needs, and say where it lies; what comes from the cache is held by `kept`."""
    prepared = job.prepared or {}
    revision = prepared.get("base_commit") or job.spec["revision"]  # a branch may have moved since
    base = kept.enter_context(neighbours.base_models.whole(job.spec["base_model"], revision))
    splits = {}
    for split in ("train", "validation"):
        if split in prepared:
            splits[split] = workdir / f"{split}.safetensors"
            neighbours.base_models.cache.fetch(neighbours.bucket, StoredObject(**prepared[split]), splits[split])
    adapter_path = None
    if "adapter" in prepared:
        adapter_path = workdir / "earlier-adapter"
        fetch_folder(neighbours.bucket, StoredObject(**prepared["adapter"]), adapter_path)
    checkpoint_path = None
    if job.checkpoint is not None:
        checkpoint_path = workdir / "resume" / f"step-{job.checkpoint.step}"
        fetch_folder(neighbours.bucket, job.checkpoint.object, checkpoint_path)
    return TrainRequest(
        job_id=job.id,
        epoch=job.epoch,
        spec=job.spec,
        plan=job.plan,
        target_modules=job.placement["target_modules"],
        base_path=str(base.path),
        base_model=job.spec["base_model"],
        base_revision=base.revision,
        train_file=str(splits["train"]),
        validation_file=str(splits["validation"]) if "validation" in splits else None,
        checkpoint_path=str(checkpoint_path) if checkpoint_path else None,
        adapter_path=str(adapter_path) if adapter_path else None,
        is_chat=was_taught_in_chat(prepared.get("report", {})),
        lease_seconds=neighbours.settings.lease_seconds,
        quantised_dir=str(base.quantised_dir),
    )


def was_taught_in_chat(report: dict[str, Any]) -> bool:
    """Whether the rows were written in a chat template that the base's tokenizer has."""
    codes = {warning["code"] for warning in report.get("warnings", ())}
    return report.get("kind") in CHAT_KINDS and PLAIN_CHAT not in codes


def too_much_for_host(job: Job, request: TrainRequest, capacity: CapacityTable) -> Failure | None:
    """Why this plan is not begun here; None where the machine has the memory, or no other plan would be content."""
    shape, gpu = _shape_of(request), capacity.get(job.gpu_class)
    if shape is None or gpu is None:
        return None
    plan, spec = TrainingPlan.from_dict(job.plan), JobSpec.model_validate(job.spec)
    needed, free = gpu.held_of_host(estimate(shape, spec, plan)), free_memory_bytes()
    if needed <= free:
        return None
    message = f"The plan needs {needed / GIB:.1f} GiB of the machine's memory, and {free / GIB:.1f} GiB are free"
    facts = {"needed_bytes": needed, "free_bytes": free}
    failure = Failure(reason=FailureReason.HOST_OUT_OF_MEMORY, message=message, facts=facts)
    return failure if replan(job, request, capacity, failure) is not None else None


def replan(job: Job, request: TrainRequest, capacity: CapacityTable, failure: Failure) -> Placement | None:
    """Where a job goes whose plan ran out of memory here; None when no plan and no class is left that would help."""
    shape = _shape_of(request)
    if shape is None:
        return None
    plan, spec = TrainingPlan.from_dict(job.plan), JobSpec.model_validate(job.spec)
    if failure.reason is FailureReason.HOST_OUT_OF_MEMORY:
        free = failure.facts.get("free_bytes")
        return capacity.after_host_out_of_memory(shape, spec, job.gpu_class, plan, free)
    return capacity.after_out_of_memory(shape, spec, job.gpu_class, plan)


def _shape_of(request: TrainRequest) -> ModelShape | None:
    config = json.loads((Path(request.base_path) / "config.json").read_text())
    try:
        return ModelShape.from_config(config, base_model=request.base_model, revision=request.base_revision)
    except UnsupportedBaseModel:
        return None


def store_checkpoint(job: Job, event: CheckpointEvent, neighbours: Neighbours, patience: Patience) -> None:
    """Upload a checkpoint, read it back, and make it the job's. A bucket that is away costs this checkpoint only."""
    folder = Path(event.path)
    key = checkpoint_key(job.tenant, job.id, job.epoch, event.step)

    def store() -> None:
        stored = store_folder(neighbours.bucket, key, folder)
        read_back(neighbours.bucket, stored)
        checkpoint = Checkpoint(step=event.step, epoch=job.epoch, object=stored)
        neighbours.leases.commit_checkpoint(job.id, job.epoch, checkpoint)

    try:
        patience.wait_for(store, at_most_seconds=CHECKPOINT_PATIENCE_SECONDS)
    except NeighbourUnavailable as error:
        facts = {"job_id": job.id, "step": event.step, "reason": error.message}
        log_event(logger, "checkpoint_not_stored", level=logging.WARNING, **facts)
    shutil.rmtree(folder)


def publish_adapter(
    job: Job, workdir: Path, request: TrainRequest, trained: TrainedEvent, neighbours: Neighbours, patience: Patience
) -> None:
    """Store the adapter and settle the job as succeeded; raises as `publish`."""
    prefix = adapter_prefix(job.tenant, job.id, job.epoch)
    folder = workdir / "adapter"
    publish(job, folder, prefix, request, trained, neighbours, patience, metrics=trained.metrics, memory=trained.memory)

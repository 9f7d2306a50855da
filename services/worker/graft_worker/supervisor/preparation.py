"""The run of a `prepare` stage: raw rows in, tokens in the bucket, the job handed on to training."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from graft_shared.artifacts import earlier_adapter_key, prepared_key
from graft_shared.dispatch import queue_for
from graft_shared.jobs import Job
from graft_shared.specs import DatasetSource, JobSpec
from graft_worker.protocol import PreparedEvent, PrepareRequest
from graft_worker.supervisor.adapters import fetch_adapter
from graft_worker.supervisor.folders import store_folder
from graft_worker.supervisor.neighbours import Neighbours
from graft_worker.supervisor.patience import Patience
from graft_worker.supervisor.sources import fetch_rows

MODULE = "graft_worker.preparing"
EARLIER_ADAPTER = "earlier-adapter"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # of all that was published, what training needs
SPLITS = ("train.safetensors", "validation.safetensors")


def prepare_request(job: Job, workdir: Path, neighbours: Neighbours, kept: ExitStack) -> PrepareRequest:
    """Fetch what preparing needs, and say where it lies; what comes from the cache is held by `kept`."""
    spec = JobSpec.model_validate(job.spec)
    tokenizer = kept.enter_context(neighbours.base_models.tokenizer(spec.base_model, spec.revision))
    train_file = workdir / "train.jsonl"
    source = fetch_rows(job.tenant, spec.dataset, train_file, neighbours, param="dataset")
    validation_file = None
    if spec.validation is not None and spec.validation.file is not None:
        validation_file = workdir / "validation.jsonl"
        held_out = DatasetSource(file=spec.validation.file)
        fetch_rows(job.tenant, held_out, validation_file, neighbours, param="validation")
    if spec.adapter is not None:
        fetch_adapter(job.tenant, spec.adapter.job, workdir / EARLIER_ADAPTER, neighbours, only=ADAPTER_FILES)
    return PrepareRequest(
        job_id=job.id,
        spec=job.spec,
        tokenizer_path=str(tokenizer.path),
        base_commit=tokenizer.commit,
        max_positions=int(job.placement["max_position_embeddings"]),
        train_file=str(train_file),
        validation_file=str(validation_file) if validation_file else None,
        source=source,
    )


def finish_preparation(
    job: Job,
    workdir: Path,
    request: PrepareRequest,
    prepared: PreparedEvent,
    neighbours: Neighbours,
    patience: Patience,
) -> None:
    """Store the tokens under this epoch, hand the job to training, and ring for a trainer."""
    report = {**prepared.report, "source": request.source}
    stored: dict[str, Any] = {"report": report, "base_commit": request.base_commit}
    for name in SPLITS:
        path = workdir / "prepared" / name
        if path.exists():
            key = prepared_key(job.tenant, job.id, job.epoch, name)
            put = partial(neighbours.bucket.put_file, key, path)
            stored[path.stem] = asdict(patience.wait_for(put))
    earlier = workdir / EARLIER_ADAPTER
    if earlier.exists():  # a copy of its own: the earlier job may be deleted from here on
        key = earlier_adapter_key(job.tenant, job.id, job.epoch)
        stored["adapter"] = asdict(patience.wait_for(partial(store_folder, neighbours.bucket, key, earlier)))
    handed = patience.wait_for(lambda: neighbours.leases.hand_to_training(job.id, job.epoch, stored))
    if handed.may_be_claimed and neighbours.doorbell.ring(job.id, queue_for(handed.stage, handed.gpu_class)):
        neighbours.leases.mark_rung(job.id)

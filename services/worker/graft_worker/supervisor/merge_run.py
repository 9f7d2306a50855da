"""The run of a `merge` stage: base and adapter in, the merged model out."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from graft_shared.artifacts import merged_prefix
from graft_shared.jobs import Job
from graft_worker.protocol import MergedEvent, MergeRequest
from graft_worker.supervisor.adapters import fetch_adapter
from graft_worker.supervisor.neighbours import Neighbours
from graft_worker.supervisor.patience import Patience
from graft_worker.supervisor.publishing import publish

MODULE = "graft_worker.merging"


def merge_request(job: Job, workdir: Path, neighbours: Neighbours, kept: ExitStack) -> MergeRequest:
    """Fetch and verify what merging needs, and say where it lies; the base is held in the cache by `kept`."""
    base = kept.enter_context(neighbours.base_models.whole(job.spec["base_model"], job.spec["revision"]))
    fetch_adapter(job.tenant, str(job.merges), workdir / "adapter", neighbours)
    return MergeRequest(
        job_id=str(job.merges),
        base_path=str(base.path),
        base_model=job.spec["base_model"],
        base_revision=base.revision,
        adapter_path=str(workdir / "adapter"),
    )


def publish_merged(
    job: Job, workdir: Path, request: MergeRequest, merged: MergedEvent, neighbours: Neighbours, patience: Patience
) -> None:
    """Store the merged model and settle its row as succeeded; raises as `publish`."""
    prefix = merged_prefix(job.tenant, job.id, job.epoch)
    folder = workdir / "merged"
    publish(job, folder, prefix, request, merged, neighbours, patience, metrics={}, memory={})

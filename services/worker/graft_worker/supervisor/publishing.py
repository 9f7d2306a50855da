"""Publishing: files into the bucket, each read back; the manifest last; and only then has the job succeeded."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from graft_shared.artifacts import MANIFEST_NAME, AdapterManifest, FileProof
from graft_shared.buckets import read_back
from graft_shared.errors import LeaseLost
from graft_shared.jobs import Job, StoredObject
from graft_worker.protocol import MergedEvent, MergeRequest, TrainedEvent, TrainRequest
from graft_worker.supervisor.neighbours import Neighbours
from graft_worker.supervisor.patience import Patience


def publish(
    job: Job,
    folder: Path,
    prefix: str,
    request: TrainRequest | MergeRequest,
    made: TrainedEvent | MergedEvent,
    neighbours: Neighbours,
    patience: Patience,
    *,
    metrics: dict[str, Any],
    memory: dict[str, Any],
) -> None:
    """Store the files of a folder under this prefix, then the manifest that names and proves them, and settle the job.

    Raises:
        ArtifactCorrupt: The bucket gives back other bytes than it was given.
        NeighbourUnavailable: Bucket or database stayed away longer than the operator's patience.
        LeaseLost: Another epoch owns the job.
    """
    proofs = []
    for path in sorted(folder.iterdir()):
        stored = patience.wait_for(partial(_store, prefix + path.name, path, neighbours))
        proofs.append(FileProof(name=path.name, size=stored.size, sha256=stored.sha256))
    manifest = AdapterManifest(
        job_id=request.job_id,
        epoch=job.epoch,
        base_model=request.base_model,
        base_revision=request.base_revision,
        files=tuple(proofs),
        proof=made.proof,
        versions=made.versions,
    )
    content = manifest.to_bytes()
    written = patience.wait_for(lambda: neighbours.bucket.put_bytes(prefix + MANIFEST_NAME, content))
    patience.wait_for(lambda: read_back(neighbours.bucket, written))
    adapter = {
        "uri": neighbours.bucket.uri(prefix.rstrip("/")),
        "epoch": job.epoch,
        "prefix": prefix,
        "manifest": asdict(written),
        "bytes": sum(proof.size for proof in proofs),
    }
    patience.wait_for(lambda: _settle(job, adapter, neighbours, metrics=metrics, memory=memory))


def _store(key: str, path: Path, neighbours: Neighbours) -> StoredObject:
    stored = neighbours.bucket.put_file(key, path)
    read_back(neighbours.bucket, stored)
    return stored


def _settle(
    job: Job, adapter: dict[str, Any], neighbours: Neighbours, *, metrics: dict[str, Any], memory: dict[str, Any]
) -> None:
    try:
        neighbours.leases.settle_success(job.id, job.epoch, adapter=adapter, metrics=metrics, memory=memory)
    except LeaseLost:
        # The answer to an earlier try may have been lost after its commit: then the row is ours already.
        row = neighbours.leases.read(job.id)
        if row is None or row.adapter is None or row.adapter["epoch"] != job.epoch:
            raise

"""The adapter of an earlier job, brought here and proven."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from graft_shared.artifacts import MANIFEST_NAME, AdapterManifest
from graft_shared.buckets import fetch
from graft_shared.errors import InvalidParameter
from graft_shared.jobs import StoredObject
from graft_worker.supervisor.neighbours import Neighbours


def fetch_adapter(
    tenant: str, job_id: str, folder: Path, neighbours: Neighbours, *, only: Collection[str] = ()
) -> AdapterManifest:
    """Make a folder with the files of this job's adapter, or with those of these names; returns its manifest.

    Raises:
        InvalidParameter: The job or its adapter is gone.
        ObjectNotFound, ArtifactCorrupt: The bucket does not hold what was published.
    """
    job = neighbours.leases.read(job_id)
    if job is None or job.tenant != tenant or job.adapter is None:
        raise InvalidParameter(param="adapter.job", reason=f"the adapter of '{job_id}' is gone")
    folder.mkdir(exist_ok=True)  # a try before this one may have lost the bucket half way
    manifest_path = folder / MANIFEST_NAME
    fetch(neighbours.bucket, StoredObject(**job.adapter["manifest"]), manifest_path)
    manifest = AdapterManifest.model_validate_json(manifest_path.read_text())
    manifest_path.unlink()
    for file in manifest.files:
        if not only or file.name in only:
            key = job.adapter["prefix"] + file.name
            fetch(neighbours.bucket, StoredObject(key=key, size=file.size, sha256=file.sha256), folder / file.name)
    return manifest

"""The routes of merged models: the full-precision base with a job's adapter in its weights."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from graft_api.auth import MayReadJobs, MayWriteJobs
from graft_api.deps import Here
from graft_api.errors import documented
from graft_api.jobs.adapter import linked_files, read_adapter
from graft_api.jobs.endpoints import TAR, tar_of
from graft_api.jobs.queue import queue_of_merge
from graft_api.jobs.schemas import JobError, MergedModelBody, MergedModelDeleted
from graft_shared.ids import new_merge_id
from graft_shared.jobs import Job

router = APIRouter(prefix="/jobs/{job_id}/merged", tags=["jobs"])


@router.post("", status_code=202, summary="Merge a job's adapter into its base", responses=documented(404, 409))
def create_merged(request: Request, job_id: str, tenant: MayWriteJobs, here: Here) -> MergedModelBody:
    """Have a CPU worker make it; asking again is asking once, until one has failed. 409 until the job has succeeded."""
    merge, is_new = here.merges.ask(tenant, job_id, id=new_merge_id())
    if is_new:
        here.bells.ring(merge)
    return _body(merge, here, str(request.base_url))


@router.get("", summary="A job's merged model", responses=documented(404))
def get_merged(request: Request, job_id: str, tenant: MayReadJobs, here: Here) -> MergedModelBody:
    """Return how far it is and, once it is made, a link per file."""
    return _body(here.merges.get(tenant, job_id), here, str(request.base_url))


@router.get(
    "/archive",
    summary="The merged model as one .tar",
    response_class=StreamingResponse,
    responses={**TAR, **documented(404, 409)},
)
def get_merged_archive(job_id: str, tenant: MayReadJobs, here: Here) -> StreamingResponse:
    """Stream its files and its manifest, each proven by its sha256 on the way; 409 until it is made."""
    return tar_of(here.merges.get(tenant, job_id), here, name=f"{job_id}-merged")


@router.delete("", summary="Delete a merged model", responses=documented(404, 409))
def delete_merged(job_id: str, tenant: MayWriteJobs, here: Here) -> MergedModelDeleted:
    """Delete it for good; the adapter stays, and it can be merged again. 409 while it is being made."""
    here.merges.delete(tenant, job_id)
    return MergedModelDeleted(job_id=job_id)


def _body(merge: Job, here: Here, base_url: str) -> MergedModelBody:
    made = read_adapter(merge, here.bucket) if merge.adapter is not None else None
    return MergedModelBody(
        job_id=str(merge.merges),
        status=merge.status,
        phase=merge.phase,
        queue=queue_of_merge(merge, here.fleet.crews()),
        created_at=int(merge.created_at.timestamp()),
        finished_at=int(merge.finished_at.timestamp()) if merge.finished_at else None,
        base_model=merge.spec["base_model"],
        base_revision=made.manifest.base_revision if made else merge.spec["revision"],
        error=JobError.model_validate(merge.error) if merge.error else None,
        files=linked_files(made, here.bucket, here.settings, base_url) if made else [],
        links_expire_at=int(time.time() + here.settings.link_seconds) if made else None,
        proof=made.manifest.proof if made else {},
        versions=made.manifest.versions if made else {},
    )

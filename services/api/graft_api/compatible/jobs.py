"""The routes of fine-tuning jobs, as OpenAI's clients call them; they are the jobs of `/jobs`."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Request

from graft_api.auth import MayReadJobs, MayWriteJobs
from graft_api.compatible.names import renamed
from graft_api.compatible.requests import native_body
from graft_api.compatible.resends import sending_of
from graft_api.compatible.schemas import FineTuningCheckpointObject, FineTuningEventObject, FineTuningJobObject
from graft_api.compatible.views import checkpoint_object, event_object, job_object
from graft_api.deps import Here, JsonBody
from graft_api.errors import documented
from graft_api.jobs import service
from graft_api.jobs.checkpoints import checkpoint_id, committed_checkpoints, number_behind, page_of
from graft_api.jobs.endpoints import METADATA_QUERY, metadata_of
from graft_api.paging import After, Limit, Page, envelope
from graft_shared.errors import GraftError
from graft_shared.store import JobQuery

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["compatible"])

_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/FineTuningRequest"}}},
    }
}
MOST_RETRIES = 1000

Key = Annotated[
    str | None, Header(min_length=1, max_length=255, description="The same key and body give the same job.")
]
RetryCount = Annotated[
    int | None,
    Header(ge=0, le=MOST_RETRIES, description="How often the client has sent this before; without a key it is heeded."),
]
ReadTimeout = Annotated[
    float | None, Header(gt=0, description="How many seconds the client waits for an answer before it sends again.")
]


@router.post("", summary="Submit a job", openapi_extra=_BODY, responses=documented(413, 415))
def create_job(
    tenant: MayWriteJobs,
    body: JsonBody,
    here: Here,
    idempotency_key: Key = None,
    x_stainless_retry_count: RetryCount = None,
    x_stainless_read_timeout: ReadTimeout = None,
) -> FineTuningJobObject:
    """Accept a job, or refuse it with the numbers. What the client sends again makes no second job."""
    sending = None
    if idempotency_key is None:
        sending = sending_of(x_stainless_retry_count, x_stainless_read_timeout, here.database.now())
    native = native_body(body)
    try:
        job = service.submit(tenant, native, idempotency_key, here, sending=sending)
    except GraftError as error:
        raise renamed(error) from error
    return job_object(job)


@router.get("", summary="List jobs, newest first", openapi_extra=METADATA_QUERY, responses=documented(404))
def list_jobs(
    request: Request,
    tenant: MayReadJobs,
    here: Here,
    after: After = None,
    limit: Limit = 20,
) -> Page[FineTuningJobObject]:
    """List this tenant's jobs, those that were posted to `/jobs` included."""
    query = JobQuery(metadata=metadata_of(request), after=after, limit=limit)
    jobs, has_more = here.jobs.list(tenant, query)
    return envelope([job_object(job) for job in jobs], [job.id for job in jobs], has_more=has_more)


@router.get("/{job_id}", summary="One job", responses=documented(404))
def get_job(job_id: str, tenant: MayReadJobs, here: Here) -> FineTuningJobObject:
    """Return the job."""
    return job_object(here.jobs.get(tenant, job_id))


@router.post("/{job_id}/cancel", summary="End a job before its time", responses=documented(404, 409))
def cancel_job(job_id: str, tenant: MayWriteJobs, here: Here) -> FineTuningJobObject:
    """Cancel a queued job at once; a running one is `running` until it has stopped."""
    return job_object(here.jobs.cancel(tenant, job_id))


@router.post("/{job_id}/pause", summary="Stop a job for a while", responses=documented(404, 409))
def pause_job(job_id: str, tenant: MayWriteJobs, here: Here) -> FineTuningJobObject:
    """Pause a job; it is `running` until it is saved, and `queued` while it is paused."""
    return job_object(here.jobs.pause(tenant, job_id))


@router.post("/{job_id}/resume", summary="Let a paused job go on", responses=documented(404, 409))
def resume_job(job_id: str, tenant: MayWriteJobs, here: Here) -> FineTuningJobObject:
    """Go on from the last checkpoint, in the old place."""
    return job_object(service.resume(tenant, job_id, here))


@router.get("/{job_id}/events", summary="A job's history, newest first", responses=documented(404))
def list_events(
    job_id: str,
    tenant: MayReadJobs,
    here: Here,
    after: After = None,
    limit: Limit = 20,
) -> Page[FineTuningEventObject]:
    """Return a page of what has happened."""
    job = here.jobs.get(tenant, job_id)
    before = number_behind(after, "ftevent", job.id)
    page, has_more = here.jobs.latest_events(tenant, job.id, before=before, limit=limit)
    bodies = [event_object(event) for event in page]
    return envelope(bodies, [body.id for body in bodies], has_more=has_more)


@router.get("/{job_id}/checkpoints", summary="A job's checkpoints, newest first", responses=documented(404))
def list_checkpoints(
    job_id: str,
    tenant: MayReadJobs,
    here: Here,
    after: After = None,
    limit: Limit = 10,
) -> Page[FineTuningCheckpointObject]:
    """Return a page of the checkpoints that were stored while the job trained."""
    job = here.jobs.get(tenant, job_id)
    page, has_more = page_of(committed_checkpoints(job, here.jobs), number_behind(after, "ftckpt", job.id), limit)
    ids = [checkpoint_id(job.id, checkpoint.number) for checkpoint in page]
    return envelope([checkpoint_object(job, checkpoint) for checkpoint in page], ids, has_more=has_more)

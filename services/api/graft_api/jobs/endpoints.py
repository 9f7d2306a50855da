"""The routes of jobs."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import PlainTextResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from graft_api.auth import MayReadJobs, MayWriteJobs, may_go_on
from graft_api.deps import Here, JsonBody, Neighbours
from graft_api.errors import documented
from graft_api.jobs import service
from graft_api.jobs.adapter import Archive, adapter_body, read_adapter
from graft_api.jobs.checkpoints import checkpoint_body, committed_checkpoints, number_behind, page_of
from graft_api.jobs.events import all_events, event_stream
from graft_api.jobs.fleet import workers_for
from graft_api.jobs.schemas import (
    AdapterBody,
    CheckpointBody,
    Estimate,
    EventBody,
    JobBody,
    JobDeleted,
    JobMetrics,
    JobReport,
    MemoryForecast,
    Refusal,
    event_body,
)
from graft_api.jobs.views import job_bodies, job_body, metric_series, plan_body, report_body
from graft_api.jobs.watch import Place
from graft_api.paging import After, Limit, Page, envelope
from graft_api.parsing import parse_spec
from graft_api.streams import chunks_of
from graft_shared.artifacts import log_key
from graft_shared.errors import InvalidParameter, NotFound, ObjectNotFound, VramCapacityExceeded
from graft_shared.jobs import TERMINAL_STATES, Job, JobStatus, Stage
from graft_shared.specs import METADATA_KEY_PATTERN, NO_NUL
from graft_shared.store import JobQuery

router = APIRouter(prefix="/jobs", tags=["jobs"])

MAX_UNIX_SECONDS = 253_402_300_799  # the last second of the year 9999, where datetime ends
_SPEC_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobSpec"}}},
    }
}
METADATA_QUERY: dict[str, Any] = {
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "style": "deepObject",
            "explode": True,
            "description": "Only jobs whose metadata has these pairs, as `metadata[team]=search`.",
            "schema": {
                "type": "object",
                "propertyNames": {"pattern": METADATA_KEY_PATTERN},
                "additionalProperties": {"type": "string", "pattern": NO_NUL},
            },
        }
    ]
}
_EVENT_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
    204: {"description": "The job has ended and `Last-Event-ID` was its last event: do not come back."},
}
TAR: dict[int | str, dict[str, Any]] = {200: {"content": {"application/x-tar": {}}}}

UnixSeconds = Annotated[int | None, Query(ge=0, le=MAX_UNIX_SECONDS, description="Unix seconds.")]


class LogNotFound(NotFound):
    """The job '{job_id}' has written no log yet."""


@router.post(
    "",
    status_code=202,
    response_model=JobBody,
    summary="Submit a job",
    openapi_extra=_SPEC_BODY,
    responses=documented(413, 415),
)
def create_job(
    tenant: MayWriteJobs,
    body: JsonBody,
    here: Here,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> Response:
    """Accept a job, or refuse it with the numbers. The same `Idempotency-Key` and body give the same job."""
    return _written(job_body(service.submit(tenant, body, idempotency_key, here), here), 202)


@router.post(
    "/estimate",
    summary="What submitting this job would decide",
    openapi_extra=_SPEC_BODY,
    responses=documented(413, 415),
)
def estimate_job(tenant: MayReadJobs, body: JsonBody, here: Here) -> Estimate | Refusal:
    """Decide as POST /jobs would, without a job. What does not fit anywhere is answered with what would."""
    spec = parse_spec(body)
    try:
        spec, shape, placement = service.admit(tenant, spec, here)
    except VramCapacityExceeded as refusal:
        facts = {**refusal.facts, "spec": service.normalised(spec), "code": refusal.code, "message": refusal.message}
        return Refusal.model_validate(facts)
    gpu_class = placement.gpu_class.name
    return Estimate(
        spec=service.normalised(spec),
        gpu_class=gpu_class,
        plan=plan_body(placement.plan),
        target_modules=list(placement.target_modules),
        memory=MemoryForecast.model_validate(placement.estimate.to_dict()),
        speed=service.speed_of(tenant, spec, shape, placement, here),
        live_workers=len(workers_for(Stage.TRAIN, gpu_class, here.workers.alive(), here.capacity)),
        warnings=list(placement.warnings),
    )


@router.get("", summary="List jobs, newest first", openapi_extra=METADATA_QUERY, responses=documented(404))
def list_jobs(
    request: Request,
    tenant: MayReadJobs,
    here: Here,
    status: JobStatus | None = None,
    base_model: Annotated[str | None, Query(max_length=200, pattern=NO_NUL)] = None,
    created_after: UnixSeconds = None,
    created_before: UnixSeconds = None,
    after: After = None,
    limit: Limit = 20,
) -> Page[JobBody]:
    """List this tenant's jobs."""
    query = JobQuery(
        status=status,
        base_model=base_model,
        metadata=metadata_of(request),
        created_after=_moment(created_after),
        created_before=_moment(created_before),
        after=after,
        limit=limit,
    )
    jobs, has_more = here.jobs.list(tenant, query)
    return envelope(job_bodies(jobs, here), [job.id for job in jobs], has_more=has_more)


@router.get("/{job_id}", response_model=JobBody, summary="One job", responses=documented(404))
def get_job(job_id: str, tenant: MayReadJobs, here: Here) -> Response:
    """Return the job."""
    return _written(job_body(here.jobs.get(tenant, job_id), here), 200)


@router.delete("/{job_id}", summary="Delete a job that has ended", responses=documented(404, 409))
def delete_job(job_id: str, tenant: MayWriteJobs, here: Here) -> JobDeleted:
    """Delete the job, its history, and its artifacts, the adapter included; 409 while it has not ended."""
    here.jobs.delete(tenant, job_id)
    return JobDeleted(id=job_id)


@router.post("/{job_id}/cancel", summary="End a job before its time", responses=documented(404, 409))
def cancel_job(job_id: str, tenant: MayWriteJobs, here: Here) -> JobBody:
    """Cancel a queued job at once and stop a running one soon; 409 when it has ended already."""
    return job_body(here.jobs.cancel(tenant, job_id), here)


@router.post("/{job_id}/pause", summary="Stop a job for a while", responses=documented(404, 409))
def pause_job(job_id: str, tenant: MayWriteJobs, here: Here) -> JobBody:
    """Pause a queued job at once and a running one once it is saved; 409 when it has ended or is being cancelled."""
    return job_body(here.jobs.pause(tenant, job_id), here)


@router.post("/{job_id}/resume", summary="Let a paused job go on", responses=documented(404, 409))
def resume_job(job_id: str, tenant: MayWriteJobs, here: Here) -> JobBody:
    """Go on from the last checkpoint, in the old place; 409 when the job has ended or is being cancelled."""
    return job_body(service.resume(tenant, job_id, here), here)


@router.get("/{job_id}/report", summary="What a job learns from", responses=documented(404, 409))
def get_report(job_id: str, tenant: MayReadJobs, here: Here) -> JobReport:
    """Return the report on its data, as of a file; 409 until the data is prepared."""
    return report_body(here.jobs.get(tenant, job_id))


@router.get(
    "/{job_id}/events",
    summary="A job's history, as a page or live",
    response_model=Page[EventBody],
    responses={**_EVENT_STREAM, **documented(404)},
)
async def list_events(
    request: Request,
    job_id: str,
    tenant: MayReadJobs,
    here: Here,
    after: Annotated[int, Query(ge=0, le=2**31 - 1, description="The id of the last event that is known.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    last_event_id: Annotated[str | None, Header(pattern=r"^[0-9]{1,9}$", description="Instead of `after`.")] = None,
) -> Page[EventBody] | Response:
    """Return a page, oldest first; with `Accept: text/event-stream`, a stream that ends with the job."""
    if "text/event-stream" not in request.headers.get("accept", ""):
        page, has_more = await run_in_threadpool(here.jobs.events, tenant, job_id, after=after, limit=limit)
        return envelope([event_body(event) for event in page], [event.id for event in page], has_more=has_more)
    position = int(last_event_id) if last_event_id is not None else after
    return await _live(request, job_id, tenant, here, position)


async def _live(request: Request, job_id: str, tenant: str, here: Here, after: int) -> Response:
    job = await run_in_threadpool(here.jobs.get, tenant, job_id)
    newest = await run_in_threadpool(here.jobs.newest_events, {(tenant, job_id)})
    after = min(
        after, newest.get((tenant, job_id), 0)
    )  # who has seen more than there is comes from before a backup was restored
    first, _ = await run_in_threadpool(here.jobs.events, tenant, job_id, after=after)
    if not first and job.state in TERMINAL_STATES:
        return Response(status_code=204)
    stream = event_stream(here.watch, Place(tenant, job_id, after), first, may_go_on=partial(may_go_on, request, here))
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(stream, media_type="text/event-stream", headers=headers)


@router.get("/{job_id}/checkpoints", summary="A job's checkpoints, newest first", responses=documented(404))
def list_checkpoints(
    job_id: str,
    tenant: MayReadJobs,
    here: Here,
    after: After = None,
    limit: Limit = 20,
) -> Page[CheckpointBody]:
    """Return a page of the checkpoints that were stored while the job trained."""
    job = here.jobs.get(tenant, job_id)
    page, has_more = page_of(committed_checkpoints(job, here.jobs), number_behind(after, "ftckpt", job.id), limit)
    bodies = [checkpoint_body(job, checkpoint) for checkpoint in page]
    return envelope(bodies, [body.id for body in bodies], has_more=has_more)


@router.get("/{job_id}/metrics", summary="Losses and speeds by step", responses=documented(404))
def get_metrics(job_id: str, tenant: MayReadJobs, here: Here) -> JobMetrics:
    """Return series for plotting."""
    return metric_series(job_id, all_events(here.jobs, tenant, job_id))


@router.get(
    "/{job_id}/logs",
    summary="The log of the job's last run",
    response_class=PlainTextResponse,
    responses={200: {"content": {"text/plain": {}}}, **documented(404)},
)
def get_logs(job_id: str, tenant: MayReadJobs, here: Here) -> StreamingResponse:
    """Stream the log that the latest epoch left."""
    job = here.jobs.get(tenant, job_id)
    for epoch in range(job.epoch, 0, -1):
        try:
            source = here.bucket.open(log_key(tenant, job.id, epoch))
        except ObjectNotFound:
            continue
        return StreamingResponse(chunks_of(source), media_type="text/plain; charset=utf-8")
    raise LogNotFound(job_id=job_id)


@router.get("/{job_id}/adapter", summary="The adapter's manifest, with a link per file", responses=documented(404, 409))
def get_adapter(request: Request, job_id: str, tenant: MayReadJobs, here: Here) -> AdapterBody:
    """Return what the adapter consists of; 409 until the job has succeeded."""
    adapter = read_adapter(here.jobs.get(tenant, job_id), here.bucket)
    return adapter_body(adapter, here.bucket, here.settings, str(request.base_url))


@router.get(
    "/{job_id}/adapter/archive",
    summary="The adapter as one .tar",
    response_class=StreamingResponse,
    responses={**TAR, **documented(404, 409)},
)
def get_archive(job_id: str, tenant: MayReadJobs, here: Here) -> StreamingResponse:
    """Stream the adapter's files and its manifest, each proven by its sha256 on the way."""
    return tar_of(here.jobs.get(tenant, job_id), here, name=job_id)


def tar_of(job: Job, here: Neighbours, *, name: str) -> StreamingResponse:
    """The answer that streams what a job has made, under one folder of this name."""
    mtime = int((job.finished_at or job.created_at).timestamp())
    archive = Archive(adapter=read_adapter(job, here.bucket), bucket=here.bucket, folder=name, mtime=mtime)
    archive.check()
    headers = {
        "content-length": str(archive.size),
        "content-disposition": f'attachment; filename="{name}.tar"',
        "cache-control": "private, no-store",
    }
    return StreamingResponse(archive.chunks(), media_type="application/x-tar", headers=headers)


def metadata_of(request: Request) -> dict[str, str]:
    """The pairs of `metadata[key]=value` that a list is asked to filter by."""
    pairs = {}
    for name, value in request.query_params.multi_items():
        if name.startswith("metadata["):
            key = name.removeprefix("metadata[").removesuffix("]")
            if not re.fullmatch(METADATA_KEY_PATTERN, key):
                raise InvalidParameter(param="metadata", reason="name a key, as in metadata[team]=search")
            if key in pairs:
                raise InvalidParameter(param="metadata", reason=f"the key '{key}' is given twice")
            pairs[key] = value
    return pairs


def _moment(seconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(seconds, tz=UTC) if seconds is not None else None


def _written(body: JobBody, status_code: int) -> Response:
    """The answer, written by this thread; FastAPI asks another one to check it, and makes everybody wait meanwhile."""
    return Response(body.model_dump_json(by_alias=True), status_code, media_type="application/json")

"""The routes of models: base models, and the adapters that the tenant's jobs have made of them."""

from __future__ import annotations

from fastapi import APIRouter

from graft_api.auth import MayReadJobs
from graft_api.compatible.names import base_and_job_of_model, fine_tuned_model
from graft_api.compatible.schemas import ModelObject
from graft_api.compatible.views import adapter_object, base_object
from graft_api.deps import Here
from graft_api.errors import documented
from graft_api.paging import Page, envelope
from graft_shared.errors import BaseModelNotFound, JobNotFound, NotFound
from graft_shared.jobs import JobState, JobStatus
from graft_shared.store import JobQuery

router = APIRouter(prefix="/v1/models", tags=["compatible"])

MOST_ADAPTERS = 1000  # of the list, which OpenAI's clients do not page through


class ModelNotFound(NotFound):
    """There is no model '{model}'. GET /v1/models lists them."""


@router.get("", summary="Base models and adapters")
def list_models(tenant: MayReadJobs, here: Here) -> Page[ModelObject]:
    """List every base model that can be named without asking the hub, and this tenant's last 1000 adapters."""
    bodies = [base_object(source, shape) for source, shape in here.bases.known()]
    succeeded, _ = here.jobs.list(tenant, JobQuery(status=JobStatus.SUCCEEDED, limit=MOST_ADAPTERS))
    bodies += [adapter_object(job) for job in succeeded]
    return envelope(bodies, [body.id for body in bodies], has_more=False)


@router.get("/{model:path}", summary="One base model or adapter", responses=documented(404))
def get_model(model: str, tenant: MayReadJobs, here: Here) -> ModelObject:
    """Return it."""
    _, job_id = base_and_job_of_model(model)
    try:
        if job_id is None:
            return base_object(*here.bases.get(model))
        job = here.jobs.get(tenant, job_id)
    except (BaseModelNotFound, JobNotFound) as error:
        raise ModelNotFound(model=model) from error
    if job.state is not JobState.SUCCEEDED or fine_tuned_model(job) != model:
        raise ModelNotFound(model=model)
    return adapter_object(job)

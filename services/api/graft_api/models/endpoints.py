"""The routes of base models."""

from __future__ import annotations

from fastapi import APIRouter, Security

from graft_api.auth import tenant
from graft_api.deps import Here
from graft_api.errors import documented
from graft_api.models.schemas import BaseModelBody, base_model_body
from graft_api.paging import Page, envelope

router = APIRouter(prefix="/models", tags=["models"], dependencies=[Security(tenant)])


@router.get("", summary="The base models that jobs may name")
def list_models(here: Here) -> Page[BaseModelBody]:
    """List the registered folders and the catalogue, whole."""
    bodies = [base_model_body(source, shape) for source, shape in here.bases.known()]
    return envelope(bodies, [body.id for body in bodies], has_more=False)


@router.get("/{base_model:path}", summary="One base model", responses=documented(404))
def get_model(base_model: str, here: Here) -> BaseModelBody:
    """Return its shape and limits."""
    return base_model_body(*here.bases.get(base_model))

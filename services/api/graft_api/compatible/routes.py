"""The compatible surface as one router: `base_url=http://…/v1` is all that OpenAI's own clients need."""

from __future__ import annotations

from fastapi import APIRouter

from graft_api.compatible import files, jobs, models

router = APIRouter(prefix="/v1")
for part in (files, jobs, models):
    router.include_router(part.router)

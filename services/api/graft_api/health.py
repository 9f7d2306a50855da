"""Alive, and ready: what orchestrators and `graft up` ask."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel

from graft_api.deps import Here
from graft_shared.errors import NeighbourUnavailable

router = APIRouter(tags=["health"])


class Alive(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Check(BaseModel):
    """Whether one neighbour answers, and what it says if not."""

    ok: bool
    reason: str | None = None


class Readiness(BaseModel):
    """Whether jobs can be taken: not without the database; later than usual without broker or bucket."""

    status: Literal["ready", "degraded", "unavailable"]
    checks: dict[str, Check]


@router.get("/healthz", summary="Whether the process is alive")
async def healthz() -> Alive:
    """Answer."""
    return Alive()


@router.get("/readyz", summary="Whether jobs can be taken", responses={503: {"model": Readiness}})
def readyz(here: Here, response: Response) -> Readiness:
    """Ask every neighbour."""
    checks = {"database": _database(here), "broker": _broker(here), "bucket": _bucket(here)}
    if not checks["database"].ok:
        response.status_code = 503
        return Readiness(status="unavailable", checks=checks)
    return Readiness(status="ready" if all(check.ok for check in checks.values()) else "degraded", checks=checks)


def _database(here: Here) -> Check:
    try:
        here.database.ping()
    except NeighbourUnavailable as error:
        hint = "If its tables are missing, run: python -m graft_shared.store.migrate"
        return Check(ok=False, reason=f"{error.message.rstrip('.')}. {hint}")
    return Check(ok=True)


def _broker(here: Here) -> Check:
    if here.doorbell.ping():
        return Check(ok=True)
    return Check(ok=False, reason="The broker does not answer: jobs are accepted, and workers find them by looking.")


def _bucket(here: Here) -> Check:
    try:
        here.bucket.ping()
    except NeighbourUnavailable as error:
        return Check(ok=False, reason=error.message)
    return Check(ok=True)

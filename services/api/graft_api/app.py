"""The app: the only place that chooses real neighbours."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI

from graft_api import health, metrics, objects
from graft_api.capacity import endpoints as capacity_routes
from graft_api.compatible import files as compatible_files
from graft_api.compatible import jobs as compatible_jobs
from graft_api.compatible import models as compatible_models
from graft_api.compatible.requests import FineTuningRequest
from graft_api.dashboard import endpoints as dashboard_routes
from graft_api.deps import Neighbours, known_query
from graft_api.errors import DOCUMENTED, ErrorBody, documented, install_handlers
from graft_api.exchanges import Exchanges
from graft_api.files import endpoints as file_routes
from graft_api.files.schemas import UploadRequest
from graft_api.jobs import endpoints as job_routes
from graft_api.jobs import merged as merged_routes
from graft_api.jobs.bells import Bells
from graft_api.jobs.fleet import Fleet
from graft_api.jobs.lines import HeldLines
from graft_api.jobs.starts import Starts
from graft_api.jobs.watch import Watch
from graft_api.keys.ring import KeyRing
from graft_api.keys.static import read_keys
from graft_api.models import endpoints as model_routes
from graft_api.models.bases import BaseModels, HubConfigs
from graft_api.rates import Rates
from graft_api.settings import ApiSettings
from graft_api.webhooks import endpoints as webhook_routes
from graft_shared.buckets import Bucket, open_bucket
from graft_shared.buckets.directory import DirectoryBucket
from graft_shared.capacity import CapacityTable
from graft_shared.catalogue import Catalogue
from graft_shared.defaults import load_capacity, load_catalogue
from graft_shared.dispatch import CeleryDoorbell, Doorbell
from graft_shared.specs import JobSpec
from graft_shared.store import (
    Database,
    Files,
    Jobs,
    Keys,
    Leases,
    Merges,
    Outbox,
    Quotas,
    Reports,
    Totals,
    Workers,
    open_database,
)
from graft_shared.tracing import open_tracing
from graft_shared.webhooks import Postman

DESCRIPTION = (
    "Fine-tunes LoRA adapters on 4-bit base models (QLoRA). Unknown keys and parameters are refused everywhere."
)


def build_app(settings: ApiSettings, *, open_without_keys: bool) -> FastAPI:
    """The app with the neighbours that the settings name; connects to none of them yet.

    Args:
        open_without_keys: Whether it serves whoever asks while there is no key at all.
    """
    return create_app(
        neighbours_of(
            settings=settings,
            database=open_database(settings.database),
            bucket=open_bucket(settings),
            doorbell=CeleryDoorbell(settings.broker_url),
            catalogue=load_catalogue(settings.catalogue_path),
            capacity=load_capacity(settings.capacity_path),
            open_without_keys=open_without_keys,
        )
    )


def neighbours_of(
    *,
    settings: ApiSettings,
    database: Database,
    bucket: Bucket,
    doorbell: Doorbell,
    catalogue: Catalogue,
    capacity: CapacityTable,
    hub: HubConfigs | None = None,
    open_without_keys: bool = True,
) -> Neighbours:
    """Everything that the routes are handed, made from what was chosen."""
    quotas = Quotas.of(settings)
    jobs = Jobs(database, quotas)
    workers, totals = Workers(database), Totals(database)
    return Neighbours(
        settings=settings,
        keys=KeyRing(
            Keys(database),
            static=read_keys(settings.api_keys.get_secret_value()),
            pepper=settings.key_pepper,
            open_without_keys=open_without_keys,
        ),
        rates=Rates(settings.requests_per_minute),
        database=database,
        jobs=jobs,
        merges=Merges(database),
        files=Files(database, quotas),
        reports=Reports(database, settings.lease),
        workers=workers,
        totals=totals,
        fleet=Fleet(workers),
        lines=HeldLines(jobs),
        starts=Starts(workers, totals, capacity),
        bells=Bells(doorbell, Leases(database, settings.lease), workers),
        watch=Watch(jobs),
        outbox=Outbox(database),
        postman=Postman.of(settings),
        bucket=bucket,
        doorbell=doorbell,
        capacity=capacity,
        largest_bases=capacity_routes.largest_bases(capacity, catalogue),
        bases=BaseModels(
            registered_dir=settings.registered_models_dir, catalogue=catalogue, hub=hub or _hub_of(settings)
        ),
        tracing=open_tracing("graft-api"),
    )


def create_app(neighbours: Neighbours) -> FastAPI:
    """The app with these neighbours. It gives them back when it ends."""
    app = FastAPI(
        title="Graft",
        description=DESCRIPTION,
        version="0.1.0",
        lifespan=_lifespan,
        dependencies=[Depends(known_query)],
        responses=DOCUMENTED,
        redirect_slashes=False,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
    )
    app.state.neighbours = neighbours
    _add_routes(app, neighbours.bucket)
    install_handlers(app)
    app.add_middleware(Exchanges, tracing=neighbours.tracing)
    _describe_spec(app)
    return app


def _add_routes(app: FastAPI, bucket: Bucket) -> None:
    native = (job_routes, merged_routes, webhook_routes, file_routes, model_routes, capacity_routes, metrics)
    for routes in (*native, compatible_files, compatible_jobs, compatible_models):
        app.include_router(routes.router, responses=documented(401, 403, 429))
    app.include_router(health.router)
    app.include_router(dashboard_routes.router)
    if isinstance(bucket, DirectoryBucket):
        app.include_router(objects.router)


def _hub_of(settings: ApiSettings) -> HubConfigs:
    token = settings.hub_token
    return HubConfigs(
        allowed=settings.hub_allowed,
        token=token.get_secret_value() if token else None,
        cache_dir=settings.hub_cache_dir,
        timeout_seconds=settings.hub_timeout_seconds,
    )


def _describe_spec(app: FastAPI) -> None:
    """Put bodies into the OpenAPI document that FastAPI does not see: those that routes read themselves, and errors."""
    document = app.openapi()
    for body in (JobSpec, FineTuningRequest, UploadRequest, ErrorBody):
        schema = body.model_json_schema(by_alias=True, ref_template="#/components/schemas/{model}")
        parts: dict[str, Any] = schema.pop("$defs", {})
        document["components"]["schemas"] |= {**parts, body.__name__: schema}


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    app.state.neighbours.bells.close()
    app.state.neighbours.database.close()
    if app.state.neighbours.tracing is not None:
        app.state.neighbours.tracing.close()

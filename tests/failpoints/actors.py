"""The processes of a trial: worker, reconciler and API, lean but real; Celery, uvicorn and torch have no part in it."""

from __future__ import annotations

import functools
import json
import logging
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from sqlalchemy import create_engine
from starlette.testclient import TestClient

from graft_api.app import create_app, neighbours_of
from graft_api.settings import ApiSettings
from graft_shared.buckets.directory import DirectoryBucket
from graft_shared.defaults import load_capacity, load_catalogue
from graft_shared.dispatch import queue_for
from graft_shared.errors import StoreUnavailable
from graft_shared.jobs import Stage
from graft_shared.logs import configure_logging
from graft_shared.reconciler import Reconciler
from graft_shared.store import Database, Files, Leases, Reports, Workers
from graft_worker.device import Device
from graft_worker.place import hold_name, place_of, register
from graft_worker.settings import WorkerSettings
from graft_worker.supervisor.bases import BaseModels
from graft_worker.supervisor.cache import HostCache
from graft_worker.supervisor.neighbours import Neighbours
from graft_worker.supervisor.spare import SpareTrainer
from graft_worker.tasks import answer_bell, look_for_work
from tests.failpoints.arm import PRESENCE, arm
from tests.failpoints.bells import FolderBell
from tests.failpoints.databases import open_warm
from tests.failpoints.points import Fault, Point
from tests.failpoints.scale import BEAT_SECONDS, SETTINGS, WORKER_SETTINGS
from tests.fakes.doorbell import FakeDoorbell

GPU_CLASS = "cpu"
LISTEN_SECONDS = 0.02
NEVER_SECONDS = 3600.0
STAGES = (Stage.PREPARE, Stage.TRAIN)

logger = logging.getLogger(__name__)

capacity_table, catalogue = functools.cache(load_capacity), functools.cache(load_catalogue)


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where a trial takes place: a folder that holds everything but, maybe, the database."""

    folder: Path
    database_url: str

    @property
    def bell(self) -> FolderBell:
        return FolderBell(self.folder / "bells")

    @property
    def bucket(self) -> DirectoryBucket:
        return DirectoryBucket(self.folder / "bucket")

    def open_database(self) -> Database:
        return open_warm(self.database_url)


@dataclass(frozen=True, kw_only=True)
class Arms:
    """What an actor is armed with."""

    point: Point
    fault: Fault


def run_worker(site: Site, name: str, *, looks: bool, arms: Arms | None) -> None:
    """Work at both stages under this name until SIGTERM; `looks` without waiting for a bell, as production does."""
    _begin(site, arms)
    drain = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: drain.set())
    times = WORKER_SETTINGS if looks else {**WORKER_SETTINGS, "look_seconds": NEVER_SECONDS}
    settings = WorkerSettings(state_dir=site.folder, database_url=site.database_url, worker_name=name, **times)
    _take_name(site, settings)
    here = {stage: _neighbours(site, settings, stage, drain) for stage in STAGES}
    threading.Thread(target=_beat, args=[here[Stage.TRAIN], drain], daemon=True).start()
    look_at = 0.0
    while not drain.is_set():
        if time.monotonic() >= look_at:
            for stage in STAGES:
                PRESENCE.stage = stage
                look_for_work(here[stage])  # what is raised here ends the process, as it ends a worker
            (site.folder / f"{name}.looked").touch()
            look_at = time.monotonic() + settings.look_seconds
        if not any(_answered(site, stage, here[stage]) for stage in STAGES):
            drain.wait(LISTEN_SECONDS)
    Workers(here[Stage.TRAIN].database).leave(name, here[Stage.TRAIN].place)


def run_reconciler(site: Site, *, arms: Arms | None) -> None:
    """Reconcile until killed."""
    _begin(site, arms)
    database = site.open_database()
    reconciler = Reconciler(
        leases=Leases(database, timedelta(seconds=SETTINGS["lease_seconds"])),
        workers=Workers(database),
        doorbell=site.bell,
        bell_again=timedelta(seconds=SETTINGS["bell_again_seconds"]),
    )
    reconciler.run(timedelta(seconds=SETTINGS["reconcile_seconds"]), threading.Event())


def run_api(site: Site, request: dict[str, Any], answer: Path, *, arms: Arms | None) -> None:
    """Answer one request: the real routes, spoken to in-process. Status and body are left in a file."""
    _begin(site, arms)
    database = site.open_database()
    app = the_app()
    app.state.neighbours = neighbours_of(
        settings=ApiSettings(state_dir=site.folder, database_url=site.database_url, **SETTINGS),
        database=database,
        bucket=site.bucket,
        doorbell=site.bell,
        catalogue=catalogue(),
        capacity=capacity_table(),
    )
    answered = TestClient(app, "http://localhost", raise_server_exceptions=False).request(**request)
    partial = answer.with_suffix(".partial")
    partial.write_text(json.dumps({"status": answered.status_code, "body": answered.json()}))
    partial.rename(answer)
    app.state.neighbours.bells._ringer.shutdown(wait=True)  # a real API lives on and rings meanwhile


def warm_api() -> None:
    """Have the app look at its own document, which takes a second and is then shared with all that are forked."""
    the_app().openapi()
    TestClient(the_app()).get("/healthz")


@functools.cache
def the_app() -> FastAPI:
    """One app for all trials, given other neighbours in each: its routes take long to make."""
    nowhere = Path("/nonexistent")
    return create_app(
        neighbours_of(
            settings=ApiSettings(state_dir=nowhere),
            database=Database(create_engine("sqlite://")),
            bucket=DirectoryBucket(nowhere),
            doorbell=FakeDoorbell(),
            catalogue=catalogue(),
            capacity=capacity_table(),
        )
    )


def _begin(site: Site, arms: Arms | None) -> None:
    configure_logging("json")
    if arms is not None:
        arm(arms.point, arms.fault, site.folder)


def _answered(site: Site, stage: Stage, here: Neighbours) -> bool:
    queue = queue_for(stage, GPU_CLASS)
    job_id = site.bell.heard(queue)
    if job_id is None:
        return False
    PRESENCE.stage = stage
    try:
        answer_bell(here, pass_on=lambda: site.bell.ring(job_id, queue))
    except Exception:  # Celery's process goes on after a task that raised
        logger.exception("bell_not_answered")
    return True


def _neighbours(site: Site, settings: WorkerSettings, stage: Stage, drain: threading.Event) -> Neighbours:
    database, bucket = site.open_database(), site.bucket
    device = Device(kind="cpu", index=0, name="CPU", gpu_class=GPU_CLASS, takes_classes=(GPU_CLASS,), stage=stage)
    return Neighbours(
        settings=settings,
        database=database,
        leases=Leases(database, settings.lease),
        files=Files(database),
        reports=Reports(database, settings.lease),
        bucket=bucket,
        doorbell=site.bell,
        base_models=BaseModels(
            registered_dir=settings.registered_models_dir,
            cache=HostCache(folder=settings.cache_dir, max_bytes=settings.cache_max_bytes),
            hub_token=None,
        ),
        device=device,
        spare=SpareTrainer(wanted=False, device=device, home=settings.spare_dir, cache_dir=settings.cache_dir),
        capacity=capacity_table(),
        place=place_of(settings.lock_dir),
        open_dataset_bucket=lambda _: bucket,
        draining=drain.is_set,
    )


def _take_name(site: Site, settings: WorkerSettings) -> None:
    hold_name(settings.worker_name, settings.lock_dir)
    database = site.open_database()
    beat = _beats(settings, Workers(database))
    register(settings.worker_name, Workers(database), beat=beat, pause=lambda: time.sleep(LISTEN_SECONDS))
    database.close()


def _beat(here: Neighbours, drain: threading.Event) -> None:
    beat = _beats(here.settings, Workers(here.database))
    while not drain.wait(BEAT_SECONDS):
        with suppress(StoreUnavailable):
            beat()


def _beats(settings: WorkerSettings, workers: Workers) -> Callable[[], None]:
    return lambda: workers.beat(
        name=settings.worker_name,
        place=place_of(settings.lock_dir),
        gpu_class=GPU_CLASS,
        device="CPU",
        stages=STAGES,
        takes_classes=(GPU_CLASS,),
    )

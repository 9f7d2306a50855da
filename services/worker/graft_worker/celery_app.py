"""The worker's Celery application: its settings, each with its reason; the only place that chooses real neighbours."""

from __future__ import annotations

import ctypes
import functools
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from celery import Celery
from celery.signals import setup_logging, worker_process_init, worker_ready, worker_shutdown, worker_shutting_down

from graft_shared.buckets import open_bucket
from graft_shared.capacity import CapacityTable
from graft_shared.defaults import load_capacity
from graft_shared.dispatch import BROKER_TRANSPORT_OPTIONS, PREPARE_QUEUE, RING_TASK, CeleryDoorbell
from graft_shared.errors import StoreUnavailable
from graft_shared.jobs import Stage
from graft_shared.logs import configure_logging, log_event
from graft_shared.store import Files, Leases, Workers, open_database
from graft_worker.device import Device, find_device
from graft_worker.settings import WorkerSettings
from graft_worker.supervisor.bases import BaseModels
from graft_worker.supervisor.neighbours import Neighbours
from graft_worker.supervisor.slot import Slot
from graft_worker.tasks import slots_of, work_until_idle

BEAT_SECONDS = 15.0

logger = logging.getLogger(__name__)

_draining = multiprocessing.RawValue("b", 0)  # shared with the prefork children; no lock that a killed one could keep
_stopping = threading.Event()
_threads: list[threading.Thread] = []


def build_app(settings: WorkerSettings) -> Celery:
    """Return the Celery application of a worker.

    A message is a wake-up: it is acknowledged on receipt and never redelivered, because the database holds the truth.
    """
    app = Celery("graft", broker=settings.broker_url)
    app.conf.update(
        task_acks_late=False,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,  # a busy worker leaves bells to idle ones
        task_ignore_result=True,  # no result backend: status lives in SQL
        task_serializer="json",
        accept_content=["json"],
        worker_cancel_long_running_tasks_on_connection_loss=False,  # True ends a running job when Redis restarts
        worker_enable_remote_control=False,
        broker_connection_max_retries=None,
        broker_connection_retry_on_startup=True,
        broker_transport_options=BROKER_TRANSPORT_OPTIONS,
    )
    app.task(name=RING_TASK)(ring)
    return app


def ring(_job_id: str) -> None:
    """A doorbell was heard."""
    here = neighbours()
    work_until_idle(slots_of(here), here)


def worker_arguments(settings: WorkerSettings, device: Device) -> list[str]:
    """The command line of the Celery worker: one prefork child per slot, the queues that its device serves."""
    queues = set(device.takes_classes) if Stage.TRAIN in device.stages else set()
    queues |= {PREPARE_QUEUE} if Stage.PREPARE in device.stages else set()
    return [
        "--quiet",
        "worker",
        "--pool=prefork",
        f"--concurrency={len(device.stages)}",
        f"--queues={','.join(sorted(queues))}",
        f"--hostname={settings.worker_name}@%h",
        "--without-gossip",
        "--without-mingle",
        "--without-heartbeat",
    ]


def neighbours() -> Neighbours:
    """The real neighbours of this process; connections are never shared across a fork."""
    return _open_neighbours(os.getpid())


@functools.cache
def _open_neighbours(_pid: int) -> Neighbours:
    settings = WorkerSettings()
    database = open_database(settings.database)
    token = settings.hub_token
    return Neighbours(
        settings=settings,
        database=database,
        leases=Leases(database, settings.lease),
        files=Files(database),
        bucket=open_bucket(settings),
        doorbell=CeleryDoorbell(settings.broker_url),
        base_models=BaseModels(
            registered_dir=settings.registered_models_dir,
            cache_dir=settings.cache_dir,
            hub_token=token.get_secret_value() if token else None,
        ),
        device=this_device(settings),
        open_dataset_bucket=lambda name: open_bucket(settings.model_copy(update={"s3_bucket": name})),
        draining=lambda: bool(_draining.value),
    )


@functools.cache
def this_device(settings: WorkerSettings) -> Device:
    """The device that this worker drives."""
    table: CapacityTable = load_capacity(settings.capacity_path)
    return find_device(settings.worker_device, table)


@setup_logging.connect
def _keep_our_logging(**_: Any) -> None:
    """A receiver of this signal is how Celery is told to leave logging alone."""


@worker_process_init.connect
def _begin_child(**_: Any) -> None:
    """A pool process must not outlive the worker that would answer for it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@worker_ready.connect
def _begin(**_: Any) -> None:
    here = neighbours()
    log_event(logger, "worker_started", worker=here.settings.worker_name, gpu_class=here.device.gpu_class)
    _start(_beat)
    for slot in slots_of(here):
        _start(_look, slot)


@worker_shutting_down.connect
def _drain(**_: Any) -> None:
    _draining.value = 1
    _stopping.set()


@worker_shutdown.connect
def _end(**_: Any) -> None:
    for thread in _threads:
        thread.join()
    here = neighbours()
    try:
        Workers(here.database).leave(here.settings.worker_name)
    except StoreUnavailable as error:
        log_event(logger, "leave_not_recorded", level=logging.WARNING, reason=error.message)
    log_event(logger, "worker_stopped", worker=here.settings.worker_name)


def _start(target: Callable[..., None], *arguments: Any) -> None:
    thread = threading.Thread(target=_or_die, args=[target, *arguments], name=target.__name__, daemon=True)
    thread.start()
    _threads.append(thread)


def _or_die(target: Callable[..., None], *arguments: Any) -> None:
    """A worker whose thread has died would be deaf and look alive: better that it dies and is started anew."""
    try:
        target(*arguments)
    except BaseException:
        logger.exception("worker_thread_died", extra={"facts": {"thread": target.__name__}})
        os._exit(1)


def _look(slot: Slot) -> None:
    """Look for work without a bell: at the start, and again every few seconds."""
    here = neighbours()
    while not _stopping.is_set():
        work_until_idle([slot], here)
        _stopping.wait(here.settings.look_seconds)


def _beat() -> None:
    here, device = neighbours(), neighbours().device
    while not _stopping.is_set():
        try:
            Workers(here.database).beat(
                name=here.settings.worker_name, gpu_class=device.gpu_class, device=device.name, stages=device.stages
            )
        except StoreUnavailable as error:
            log_event(logger, "beat_missed", level=logging.WARNING, reason=error.message)
        _stopping.wait(BEAT_SECONDS)


def main() -> None:
    """Run this worker until SIGTERM: then running jobs save a checkpoint and go back to the queue."""
    settings = WorkerSettings()
    configure_logging(json_lines=settings.log_json)
    build_app(settings).worker_main(worker_arguments(settings, this_device(settings)))

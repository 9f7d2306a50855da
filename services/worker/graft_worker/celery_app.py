"""The worker's Celery application: its settings, each with its reason; the only place that chooses real neighbours."""

from __future__ import annotations

import ctypes
import functools
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from celery import Celery, Task, bootsteps
from celery.signals import (
    setup_logging,
    worker_process_init,
    worker_process_shutdown,
    worker_shutdown,
    worker_shutting_down,
)

from graft_shared.buckets import open_bucket
from graft_shared.capacity import CapacityTable
from graft_shared.defaults import load_capacity
from graft_shared.dispatch import BROKER_TRANSPORT_OPTIONS, RING_TASK, CeleryDoorbell, broker_tls, queue_for
from graft_shared.errors import StoreUnavailable, WorkerNameTaken
from graft_shared.jobs import Job, Stage
from graft_shared.logs import configure_logging, log_event
from graft_shared.metrics import serve_metrics
from graft_shared.store import Files, Leases, Quotas, Reports, Workers, open_database
from graft_shared.tracing import Tracing, open_tracing
from graft_worker.device import Device, NoSuchDevice, find_device
from graft_worker.hub import bound_requests
from graft_worker.metrics import RunFigures, figures_of
from graft_worker.place import hold_name, place_of, register
from graft_worker.settings import WorkerSettings
from graft_worker.spans import RunSpans
from graft_worker.supervisor import training_run
from graft_worker.supervisor.audience import Listener
from graft_worker.supervisor.bases import BaseModels
from graft_worker.supervisor.cache import HostCache
from graft_worker.supervisor.neighbours import Neighbours
from graft_worker.supervisor.spare import SpareTrainer
from graft_worker.tasks import answer_bell, look_for_work
from graft_worker.trackers import reporters_of

BEAT_SECONDS = 15.0
REGISTER_PAUSE_SECONDS = 1.0

logger = logging.getLogger(__name__)

_draining = multiprocessing.RawValue("b", 0)  # shared with the prefork children; no lock that a killed one could keep
_is_pool_process = False  # bells are answered there; a job that was found by looking has no spare trainer
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
        broker_use_ssl=broker_tls(settings.broker_url),
        broker_transport_options=BROKER_TRANSPORT_OPTIONS,
    )
    app.task(name=RING_TASK, bind=True)(ring)
    app.steps["worker"].add(BesideTheBell)
    return app


def ring(task: Task[Any, Any], job_id: str) -> None:
    """A doorbell was heard."""
    here = neighbours()
    queue = str((task.request.delivery_info or {}).get("routing_key"))
    answer_bell(here, pass_on=lambda: here.doorbell.ring(job_id, queue))


class BesideTheBell(bootsteps.StartStopStep):
    """Looks for work and tells that the worker is alive, from before the broker is reached: it may be away."""

    requires = ("celery.worker.components:Pool",)

    def start(self, _worker: Any) -> None:
        """Begin, once the pool's processes have been forked."""
        here = neighbours()
        name, device = here.settings.worker_name, here.device
        log_event(logger, "worker_started", worker=name, gpu_class=device.gpu_class, stage=device.stage.value)
        serve_metrics(here.settings, figures_of(here.settings, device))
        _start(_beat)
        _start(_look)


def worker_arguments(settings: WorkerSettings, device: Device) -> list[str]:
    """The command line of the Celery worker: one prefork child, the queues that its device serves."""
    queues = device.takes_classes if device.stage is Stage.TRAIN else (queue_for(device.stage, device.gpu_class),)
    return [
        "--quiet",
        "worker",
        "--pool=prefork",
        "--concurrency=1",
        f"--queues={','.join(queues)}",
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
    device = this_device(settings)
    return Neighbours(
        settings=settings,
        database=database,
        leases=Leases(database, settings.lease, Quotas.of(settings)),
        files=Files(database),
        reports=Reports(database, settings.lease),
        bucket=open_bucket(settings),
        doorbell=CeleryDoorbell(settings.broker_url),
        base_models=BaseModels(
            registered_dir=settings.registered_models_dir,
            cache=HostCache(folder=settings.cache_dir, max_bytes=settings.cache_max_bytes),
            hub_token=token.get_secret_value() if token else None,
        ),
        device=device,
        spare=SpareTrainer(
            wanted=settings.spare_trainer if _is_pool_process else False,
            device=device,
            home=settings.spare_dir,
            cache_dir=settings.cache_dir,
        ),
        capacity=load_capacity(settings.capacity_path),
        place=place_of(settings.lock_dir),
        open_dataset_bucket=lambda name: open_bucket(settings.model_copy(update={"s3_bucket": name})),
        draining=lambda: bool(_draining.value),
        invite=_listeners,
    )


@functools.cache
def _tracing(_pid: int) -> Tracing | None:
    """This process's: the thread that sends spans does not come along through a fork."""
    return open_tracing("graft-worker")


def _listeners(job: Job) -> list[Listener]:
    """Who is told of a job's run."""
    tracing = _tracing(os.getpid())
    here = neighbours()
    spans = [RunSpans(job, tracing)] if tracing is not None else []
    return [RunFigures(job), *spans, *reporters_of(job, here.settings, here.leases)]


def _send_last_spans() -> None:
    tracing = _tracing(os.getpid())
    if tracing is not None:
        tracing.close()


@functools.cache
def this_device(settings: WorkerSettings) -> Device:
    """The device that this worker drives."""
    table: CapacityTable = load_capacity(settings.capacity_path)
    return find_device(settings.worker_device, settings.worker_stage, table)


@setup_logging.connect
def _keep_our_logging(**_: Any) -> None:
    """A receiver of this signal is how Celery is told to leave logging alone."""


@worker_process_init.connect
def _begin_child(**_: Any) -> None:
    """A pool process must not outlive the worker that would answer for it; and the first bell finds it ready."""
    global _is_pool_process
    _is_pool_process = True
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    neighbours().spare.prepare(training_run.MODULE)


@worker_process_shutdown.connect
def _end_child(**_: Any) -> None:
    neighbours().spare.dismiss()
    _send_last_spans()


@worker_shutting_down.connect
def _drain(**_: Any) -> None:
    _draining.value = 1
    _stopping.set()


@worker_shutdown.connect
def _end(**_: Any) -> None:
    for thread in _threads:
        thread.join()
    _send_last_spans()
    here = neighbours()
    try:
        Workers(here.database).leave(here.settings.worker_name, here.place)
    except StoreUnavailable as error:
        log_event(logger, "leave_not_recorded", level=logging.WARNING, reason=error.message)
    log_event(logger, "worker_stopped", worker=here.settings.worker_name)


def _start(target: Callable[[], None]) -> None:
    thread = threading.Thread(target=_or_die, args=[target], name=target.__name__, daemon=True)
    thread.start()
    _threads.append(thread)


def _or_die(target: Callable[[], None]) -> None:
    """A worker whose thread has died would be deaf and look alive: better that it dies and is started anew."""
    try:
        target()
    except BaseException:
        logger.exception("worker_thread_died", extra={"facts": {"thread": target.__name__}})
        os._exit(1)


def _look() -> None:
    """Look for work without a bell: at the start, and again every few seconds."""
    here = neighbours()
    while not _stopping.is_set():
        look_for_work(here)
        _stopping.wait(here.settings.look_seconds)


def _beat() -> None:
    here = neighbours()
    while not _stopping.is_set():
        try:
            _say_alive(here.settings, here.device, Workers(here.database), here.place)
        except StoreUnavailable as error:
            log_event(logger, "beat_missed", level=logging.WARNING, reason=error.message)
        _stopping.wait(BEAT_SECONDS)


def _say_alive(settings: WorkerSettings, device: Device, workers: Workers, place: str) -> None:
    workers.beat(
        name=settings.worker_name,
        place=place,
        gpu_class=device.gpu_class,
        device=device.name,
        stages=(device.stage,),
        takes_classes=device.takes_classes,
    )


def _take_name(settings: WorkerSettings, device: Device) -> None:
    """Make sure that nobody else works under our name; its connection is gone before the pool is forked."""
    hold_name(settings.worker_name, settings.lock_dir)
    place = place_of(settings.lock_dir)
    database = open_database(settings.database)
    workers = Workers(database)
    try:
        register(
            settings.worker_name,
            workers,
            beat=lambda: _say_alive(settings, device, workers, place),
            pause=lambda: time.sleep(REGISTER_PAUSE_SECONDS),
        )
    finally:
        database.close()


def main() -> None:
    """Run this worker until SIGTERM: then running jobs save a checkpoint and go back to the queue."""
    settings = WorkerSettings()
    configure_logging(settings.log_format)
    bound_requests()
    try:
        device = this_device(settings)
        _take_name(settings, device)
    except (NoSuchDevice, WorkerNameTaken) as error:
        sys.exit(f"error: {error}")
    build_app(settings).worker_main(worker_arguments(settings, device))

"""What a wake-up does: take the slot, claim the best row, run it, and again until there is nothing left.

A worker that prepares data takes a job and a report in turn, so that neither has to wait for all of the other kind.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from graft_shared.errors import StoreUnavailable
from graft_shared.jobs import Job, Stage
from graft_shared.logs import log_event
from graft_worker.supervisor.leftovers import folder_of, remove_leftovers
from graft_worker.supervisor.neighbours import Neighbours
from graft_worker.supervisor.patience import Patience
from graft_worker.supervisor.report_run import run_report
from graft_worker.supervisor.run import Run
from graft_worker.supervisor.slot import Slot, taken, taken_if_free

STORE_PATIENCE_SECONDS = 30.0  # a bell that nobody can answer goes round this often, at most

LEAST_FREE_BYTES = 256 * 1024**2  # data, a checkpoint and an adapter want more; below this a run fails at any write

logger = logging.getLogger(__name__)


def answer_bell(neighbours: Neighbours, pass_on: Callable[[], object]) -> None:
    """Work because a bell was heard; one that cannot be answered is passed on to whoever can.

    That is so when this worker is busy (it found work by looking), leaves, or does not reach the store. This process
    waits for the slot or the store meanwhile: one that came back at once would swallow the next bell too.
    """
    slot = slot_of(neighbours)
    with taken_if_free(slot) as is_free:
        if is_free and _work_until_idle(slot, neighbours):
            return
    pass_on()
    _wait_for_store(neighbours)
    with taken(slot):
        _work_until_idle(slot, neighbours)


def look_for_work(neighbours: Neighbours) -> None:
    """Work if there is something to do and nobody in this worker is at it."""
    slot = slot_of(neighbours)
    with taken_if_free(slot) as is_free:
        if is_free:
            _work_until_idle(slot, neighbours)


def slot_of(neighbours: Neighbours) -> Slot:
    """The one slot of this worker."""
    settings = neighbours.settings
    return Slot(worker=settings.worker_name, stage=neighbours.device.stage, lock_dir=settings.lock_dir)


def _work_until_idle(slot: Slot, neighbours: Neighbours) -> bool:
    """Work as long as there is work; False when there may be more that this worker cannot take.

    A worker whose disk is full leaves the queue alone: it would use up the attempts of every job in it within seconds.
    It passes no bell on either, for it could hear the same one at once; others find the work by looking.
    """
    work_dir = neighbours.settings.work_dir
    remove_leftovers(slot, work_dir)
    while not neighbours.draining():
        if not _has_room(work_dir):
            return True
        try:
            found = [_run_next_job(slot, neighbours), _run_next_report(slot, neighbours)]
        except StoreUnavailable as error:
            log_event(logger, "claim_postponed", level=logging.WARNING, reason=error.message)
            return False
        if not any(found):
            return True
    return False


def _run_next_job(slot: Slot, neighbours: Neighbours) -> bool:
    job = _next_job(slot, neighbours)
    if job is not None:
        Run(job, folder_of(slot, neighbours.settings.work_dir) / f"{job.id}-e{job.epoch}", neighbours).run()
    return job is not None


def _run_next_report(slot: Slot, neighbours: Neighbours) -> bool:
    if slot.stage is not Stage.PREPARE or neighbours.draining():
        return False
    report = neighbours.reports.claim()
    if report is not None:
        run_report(report, folder_of(slot, neighbours.settings.work_dir) / f"{report.id}-e{report.epoch}", neighbours)
    return report is not None


def _has_room(work_dir: Path) -> bool:
    work_dir.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(work_dir).free
    if free_bytes < LEAST_FREE_BYTES:
        facts = {"free_bytes": free_bytes, "least_free_bytes": LEAST_FREE_BYTES}
        log_event(logger, "disk_full", level=logging.WARNING, folder=str(work_dir), **facts)
        return False
    return True


def _wait_for_store(neighbours: Neighbours) -> None:
    patience = Patience(seconds=STORE_PATIENCE_SECONDS, gave_up=neighbours.draining)
    with contextlib.suppress(StoreUnavailable):
        patience.wait_for(neighbours.database.ping)


def _next_job(slot: Slot, neighbours: Neighbours) -> Job | None:
    for lost in neighbours.leases.release_of(slot.holder, neighbours.place):
        log_event(logger, "own_lease_released", job_id=lost.id, epoch=lost.epoch)
    return neighbours.leases.claim(slot.holder, stage=slot.stage, gpu_classes=neighbours.device.takes_classes)

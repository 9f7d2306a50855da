"""What a wake-up does: take the slot, claim the best row, run it, and again until there is nothing left."""

from __future__ import annotations

import logging
from collections.abc import Callable

from graft_shared.errors import StoreUnavailable
from graft_shared.jobs import Job
from graft_shared.logs import log_event
from graft_worker.supervisor.neighbours import Neighbours
from graft_worker.supervisor.run import Run
from graft_worker.supervisor.slot import Slot, taken, taken_if_free

logger = logging.getLogger(__name__)


def answer_bell(neighbours: Neighbours, pass_on: Callable[[], object]) -> None:
    """Work because a bell was heard.

    When this worker turns out to be busy (it found work by looking), the bell is passed on to whoever is idle, and
    this process waits for the slot meanwhile: one that came back at once would swallow the next bell too.
    """
    slot = slot_of(neighbours)
    with taken_if_free(slot) as is_free:
        if is_free:
            _work_until_idle(slot, neighbours)
            return
    pass_on()
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


def _work_until_idle(slot: Slot, neighbours: Neighbours) -> None:
    while not neighbours.draining():
        try:
            job = _next_job(slot, neighbours)
        except StoreUnavailable as error:
            log_event(logger, "claim_postponed", level=logging.WARNING, reason=error.message)
            return
        if job is None:
            return
        workdir = neighbours.settings.work_dir / slot.worker / slot.stage.value / f"{job.id}-e{job.epoch}"
        Run(job, workdir, neighbours).run()


def _next_job(slot: Slot, neighbours: Neighbours) -> Job | None:
    for lost in neighbours.leases.release_of(slot.holder):
        log_event(logger, "own_lease_released", job_id=lost.id, epoch=lost.epoch)
    return neighbours.leases.claim(slot.holder, stage=slot.stage, gpu_classes=neighbours.device.takes_classes)

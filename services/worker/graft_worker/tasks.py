"""What a wake-up does: take a free slot, claim the best row for it, run it, and again until there is nothing left."""

from __future__ import annotations

import logging

from graft_shared.errors import StoreUnavailable
from graft_shared.logs import log_event
from graft_worker.supervisor.neighbours import Neighbours
from graft_worker.supervisor.run import Run
from graft_worker.supervisor.slot import Slot, taken

logger = logging.getLogger(__name__)


def slots_of(neighbours: Neighbours) -> list[Slot]:
    """The slots of this worker: one per stage that its device serves."""
    return [Slot(worker=neighbours.settings.worker_name, stage=stage) for stage in neighbours.device.stages]


def work_until_idle(slots: list[Slot], neighbours: Neighbours) -> int:
    """Run jobs as long as a slot is free and the queue holds something for it; return how many were run."""
    done = 0
    while not neighbours.draining():
        try:
            worked = sum(_work_once(slot, neighbours) for slot in slots)
        except StoreUnavailable as error:
            log_event(logger, "claim_postponed", level=logging.WARNING, reason=error.message)
            return done
        if not worked:
            return done
        done += worked
    return done


def _work_once(slot: Slot, neighbours: Neighbours) -> int:
    settings = neighbours.settings
    with taken(slot, settings.lock_dir) as free:
        if not free:
            return 0
        for lost in neighbours.leases.release_of(slot.holder):
            log_event(logger, "own_lease_released", job_id=lost.id, epoch=lost.epoch)
        job = neighbours.leases.claim(slot.holder, stage=slot.stage, gpu_classes=neighbours.device.takes_classes)
        if job is None:
            return 0
        workdir = settings.work_dir / slot.worker / slot.stage.value / f"{job.id}-e{job.epoch}"
        Run(job, workdir, neighbours).run()
        return 1

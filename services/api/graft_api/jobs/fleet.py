"""The live workers, as those who wait are told of them, and which of them would take which job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from graft_api.held import Held
from graft_shared.capacity import CapacityTable
from graft_shared.jobs import Stage
from graft_shared.store import Crew, LiveWorker, Workers

CREWS_HELD_SECONDS = 1.0  # a worker is taken to be alive for much longer than this

Working = TypeVar("Working", Crew, LiveWorker)


class Fleet:
    """The live workers by what they do, as they were a moment ago: every look at a job that waits asks for them."""

    def __init__(self, workers: Workers) -> None:
        self._crews = Held[None, list[Crew]](lambda _: workers.crews(), CREWS_HELD_SECONDS)

    def crews(self) -> list[Crew]:
        """Count them."""
        return self._crews.get(None)


def workers_for(stage: Stage, gpu_class: str, workers: Sequence[Working], table: CapacityTable) -> list[Working]:
    """The live workers that would claim such a job: larger GPUs take smaller classes too, any of them prepares."""
    able = [worker for worker in workers if stage in worker.stages]
    return [w for w in able if _takes(w.gpu_class, gpu_class, table)] if stage is Stage.TRAIN else able


def _takes(worker_class: str, job_class: str, table: CapacityTable) -> bool:
    if worker_class == job_class:
        return True
    own, asked = table.get(worker_class), table.get(job_class)
    if own is None or asked is None or own.is_cpu:
        return False
    return asked.is_cpu or asked.memory_bytes < own.memory_bytes

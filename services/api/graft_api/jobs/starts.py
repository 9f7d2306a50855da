"""When a job that waits for a GPU is likely to start: by the ETAs of what trains, and by how long jobs took lately."""

from __future__ import annotations

import math
from collections.abc import Sequence

from graft_api.held import Held
from graft_api.jobs.fleet import workers_for
from graft_shared.capacity import CapacityTable
from graft_shared.jobs import Stage
from graft_shared.store import Busy, LiveWorker, Totals, Workers

JOBS_LOOKED_AT = 50  # of a class, the last that succeeded
FLEET_HELD_SECONDS, MEAN_HELD_SECONDS = 3.0, 60.0
NEAR_ENOUGH_SECONDS = 0.5


class Starts:
    """Forecasts of starts; they promise nothing: a job of a higher priority, or a failure, comes before."""

    def __init__(self, workers: Workers, totals: Totals, table: CapacityTable) -> None:
        self._table = table
        self._fleet = Held[None, tuple[list[LiveWorker], list[Busy]]](
            lambda _: (workers.alive(), workers.busy()), FLEET_HELD_SECONDS
        )
        self._mean = Held[str, Sequence[float]](
            lambda gpu_class: totals.gpu_seconds(gpu_class, limit=JOBS_LOOKED_AT), MEAN_HELD_SECONDS
        )

    def seconds_until(self, gpu_class: str, position: int) -> float | None:
        """How long until the job at this place in line of its class starts to train; None if nobody can tell."""
        alive, busy = self._fleet.get(None)
        lately = self._mean.get(gpu_class)
        mean = sum(lately) / len(lately) if lately else None
        at_work = {one.worker: one for one in busy}
        able = workers_for(Stage.TRAIN, gpu_class, alive, self._table)
        free_in = [_free_in(at_work[worker.name], mean) if worker.name in at_work else 0.0 for worker in able]
        return start_of(position - 1, [seconds for seconds in free_in if seconds is not None], mean)


def _free_in(busy: Busy, mean: float | None) -> float | None:
    if busy.eta_seconds is not None:
        return busy.eta_seconds
    return None if mean is None else max(0.0, mean - busy.seconds)  # it loads, or fetches


def start_of(number: int, free_in: Sequence[float], mean: float | None) -> float | None:
    """When the job with so many before it starts, if each takes `mean` seconds of the worker that is free first.

    Args:
        free_in: Seconds until each worker is free.
        mean: None while no job has ended: then only as many starts can be told as there are workers.
    """
    in_order = sorted(free_in)
    if number < len(in_order) and (mean is None or in_order[number] <= in_order[0] + mean):
        return in_order[number]  # nobody before it is done so soon that its worker would be free again
    if not in_order or not mean:
        return None
    low, high = in_order[0], in_order[0] + (number + 1) * mean  # the first worker alone would have come to it by then
    while high - low > NEAR_ENOUGH_SECONDS:
        middle = (low + high) / 2
        begun = sum(math.floor((middle - free) / mean) + 1 for free in in_order if free <= middle)
        low, high = (low, middle) if begun > number else (middle, high)
    return high

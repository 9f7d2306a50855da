"""The route of the capacity table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from fastapi import APIRouter, Security

from graft_api.auth import tenant
from graft_api.capacity.schemas import CapacityBody, ForecastError, GpuClassBody, WorkerBody
from graft_api.deps import Here
from graft_shared.capacity import TABLE_MAX_LENGTH, CapacityTable
from graft_shared.catalogue import Catalogue
from graft_shared.jobs import Stage
from graft_shared.specs import DatasetSource, JobSpec, Training

JOBS_COMPARED = 50  # the last of each class

router = APIRouter(tags=["capacity"], dependencies=[Security(tenant)])


@router.get("/capacity", summary="The VRAM-capacity table and the live fleet")
def get_capacity(here: Here) -> CapacityBody:
    """Return each GPU class, what it trains, who serves it and how long its queue is."""
    workers = here.workers.alive()
    queues = {queue.gpu_class: queue.length for queue in here.totals.backlogs() if queue.stage is Stage.TRAIN}
    data = [
        GpuClassBody(
            name=gpu.name,
            memory_bytes=gpu.memory_bytes,
            usable_bytes=gpu.usable_bytes,
            price_per_hour=gpu.price_per_hour,
            live_workers=sum(worker.gpu_class == gpu.name and Stage.TRAIN in worker.stages for worker in workers),
            forecast_error=forecast_error(here.totals.peaks(gpu.name, limit=JOBS_COMPARED)),
            queue_length=queues.get(gpu.name, 0),
            largest_base_model=here.largest_bases[gpu.name],
        )
        for gpu in here.capacity.classes
    ]
    alive = [
        WorkerBody(
            name=worker.name,
            gpu_class=worker.gpu_class,
            device=worker.device,
            stages=list(worker.stages),
            seen_at=int(worker.seen_at.timestamp()),
        )
        for worker in workers
    ]
    return CapacityBody(data=data, workers=alive)


def forecast_error(peaks: Sequence[tuple[int, int]]) -> ForecastError | None:
    """Compare predicted with measured bytes, pair by pair."""
    ratios = [measured / predicted for predicted, measured in peaks]
    if not ratios:
        return None
    return ForecastError(
        jobs=len(ratios),
        mean_ratio=round(statistics.fmean(ratios), 3),
        median_ratio=round(statistics.median(ratios), 3),
        highest_ratio=round(max(ratios), 3),
    )


def largest_bases(table: CapacityTable, catalogue: Catalogue) -> dict[str, str | None]:
    """The largest catalogue base that each class trains with the default settings, by class."""
    spec = JobSpec(
        base_model="any/base", dataset=DatasetSource(file="file-any"), training=Training(max_length=TABLE_MAX_LENGTH)
    )
    found = {gpu.name: table.largest_base(gpu, catalogue, spec) for gpu in table.classes}
    return {name: shape.base_model if shape else None for name, shape in found.items()}

"""From rows to bodies."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from datetime import datetime

from graft_api.deps import Neighbours
from graft_api.jobs.queue import queue_of
from graft_api.jobs.schemas import (
    AdapterLink,
    JobBody,
    JobError,
    JobMetrics,
    JobReport,
    JobWarning,
    Memory,
    MemoryForecast,
    Metrics,
    MetricSeries,
    Progress,
    Queue,
)
from graft_shared.errors import ReportNotFound, ReportNotReady
from graft_shared.jobs import Job, JobEvent, JobState, JobStatus
from graft_shared.memory import TrainingPlan

SERIES = ("loss", "eval_loss", "grad_norm", "learning_rate", "tokens_per_second")


def job_bodies(jobs: Sequence[Job], here: Neighbours) -> list[JobBody]:
    """Jobs as their users see them; the fleet and the database's clock are looked at once, and if they matter."""
    waiting = any(job.state is JobState.QUEUED or job.status is JobStatus.VALIDATING_FILES for job in jobs)
    crews = here.fleet.crews() if waiting else []
    moment = here.database.now() if any(job.is_training for job in jobs) else None
    places = here.jobs.places_in_line(jobs, here.lines.of)

    def queue(job: Job) -> Queue | None:
        return queue_of(job, places.get(job.id), here.jobs, crews, here.capacity, here.starts)

    return [_body(job, queue(job), moment) for job in jobs]


def job_body(job: Job, here: Neighbours) -> JobBody:
    """One job as its user sees it."""
    return job_bodies([job], here)[0]


def metric_series(job_id: str, events: Iterable[JobEvent]) -> JobMetrics:
    """Gather `metrics` events, oldest first, into one series a name."""
    by_name: dict[str, dict[int, float]] = {name: {} for name in SERIES}
    for event in events:
        if event.type != "metrics":
            continue
        for name in SERIES:
            if name in event.data:
                by_name[name][event.data["step"]] = event.data[name]
    series = {
        name: MetricSeries(steps=sorted(values), values=[values[step] for step in sorted(values)])
        for name, values in by_name.items()
        if values
    }
    return JobMetrics(job_id=job_id, series=series)


def report_body(job: Job) -> JobReport:
    """The report on a job's data.

    Raises:
        ReportNotReady: It is not prepared.
        ReportNotFound: An earlier version prepared it.
    """
    if job.prepared is None:
        raise ReportNotReady(job_id=job.id, status=job.status.value)
    report = job.prepared["report"]
    if "train" not in report:
        raise ReportNotFound(job_id=job.id)
    return JobReport.model_validate({"job_id": job.id, "report": report})


def plan_body(plan: TrainingPlan) -> dict[str, object]:
    """A plan and its word."""
    return {"mode": plan.mode, **plan.to_dict()}


def _body(job: Job, queue: Queue | None, moment: datetime | None) -> JobBody:
    return JobBody(
        id=job.id,
        status=job.status,
        phase=job.phase,
        created_at=_seconds(job.created_at),
        started_at=_seconds(job.started_at) if job.started_at else None,
        finished_at=_seconds(job.finished_at) if job.finished_at else None,
        estimated_finish=estimated_finish(job),
        base_model=job.spec["base_model"],
        spec=job.spec,
        plan=plan_body(TrainingPlan.from_dict(job.plan)) if job.plan else {},
        gpu_class=job.gpu_class,
        attempt=job.attempt,
        max_attempts=job.spec["max_attempts"],
        progress=Progress.model_validate(job.progress),
        queue=queue,
        memory=_memory(job),
        cost=_cost(job, moment),
        metrics=Metrics.model_validate(job.metrics),
        adapter=_adapter(job),
        error=JobError.model_validate(job.error) if job.error else None,
        warnings=[JobWarning.model_validate(warning) for warning in job.warnings],
        metadata=job.spec["metadata"],
    )


def _memory(job: Job) -> Memory:
    estimate = job.placement.get("estimate")
    measured = {name: size for name, size in job.memory.items() if isinstance(size, int)}
    expected = measured.pop("expected_peak_bytes", estimate["expected_bytes"] if estimate else None)
    return Memory(
        predicted_peak_bytes=expected,
        measured_peak_bytes=measured.pop("measured_peak_bytes", None),
        forecast=MemoryForecast.model_validate(estimate) if estimate else None,
        measured=measured,
    )


def _cost(job: Job, moment: datetime | None) -> float | None:
    """What it has cost until this moment, which is known when a job is in training."""
    price_per_hour = job.placement.get("gpu", {}).get("price_per_hour")
    gpu_seconds = job.gpu_seconds if moment is None else job.gpu_seconds_until(moment)
    return None if price_per_hour is None else gpu_seconds * price_per_hour / 3600


def _adapter(job: Job) -> AdapterLink | None:
    if job.adapter is None:
        return None
    route = f"/jobs/{job.id}/adapter"
    return AdapterLink(uri=job.adapter["uri"], manifest=route, archive=f"{route}/archive")


def estimated_finish(job: Job) -> int | None:
    """When a running job will have ended, as far as its pace tells; Unix seconds."""
    eta_seconds = job.progress.get("eta_seconds")
    return int(time.time() + eta_seconds) if job.state is JobState.RUNNING and eta_seconds is not None else None


def _seconds(moment: datetime) -> int:
    return int(moment.timestamp())

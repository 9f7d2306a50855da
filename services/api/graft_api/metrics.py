"""What Prometheus scrapes: the store's figures at the moment it asks, and this process' requests.

They name no tenant and no job. What a running job tells of its training is told of the worker that trains it, so that
there are never more series than workers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from fastapi import APIRouter, Response, Security
from fastapi.responses import PlainTextResponse
from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from graft_api.auth import tenant
from graft_api.capacity.endpoints import JOBS_COMPARED, forecast_error
from graft_api.deps import Here, Neighbours
from graft_api.jobs.fleet import workers_for
from graft_api.jobs.queue import lengths_by_reason
from graft_api.keys.scopes import Scope
from graft_api.traffic import TRAFFIC
from graft_shared.jobs import JobStatus, Stage
from graft_shared.store import Backlog, LiveWorker, TrainingNow

COMPARED = f"of those of a class's last {JOBS_COMPARED} jobs that were measured on a GPU"

_OF_A_RUN: tuple[tuple[str, str, Callable[[TrainingNow], float | None]], ...] = (
    ("graft_training_step", "Optimizer steps done by the job that this worker trains.", lambda run: run.step),
    ("graft_training_last_step", "Optimizer steps that it will have done at its end.", lambda run: run.last_step),
    ("graft_training_loss", "Its last training loss, in nats per learnt token.", lambda run: run.loss),
    (
        "graft_training_tokens_per_second",
        "How many tokens a second it trains on, padding left out.",
        lambda run: run.tokens_per_second,
    ),
    (
        "graft_training_expected_peak_bytes",
        "What its placement expects it to take of the device's memory.",
        lambda run: run.expected_peak_bytes,
    ),
)

router = APIRouter(tags=["health"], dependencies=[Security(tenant, scopes=[Scope.METRICS.value])])


@router.get(
    "/metrics",
    summary="The service's figures for Prometheus",
    response_class=PlainTextResponse,
    responses={200: {"content": {"text/plain": {}}, "description": "Prometheus' text format, version 0.0.4."}},
)
def get_metrics(here: Here) -> Response:
    """Return jobs, queues, workers, training and how far memory forecasts were off, and what this API was asked."""
    return Response(generate_latest(figures_of(here)), media_type=CONTENT_TYPE_PLAIN_0_0_4)


def figures_of(here: Neighbours) -> CollectorRegistry:
    """All that an API tells."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each, which nothing here asks for
    registry = CollectorRegistry()
    registry.register(Figures(here))
    registry.register(TRAFFIC)
    return registry


class Figures(Collector):
    """Every family, read from the store when it is collected. A class of the table without jobs or workers counts 0."""

    def __init__(self, here: Neighbours) -> None:
        self._here = here
        self._classes = [gpu.name for gpu in here.capacity.classes]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Read them."""
        workers = self._here.workers.alive()
        yield self._jobs()
        yield from self._queues(workers)
        yield from self._reports()
        yield self._live(workers)
        yield from self._training()
        yield from self._forecasts()

    def _jobs(self) -> GaugeMetricFamily:
        family = GaugeMetricFamily("graft_jobs", "Jobs by status and GPU class.", labels=["status", "gpu_class"])
        counts = self._here.totals.jobs()
        for gpu_class in self._named(gpu_class for _, gpu_class in counts):
            for status in JobStatus:
                family.add_metric([status.value, gpu_class], counts.get((status, gpu_class), 0))
        return family

    def _queues(self, workers: Sequence[LiveWorker]) -> Iterator[GaugeMetricFamily]:
        queued = GaugeMetricFamily(
            "graft_queued_jobs",
            "Jobs that wait, by what they wait for. Preparing and merging are queues of no GPU class.",
            labels=["stage", "gpu_class", "reason"],
        )
        oldest = GaugeMetricFamily(
            "graft_oldest_queued_job_age_seconds",
            "Time since the oldest of the jobs that wait was submitted; 0 if none waits.",
            labels=["stage", "gpu_class"],
        )
        merges = GaugeMetricFamily("graft_waiting_merges", "Adapters that wait to be merged into their bases.")
        for backlog in self._backlogs():
            gpu_class = backlog.gpu_class or ""
            able = workers_for(backlog.stage, gpu_class, workers, self._here.capacity)
            for reason, length in lengths_by_reason(backlog, len(able)).items():
                queued.add_metric([backlog.stage.value, gpu_class, reason.value], length)
            oldest.add_metric([backlog.stage.value, gpu_class], backlog.oldest_seconds)
            if backlog.stage is Stage.MERGE:
                merges.add_metric([], backlog.length)
        yield from (queued, oldest, merges)

    def _reports(self) -> Iterator[GaugeMetricFamily]:
        waiting, oldest_seconds = self._here.totals.waiting_reports()
        yield GaugeMetricFamily("graft_waiting_reports", "Reports on files that wait to be made.", value=waiting)
        yield GaugeMetricFamily(
            "graft_oldest_waiting_report_age_seconds",
            "Time since the oldest of the reports that wait was asked for; 0 if none waits.",
            value=oldest_seconds,
        )

    def _backlogs(self) -> Iterator[Backlog]:
        """Those of the store, and the empty ones."""
        found = {(backlog.stage, backlog.gpu_class): backlog for backlog in self._here.totals.backlogs()}
        classes = self._named(gpu_class for _, gpu_class in found if gpu_class is not None)
        for stage, gpu_class in [
            (Stage.PREPARE, None),
            (Stage.MERGE, None),
            *((Stage.TRAIN, name) for name in classes),
        ]:
            empty = Backlog(stage=stage, gpu_class=gpu_class, length=0, delayed=0, oldest_seconds=0.0)
            yield found.get((stage, gpu_class), empty)

    def _live(self, workers: Sequence[LiveWorker]) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "graft_live_workers",
            "Workers heard of lately, by what they do and the class of their device; who does both counts in both.",
            labels=["stage", "gpu_class"],
        )
        counts = Counter((stage, worker.gpu_class) for worker in workers for stage in worker.stages)
        for gpu_class in self._named(gpu_class for _, gpu_class in counts):
            for stage in Stage:
                family.add_metric([stage.value, gpu_class], counts[stage, gpu_class])
        return family

    def _training(self) -> Iterator[GaugeMetricFamily]:
        runs = self._here.totals.training()
        for name, says, find in _OF_A_RUN:
            family = GaugeMetricFamily(name, says, labels=["worker", "gpu_class"])
            for run in runs:
                value = find(run)
                if value is not None:
                    family.add_metric([run.worker, run.gpu_class], value)
            yield family

    def _forecasts(self) -> Iterator[GaugeMetricFamily]:
        jobs = GaugeMetricFamily("graft_memory_forecast_jobs", f"Number {COMPARED}.", labels=["gpu_class"])
        mean = GaugeMetricFamily(
            "graft_memory_forecast_mean_ratio", f"Mean measured by expected peak {COMPARED}.", labels=["gpu_class"]
        )
        highest = GaugeMetricFamily(
            "graft_memory_forecast_highest_ratio",
            f"Highest measured by expected peak {COMPARED}.",
            labels=["gpu_class"],
        )
        expected = GaugeMetricFamily(
            "graft_memory_forecast_expected_bytes", f"Expected peak of the last {COMPARED}.", labels=["gpu_class"]
        )
        measured = GaugeMetricFamily(
            "graft_memory_forecast_measured_bytes", f"Measured peak of the last {COMPARED}.", labels=["gpu_class"]
        )
        for gpu_class in self._classes:
            peaks = self._here.totals.peaks(gpu_class, limit=JOBS_COMPARED)
            error = forecast_error(peaks)
            jobs.add_metric([gpu_class], error.jobs if error is not None else 0)
            if error is not None:
                mean.add_metric([gpu_class], error.mean_ratio)
                highest.add_metric([gpu_class], error.highest_ratio)
                expected.add_metric([gpu_class], peaks[0][0])
                measured.add_metric([gpu_class], peaks[0][1])
        yield from (jobs, mean, highest, expected, measured)

    def _named(self, found: Iterable[str]) -> list[str]:
        """The classes of the table, and others that are found: of an earlier table, or of another worker's."""
        return list(dict.fromkeys([*self._classes, *sorted(found)]))

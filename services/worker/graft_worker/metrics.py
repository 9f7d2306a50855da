"""What a worker counts for Prometheus: its runs, what they were busy with, what they trained. They name no job.

Runs are carried out in the pool's process or, if they were found by looking, in its parent, and the parent answers
Prometheus: with a port set, both count in files of one folder (the multiprocess mode of prometheus_client), which is
named in the environment before that library is imported (`__main__.py`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from graft_shared.clock import boottime
from graft_shared.jobs import Job, Phase
from graft_worker.device import Device
from graft_worker.gpu import Gpu
from graft_worker.protocol import CheckpointEvent, Event, ProgressEvent, TrainedEvent
from graft_worker.settings import WorkerSettings
from graft_worker.supervisor.audience import OUTCOMES

# From a report on a few rows to a week of training.
RUN_SECONDS = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 43_200.0, 86_400.0, 604_800.0)

OWN = CollectorRegistry()

RUNS = Counter(
    "graft_worker_runs",
    "Runs of jobs by stage and outcome: `done`, `cancelled`, `lease_lost`, `left_to_reconciler`, or why it failed.",
    ["stage", "outcome"],
    registry=OWN,
)
SECONDS = Histogram(
    "graft_worker_run_duration_seconds",
    "From a run's claim to its settle.",
    ["stage"],
    buckets=RUN_SECONDS,
    registry=OWN,
)
PHASE_SECONDS = Counter(
    "graft_worker_phase_seconds",
    "Time that runs spent in each phase, once it is over.",
    ["stage", "phase"],
    registry=OWN,
)
REPORTS = Counter(
    "graft_worker_reports",
    "Reports on files: `made`, `given_back` by a worker that leaves, or why they failed.",
    ["outcome"],
    registry=OWN,
)
STEPS = Counter("graft_worker_trained_steps", "Optimizer steps done, those done again included.", registry=OWN)
TOKENS = Counter("graft_worker_trained_tokens", "Tokens trained on, those trained on again included.", registry=OWN)
CHECKPOINTS = Counter("graft_worker_checkpoints", "Checkpoints that trainers saved.", registry=OWN)
PEAKS = Histogram(
    "graft_worker_memory_forecast_ratio",
    "Measured by expected peak memory of trained jobs; above 1.1 the capacity table is too kind.",
    buckets=(0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5),
    registry=OWN,
)


class RunFigures:
    """Counts one run."""

    def __init__(self, job: Job) -> None:
        self._stage = job.stage.value
        self._began_at = boottime()
        self._phase: tuple[Phase, float] | None = None
        self._step = job.checkpoint.step if job.checkpoint is not None else 0  # done before; as the trainer counts
        self._tokens: int | None = None

    def began(self, phase: Phase) -> None:
        """Close the account of the phase before."""
        self._close()
        self._phase = (phase, boottime())

    def heard(self, event: Event) -> None:
        """Count what a trainer has done."""
        match event:
            case ProgressEvent():
                self._count_step(event)
            case CheckpointEvent():
                CHECKPOINTS.inc()
            case TrainedEvent():
                expected, measured = (event.memory.get(f"{name}_peak_bytes") for name in ("expected", "measured"))
                if expected and measured and event.memory.get("measured_on") == "cuda":
                    PEAKS.observe(measured / expected)

    def ended(self, outcome: str) -> None:
        """Count the run."""
        self._close()
        RUNS.labels(self._stage, outcome).inc()
        SECONDS.labels(self._stage).observe(boottime() - self._began_at)

    def _count_step(self, event: ProgressEvent) -> None:
        if self._tokens is None:  # an earlier run's share, which its events counted; by steps, for it is not told
            self._tokens = event.tokens_seen * self._step // max(event.step, 1)
        STEPS.inc(max(0, event.step - self._step))
        TOKENS.inc(max(0, event.tokens_seen - self._tokens))
        self._step, self._tokens = event.step, event.tokens_seen

    def _close(self) -> None:
        if self._phase is not None:
            phase, since = self._phase
            PHASE_SECONDS.labels(self._stage, phase.value).inc(boottime() - since)


class Place(Collector):
    """Who this worker is, what its device is busy with and how much room its disk has, at the moment of asking."""

    def __init__(self, settings: WorkerSettings, device: Device) -> None:
        self._settings = settings
        self._device = device
        self._gpu = Gpu.of(device)

    def collect(self) -> Iterator[Metric]:
        """Look."""
        name, device = self._settings.worker_name, self._device
        info = GaugeMetricFamily(
            "graft_worker_info", "1; who this worker is.", labels=["worker", "stage", "gpu_class", "device"]
        )
        info.add_metric([name, device.stage.value, device.gpu_class, device.name], 1)
        yield info
        work_dir = self._settings.work_dir
        if work_dir.exists():
            yield GaugeMetricFamily(
                "graft_worker_disk_free_bytes",
                "Room where runs work; below 256 MiB this worker claims nothing.",
                value=shutil.disk_usage(work_dir).free,
            )
        if self._gpu is not None:
            yield from self._gpu.collect()


def figures_of(settings: WorkerSettings, device: Device) -> CollectorRegistry:
    """All that a worker tells; its runs from 0 on, or the first of an outcome would be no increase."""
    for outcome in OUTCOMES:
        RUNS.labels(device.stage.value, outcome)
    registry = CollectorRegistry()
    registry.register(Place(settings, device))
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    else:
        registry.register(OWN)
    return registry

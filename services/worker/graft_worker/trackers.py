"""Curves to MLflow and TensorBoard, by their own libraries, fed by the supervisor: the trainer has no network.

A tracker that is away or slow costs its curves and nothing else: what it is told waits in a queue for a thread of its
own. Steps that do not fit are dropped, with a warning of the job; how the run ended always fits.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import copy_context
from pathlib import Path
from typing import Any, Protocol

from graft_shared.errors import GraftError
from graft_shared.jobs import Job, Phase, Stage
from graft_shared.logs import log_event
from graft_shared.settings import SharedSettings
from graft_shared.specs import ReportTo
from graft_shared.store import Leases
from graft_worker.protocol import EvaluationEvent, Event, ProgressEvent
from graft_worker.supervisor.audience import CANCELLED, DONE

MOST_WAITING = 1000  # steps that a tracker has not been told of yet
STILL_SECONDS = 60.0  # that a tracker may take over one step, before its job is warned; well ones take milliseconds
END_SECONDS = 2.0  # for the rest, once a run is over: its worker may leave right after, and the thread with it

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """One run in one tracker. Its methods may wait, and raise whatever its library does."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take a point of each curve, under Hugging Face's names."""

    def end(self, outcome: str) -> None:
        """The run is over."""


class Mlflow:
    """A run of the tracking server, one for a job: a later epoch goes on in it."""

    def __init__(self, job: Job, uri: str) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(f"graft/{job.tenant}")
        experiment = found.experiment_id if found is not None else self._client.create_experiment(f"graft/{job.tenant}")
        earlier = self._client.search_runs([experiment], f"tags.`graft.job_id` = '{job.id}'", max_results=1)
        if earlier:
            self._run_id = earlier[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            return
        tags = {"graft.job_id": job.id, "graft.gpu_class": job.gpu_class}
        run = self._client.create_run(experiment, tags=tags, run_name=job.spec["name"] or job.id)
        self._run_id = run.info.run_id
        for name, value in _parameters(job).items():
            self._client.log_param(self._run_id, name, value)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send points, one after the other."""
        for name, value in values.items():
            self._client.log_metric(self._run_id, name, value, step=step)

    def end(self, outcome: str) -> None:
        """Close the run; one that will be tried again is opened again by its next epoch."""
        status = {DONE: "FINISHED", CANCELLED: "KILLED"}.get(outcome, "FAILED")
        self._client.set_terminated(self._run_id, status=status)


class TensorBoard:
    """Event files under `<folder>/<tenant>/<job>/e<epoch>`."""

    def __init__(self, job: Job, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(logdir=str(folder / job.tenant / job.id / f"e{job.epoch}"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write points."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def end(self, outcome: str) -> None:
        """Write what is left."""
        self._writer.add_text("outcome", outcome)
        self._writer.close()


class Reporter:
    """Passes on to one tracker what a run tells, from a thread of its own."""

    def __init__(self, name: str, begin: Callable[[], Tracker], warn: Callable[[str], None]) -> None:
        """Begin; `warn` is told once, from either thread, if the tracker cannot be fed or does not keep up."""
        self._name = name
        self._begin = begin
        self._warn = warn
        self._unwarned = threading.Lock()  # taken by the first warning, for good
        self._busy_since: float | None = time.monotonic()  # with what it is told now
        self._waiting: queue.SimpleQueue[tuple[int, dict[str, float]] | str] = queue.SimpleQueue()
        in_context = copy_context().run  # what it logs is about the same run
        self.thread = threading.Thread(target=in_context, args=(self._feed,), name=f"report-{name}", daemon=True)
        self.thread.start()

    def began(self, phase: Phase) -> None:
        """Nothing is drawn of phases."""

    def heard(self, event: Event) -> None:
        """Put points in the queue, if there is room."""
        match event:
            case ProgressEvent():
                named = {f"train/{name}": float(getattr(event, name)) for name in _CURVES}
                self._draw(event.step, named)
            case EvaluationEvent():
                self._draw(event.step, {"eval/loss": event.eval_loss})

    def ended(self, outcome: str) -> None:
        """Have the thread end once it has told all; waits for that, but not for a tracker that stands still."""
        self._waiting.put(outcome)
        self.thread.join(END_SECONDS)

    def _draw(self, step: int, values: dict[str, float]) -> None:
        busy_since = self._busy_since
        if busy_since is not None and time.monotonic() > busy_since + STILL_SECONDS:
            still = f"{self._name} has stood still for {STILL_SECONDS:.0f} s"
            self._warn_once(f"{still}: {MOST_WAITING} steps wait for it at most, and others are left out.")
        if self._waiting.qsize() < MOST_WAITING:
            self._waiting.put((step, values))
        else:
            self._warn_once(f"{self._name} does not keep up: steps from {step} on are left out.")

    def _warn_once(self, message: str) -> None:
        if self._unwarned.acquire(blocking=False):
            self._warn(message)

    def _feed(self) -> None:
        try:
            tracker = self._begin()
            self._busy_since = None
            while not isinstance(what := self._waiting.get(), str):
                self._busy_since = time.monotonic()
                tracker.log(*what)
                self._busy_since = None
            tracker.end(what)
        except Exception as error:  # noqa: BLE001 (a tracker's library may raise anything, and no job hangs on it)
            kind = type(error).__name__
            reason = _USERINFO.sub("//", f"{kind}: {error}")
            log_event(logger, "tracker_failed", level=logging.WARNING, tracker=self._name, reason=reason)
            message = f"{self._name} was not told of this run from here on ({kind}): the worker's log has the reason."
            self._warn_once(message)


_USERINFO = re.compile(r"//\S*@")  # of an address: libraries quote the whole of it, password and all
_CURVES = ("loss", "learning_rate", "grad_norm", "epoch", "tokens_per_second", "tokens_seen")


def reporters_of(job: Job, settings: SharedSettings, leases: Leases) -> list[Reporter]:
    """One for each tracker that the job or the operator asks for, and that is set up; only training is drawn."""
    if job.stage is not Stage.TRAIN:
        return []
    wanted = {*job.spec["training"].get("report_to", ()), *settings.report_to}

    def warn(message: str) -> None:
        with suppress(GraftError):
            leases.record_warning(job.id, job.epoch, "tracker_failed", message)

    found = []
    uri, folder = settings.mlflow_tracking_uri, settings.tensorboard_dir
    if ReportTo.MLFLOW in wanted and uri:
        found.append(Reporter("MLflow", lambda: Mlflow(job, uri), warn))
    if ReportTo.TENSORBOARD in wanted and folder is not None:
        found.append(Reporter("TensorBoard", lambda: TensorBoard(job, folder), warn))
    return found


def _parameters(job: Job) -> dict[str, Any]:
    lora, training = job.spec["lora"], job.spec["training"]
    return {
        "base_model": job.spec["base_model"],
        **{f"lora.{name}": lora[name] for name in ("r", "lora_alpha", "target_modules")},
        **{f"training.{name}": training[name] for name in ("learning_rate", "max_length", "num_train_epochs", "seed")},
    }

"""Progress on its way to the store: steps are gathered and written together, so that a fast job does not flood it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from graft_shared.clock import boottime
from graft_shared.errors import StoreUnavailable
from graft_shared.jobs import Job, Phase
from graft_shared.logs import log_event
from graft_shared.store import Leases
from graft_worker.protocol import EvaluationEvent, NoteEvent, ProgressEvent, WarningEvent

WRITE_EVERY_SECONDS = 1.0

logger = logging.getLogger(__name__)


class ProgressRecorder:
    """Keeps the row's progress and the `metrics` events of one epoch."""

    def __init__(self, leases: Leases, job: Job) -> None:
        self._leases = leases
        self._job = job
        self._steps: list[dict[str, Any]] = []
        self._progress: dict[str, Any] = dict(job.progress)
        self._metrics: dict[str, Any] = {}
        self._written_at = 0.0

    def phase(self, phase: Phase) -> None:
        """Say what the child is busy with."""
        self.flush()
        self._write(lambda: self._leases.record_phase(self._job.id, self._job.epoch, phase))

    def warning(self, event: WarningEvent) -> None:
        """Tell the user of something."""
        self._write(lambda: self._leases.record_warning(self._job.id, self._job.epoch, event.code, event.message))

    def note(self, event: NoteEvent) -> None:
        """Let the history tell of something harmless."""
        self._write(lambda: self._leases.record_note(self._job.id, self._job.epoch, event.message))

    def step(self, event: ProgressEvent) -> None:
        """Take note of one optimizer step."""
        remaining = event.total_steps - event.step
        seconds_per_step = self._seconds_per_step(event)
        self._progress = {
            "step": event.step,
            "total_steps": event.total_steps,
            "epoch": round(event.epoch, 4),
            "percent": round(100 * event.step / event.total_steps, 2),
            "tokens_seen": event.tokens_seen,
            "tokens_per_second": round(event.tokens_per_second, 1),
            "eta_seconds": round(remaining * seconds_per_step, 1) if seconds_per_step is not None else None,
        }
        self._metrics["train_loss"] = event.loss
        self._steps.append(event.model_dump(include=_STEP_FACTS))
        if boottime() > self._written_at + WRITE_EVERY_SECONDS:
            self.flush()

    def evaluation(self, event: EvaluationEvent) -> None:
        """Take note of a held-out loss."""
        self._metrics["eval_loss"] = event.eval_loss
        self._steps.append(event.model_dump(include={"step", "eval_loss"}))
        self.flush()

    def flush(self) -> None:
        """Write what was gathered."""
        if not self._steps:
            return
        steps, self._steps = self._steps, []
        self._written_at = boottime()
        self._write(
            lambda: self._leases.record_progress(
                self._job.id, self._job.epoch, progress=self._progress, metrics=self._metrics, steps=steps
            )
        )

    def _seconds_per_step(self, event: ProgressEvent) -> float | None:
        if event.tokens_per_second <= 0 or event.step == 0:
            return None
        return event.tokens_seen / event.step / event.tokens_per_second

    def _write(self, write: Callable[[], None]) -> None:
        """Progress is no promise: a database that is away costs these lines, not the run."""
        try:
            write()
        except StoreUnavailable as error:
            log_event(logger, "progress_not_written", level=logging.WARNING, job_id=self._job.id, reason=error.message)


_STEP_FACTS = {"step", "epoch", "tokens_seen", "tokens_per_second", "loss", "grad_norm", "learning_rate"}

"""The spans of a run, made by the supervisor of what it is told: the trainer knows nothing of them."""

from __future__ import annotations

from graft_shared.jobs import Job, Phase
from graft_shared.tracing import Span, Tracing
from graft_worker.protocol import CheckpointEvent, EvaluationEvent, Event, ProgressEvent, WarningEvent
from graft_worker.supervisor.audience import CANCELLED, DONE


class RunSpans:
    """One span for a run, below the request that made the job, and one in it for each phase."""

    def __init__(self, job: Job, tracing: Tracing) -> None:
        self._tracing = tracing
        facts = {"graft__job__id": job.id, "graft__job__epoch": job.epoch, "graft__job__attempt": job.attempt}
        above = job.traceparent
        if job.epoch == 1:
            waited = tracing.begin("queued", parent=above, at=job.created_at, **facts)
            waited.end(at=job.claimed_at)
        more = {"graft__gpu_class": job.gpu_class, "graft__worker": job.worker}
        self._run = tracing.begin(f"run {job.stage.value}", parent=above, at=job.claimed_at, **facts, **more)
        self._phase: Span | None = None
        self._last_step: ProgressEvent | None = None

    def began(self, phase: Phase) -> None:
        """A span more; the one before is over."""
        self._end_phase()
        self._phase = self._tracing.begin(phase.value, parent=self._run.traceparent)

    def heard(self, event: Event) -> None:
        """Note what happened; steps are too many to be noted, so that the last one tells of all."""
        match event:
            case ProgressEvent():
                self._last_step = event
            case EvaluationEvent():
                self._run.note("evaluated", step=event.step, eval_loss=event.eval_loss)
            case CheckpointEvent():
                self._run.note("checkpoint", step=event.step)
            case WarningEvent():
                self._run.note("warning", code=event.code)

    def ended(self, outcome: str) -> None:
        """Close what is open."""
        self._end_phase()
        self._run.tell(graft__outcome=outcome)
        if self._last_step is not None:
            step = self._last_step
            self._run.tell(graft__step=step.step, graft__loss=step.loss, graft__tokens=step.tokens_seen)
        self._run.note("settled", outcome=outcome)
        self._run.end(failure=None if outcome in (DONE, CANCELLED) else outcome)

    def _end_phase(self) -> None:
        if self._phase is not None:
            self._phase.end()

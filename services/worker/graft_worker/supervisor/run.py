"""One claimed job from lease to settle: the supervisor's recipe."""

from __future__ import annotations

import logging
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import assert_never

from graft_shared.artifacts import log_key
from graft_shared.clock import boottime
from graft_shared.dispatch import queue_for
from graft_shared.errors import (
    ArtifactCorrupt,
    BaseModelUnavailable,
    GatedBaseModel,
    GraftError,
    InvalidParameter,
    InvalidTrainingFile,
    LeaseLost,
    NeighbourUnavailable,
    ObjectNotFound,
    UnknownBaseModel,
    UnsupportedBaseModel,
)
from graft_shared.jobs import REMEDIES, Failure, FailureReason, Job, Phase, Retry, Stage
from graft_shared.logs import about, log_event
from graft_worker.disk import FULL_DISK_MESSAGE, is_of_full_disk
from graft_worker.host import oom_kill_count
from graft_worker.protocol import (
    LOG_NAME,
    REQUEST_NAME,
    CheckpointEvent,
    EvaluationEvent,
    Event,
    FailureEvent,
    MergedEvent,
    MergeRequest,
    NoteEvent,
    PhaseEvent,
    PreparedEvent,
    PrepareRequest,
    ProgressEvent,
    TrainedEvent,
    TrainRequest,
    WarningEvent,
)
from graft_worker.supervisor import merge_run, preparation, training_run
from graft_worker.supervisor.audience import CANCELLED, DONE, LEASE_LOST, LEFT, Audience
from graft_worker.supervisor.child import Child, start_child
from graft_worker.supervisor.neighbours import Neighbours
from graft_worker.supervisor.outcome import failure_of, stopped
from graft_worker.supervisor.patience import Patience
from graft_worker.supervisor.progress import ProgressRecorder
from graft_worker.supervisor.watch import StopReason, Watch, WatchTimes

EVENT_PAUSE_SECONDS = 1.0  # progress is written at most this often
LOG_UPLOAD_SECONDS = 15.0
FETCH_PATIENCE_SECONDS = 60.0  # a bucket that restarts is waited for; an attempt that has cost nothing yet may go back

# What an error while fetching or publishing means for the run.
_REASONS: dict[type[GraftError], FailureReason] = {
    UnknownBaseModel: FailureReason.UNSUPPORTED_BASE_MODEL,
    UnsupportedBaseModel: FailureReason.UNSUPPORTED_BASE_MODEL,
    GatedBaseModel: FailureReason.GATED_BASE_MODEL,
    BaseModelUnavailable: FailureReason.BASE_MODEL_UNAVAILABLE,
    InvalidParameter: FailureReason.INVALID_PARAMETER,
    InvalidTrainingFile: FailureReason.INVALID_TRAINING_FILE,
    ArtifactCorrupt: FailureReason.ARTIFACT_CORRUPT,
    ObjectNotFound: FailureReason.ARTIFACT_CORRUPT,
    NeighbourUnavailable: FailureReason.ARTIFACT_UPLOAD_FAILED,
}

Request = PrepareRequest | TrainRequest | MergeRequest

logger = logging.getLogger(__name__)


class Run:
    """One epoch of one job in this worker."""

    def __init__(self, job: Job, workdir: Path, neighbours: Neighbours) -> None:
        self._job = job
        self._workdir = workdir
        self._neighbours = neighbours
        self._progress = ProgressRecorder(neighbours.leases, job)
        self._audience = Audience(neighbours.invite(job))
        self._result: PreparedEvent | TrainedEvent | MergedEvent | None = None
        self._last_words: FailureEvent | None = None
        self._request: Request | None = None
        self._log_uploaded_at = boottime()

    def run(self) -> None:
        """Carry the job as far as this epoch can; whatever happens, the row says so, or its lease runs out."""
        with about(job_id=self._job.id, epoch=self._job.epoch):
            self._carry()

    def _carry(self) -> None:
        job = self._job
        log_event(logger, "job_claimed", job_id=job.id, epoch=job.epoch, stage=job.stage.value, attempt=job.attempt)
        shutil.rmtree(self._workdir, ignore_errors=True)
        self._workdir.mkdir(parents=True)
        self._audience.began(Phase.FETCHING)
        try:
            self._audience.ended(self._run_leased())
        except LeaseLost:
            self._audience.ended(LEASE_LOST)
            log_event(logger, "lease_lost", level=logging.WARNING, job_id=job.id, epoch=job.epoch)
        except NeighbourUnavailable as error:
            # Not even the failure could be written: the lease runs out and the reconciler hands the job on.
            self._audience.ended(LEFT)
            log_event(logger, "job_left_to_reconciler", level=logging.ERROR, job_id=job.id, reason=error.message)
        finally:
            shutil.rmtree(self._workdir, ignore_errors=True)

    def _run_leased(self) -> str:
        watch = Watch(
            self._neighbours.leases,
            self._job.id,
            self._job.epoch,
            self._workdir,
            times=watch_times(self._neighbours),
            draining=self._neighbours.draining,
            ends_at=self._ends_at(),
        )
        with watch, ExitStack() as kept:
            try:
                failure = self._run_watched(watch, kept)
            except LeaseLost:
                raise
            except Exception as error:  # noqa: BLE001 (named, written to the row and logged: one job must not end a worker)
                failure = failure_from(error) if watch.stop_reason is None else stopped(watch.stop_reason)
            return self._settle(failure, watch) if failure is not None else DONE

    def _run_watched(self, watch: Watch, kept: ExitStack) -> Failure | None:
        patience = Patience(
            seconds=self._neighbours.settings.upload_patience_seconds, gave_up=lambda: watch.stop_reason is not None
        )
        request = patience.wait_for(lambda: self._fetch(kept), at_most_seconds=FETCH_PATIENCE_SECONDS)
        self._request = request
        (self._workdir / REQUEST_NAME).write_text(request.model_dump_json())
        if watch.stop_reason is not None:
            return stopped(watch.stop_reason)
        if isinstance(request, TrainRequest):
            too_much = training_run.too_much_for_host(self._job, request, self._neighbours.capacity)
            if too_much is not None:
                return too_much
        kills_before = oom_kill_count()
        child = self._start_child()
        try:
            watch.look_after(child)
            for event in child.events(timeout=EVENT_PAUSE_SECONDS):
                self._handle(event, child, watch, patience)
        except BaseException:
            child.kill()
            raise
        finally:
            code = child.wait()
            watch.look_after(None)
        self._progress.flush()
        self._upload_log()  # before the job ends: who sees it ended finds the whole log, and the worker is free
        log_event(logger, "child_ended", job_id=self._job.id, epoch=self._job.epoch, exit_code=code)
        if watch.stop_reason in (StopReason.CANCEL, StopReason.LEASE_LOST):
            return stopped(watch.stop_reason)
        failure = failure_of(code, self._last_words, watch.stop_reason, oom_kills=oom_kill_count() - kills_before)
        if failure is None:
            self._finish(request, patience)
        return failure

    def _start_child(self) -> Child:
        stage = self._job.stage
        spare = self._neighbours.spare.take(self._workdir) if stage is Stage.TRAIN else None
        runs = {Stage.PREPARE: preparation, Stage.TRAIN: training_run, Stage.MERGE: merge_run}
        module: str = runs[stage].MODULE
        cache_dir = self._neighbours.settings.cache_dir
        return spare or start_child(module, self._workdir, device=self._neighbours.device, cache_dir=cache_dir)

    def _fetch(self, kept: ExitStack) -> Request:
        match self._job.stage:
            case Stage.PREPARE:
                return preparation.prepare_request(self._job, self._workdir, self._neighbours, kept)
            case Stage.TRAIN:
                return training_run.train_request(self._job, self._workdir, self._neighbours, kept)
            case Stage.MERGE:
                return merge_run.merge_request(self._job, self._workdir, self._neighbours, kept)

    def _handle(self, event: Event | None, child: Child, watch: Watch, patience: Patience) -> None:
        if watch.stop_reason is StopReason.LEASE_LOST:
            return
        match event:
            case None:
                self._progress.flush()
            case PhaseEvent():
                self._begin(event.phase)
            case ProgressEvent():
                self._progress.step(event)
                self._neighbours.spare.prepare(training_run.MODULE)  # for the job after this one
            case EvaluationEvent():
                self._progress.evaluation(event)
            case WarningEvent():
                self._progress.warning(event)
            case NoteEvent():
                self._progress.note(event)
            case CheckpointEvent():
                if watch.stop_reason is not StopReason.CANCEL:
                    self._save(event, child, patience)
            case FailureEvent():
                self._last_words = event
            case PreparedEvent() | TrainedEvent() | MergedEvent():
                self._result = event
            case _:
                assert_never(event)
        if event is not None and not isinstance(event, PhaseEvent):
            self._audience.heard(event)
        if boottime() > self._log_uploaded_at + LOG_UPLOAD_SECONDS:
            self._upload_log()

    def _save(self, event: CheckpointEvent, child: Child, patience: Patience) -> None:
        """Store a checkpoint unless a later one waits already: behind a slow bucket they would pile up."""
        if child.has_saved_after(event.step):
            log_event(logger, "checkpoint_overtaken", job_id=self._job.id, step=event.step)
            shutil.rmtree(event.path)
            return
        self._progress.flush()
        training_run.store_checkpoint(self._job, event, self._neighbours, patience)

    def _begin(self, phase: Phase) -> None:
        self._progress.phase(phase)
        self._audience.began(phase)

    def _finish(self, request: Request, patience: Patience) -> None:
        job, workdir, neighbours = self._job, self._workdir, self._neighbours
        if isinstance(self._result, PreparedEvent) and isinstance(request, PrepareRequest):
            preparation.finish_preparation(job, workdir, request, self._result, neighbours, patience)
        elif isinstance(self._result, TrainedEvent) and isinstance(request, TrainRequest):
            self._begin(Phase.PUBLISHING)
            training_run.publish_adapter(job, workdir, request, self._result, neighbours, patience)
        elif isinstance(self._result, MergedEvent) and isinstance(request, MergeRequest):
            self._begin(Phase.PUBLISHING)
            merge_run.publish_merged(job, workdir, request, self._result, neighbours, patience)
        else:
            raise ArtifactCorrupt("The child left with code 0 but brought no result.")
        log_event(logger, "job_carried_on", job_id=self._job.id, epoch=self._job.epoch, stage=self._job.stage.value)

    def _settle(self, failure: Failure, watch: Watch) -> str:
        """End the run without its result, and say how."""
        leases, job = self._neighbours.leases, self._job
        if watch.stop_reason is StopReason.LEASE_LOST:
            raise LeaseLost(job_id=job.id, epoch=job.epoch)
        patience = Patience(
            seconds=self._neighbours.settings.upload_patience_seconds,
            gave_up=lambda: watch.stop_reason is StopReason.LEASE_LOST,
        )
        if watch.stop_reason is StopReason.CANCEL:
            patience.wait_for(lambda: leases.settle_cancelled(job.id, job.epoch))
            log_event(logger, "job_cancelled", job_id=job.id, epoch=job.epoch)
            return CANCELLED
        replanned = None
        if failure.reason in training_run.SHORT_OF_MEMORY and isinstance(self._request, TrainRequest):
            replanned = training_run.replan(job, self._request, self._neighbours.capacity, failure)
        after = patience.wait_for(lambda: leases.settle_failure(job.id, job.epoch, failure, replanned=replanned))
        facts = {"reason": failure.reason.value, "state": after.state.value, "message": failure.message}
        level = logging.INFO if failure.reason is FailureReason.PAUSED else logging.WARNING
        log_event(logger, "attempt_settled", level=level, job_id=job.id, attempt=job.attempt, **facts)
        if after.may_be_claimed and (replanned or REMEDIES[failure.reason].retry is not Retry.CHARGED):
            self._neighbours.doorbell.ring(job.id, queue_for(after.stage, after.gpu_class))
        return failure.reason.value

    def _upload_log(self) -> None:
        """Keep the child's log readable for the user; best effort, the run does not hang on it."""
        path = self._workdir / LOG_NAME
        self._log_uploaded_at = boottime()
        if self._job.stage is Stage.PREPARE or not path.exists():
            return
        try:
            self._neighbours.bucket.put_file(log_key(self._job.tenant, self._job.id, self._job.epoch), path)
        except (GraftError, OSError) as error:
            log_event(logger, "log_not_uploaded", level=logging.WARNING, job_id=self._job.id, reason=str(error))

    def _ends_at(self) -> float | None:
        """When its runs will have held a GPU for as long as the job may: preparing, waiting and pauses do not count."""
        limit: int | None = self._job.spec["max_duration_seconds"]
        if limit is None or self._job.stage is not Stage.TRAIN:
            return None
        return boottime() + limit - self._job.gpu_seconds


def watch_times(neighbours: Neighbours) -> WatchTimes:
    """The intervals that the settings give."""
    settings = neighbours.settings
    return WatchTimes(
        lease=settings.lease_seconds,
        heartbeat=settings.heartbeat_seconds,
        orders=settings.orders_seconds,
        stop_grace=settings.stop_grace_seconds,
    )


def failure_from(error: Exception) -> Failure:
    """Name what went wrong outside the child."""
    if isinstance(error, GraftError):
        for kind, reason in _REASONS.items():
            if isinstance(error, kind):
                return Failure(reason=reason, message=error.message, param=error.param, facts=error.facts)
    logger.error("run_crashed", exc_info=error)
    if is_of_full_disk(error):
        return Failure(reason=FailureReason.DISK_FULL, message=FULL_DISK_MESSAGE)
    return Failure(reason=FailureReason.CRASH, message=f"The worker failed: {type(error).__name__}: {error}")

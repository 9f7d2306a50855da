"""One claimed report from lease to settle: rows and tokenizer in, figures out. Nothing of it is kept but its row."""

from __future__ import annotations

import logging
import shutil
from contextlib import ExitStack
from pathlib import Path

from graft_shared.errors import FileNotFound, LeaseLost, NeighbourUnavailable
from graft_shared.jobs import Failure
from graft_shared.logs import about, log_event
from graft_shared.specs import DatasetSource, ReportSpec
from graft_shared.store import Report
from graft_worker.host import oom_kill_count
from graft_worker.metrics import REPORTS
from graft_worker.protocol import REQUEST_NAME, FailureEvent, PreparedEvent, ReportRequest
from graft_worker.supervisor import preparation
from graft_worker.supervisor.child import start_child
from graft_worker.supervisor.neighbours import Neighbours
from graft_worker.supervisor.outcome import failure_of, stopped
from graft_worker.supervisor.patience import Patience
from graft_worker.supervisor.run import EVENT_PAUSE_SECONDS, FETCH_PATIENCE_SECONDS, failure_from, watch_times
from graft_worker.supervisor.sources import fetch_rows
from graft_worker.supervisor.watch import StopReason, Watch

logger = logging.getLogger(__name__)


def run_report(report: Report, workdir: Path, neighbours: Neighbours) -> None:
    """Make a report and settle it; whatever happens, its row says so, or its lease runs out."""
    with about(report_id=report.id, epoch=report.epoch):
        _carry(report, workdir, neighbours)


def _carry(report: Report, workdir: Path, neighbours: Neighbours) -> None:
    log_event(logger, "report_claimed", report_id=report.id, epoch=report.epoch, file_id=report.file_id)
    shutil.rmtree(workdir, ignore_errors=True)
    workdir.mkdir(parents=True)
    try:
        _run_leased(report, workdir, neighbours)
    except (LeaseLost, NeighbourUnavailable) as error:
        log_event(logger, "report_dropped", level=logging.WARNING, report_id=report.id, reason=error.message)
    finally:
        shutil.rmtree(workdir, ignore_errors=True)


def _run_leased(report: Report, workdir: Path, neighbours: Neighbours) -> None:
    watch = Watch(
        neighbours.reports,
        report.id,
        report.epoch,
        workdir,
        times=watch_times(neighbours),
        draining=neighbours.draining,
        ends_at=None,
    )
    with watch, ExitStack() as kept:
        try:
            made = _make(report, workdir, neighbours, watch, kept)
        except (LeaseLost, FileNotFound):
            raise LeaseLost(job_id=report.id, epoch=report.epoch) from None
        except Exception as error:  # noqa: BLE001 (named, written to the row and logged: a report must not end a worker)
            made = failure_from(error)
        patience = _patience(neighbours, watch)
        patience.wait_for(lambda: _settle(report, made, neighbours, watch))


def _make(
    report: Report, workdir: Path, neighbours: Neighbours, watch: Watch, kept: ExitStack
) -> PreparedEvent | Failure:
    patience = _patience(neighbours, watch)
    request = patience.wait_for(
        lambda: _request(report, workdir, neighbours, kept), at_most_seconds=FETCH_PATIENCE_SECONDS
    )
    (workdir / REQUEST_NAME).write_text(request.model_dump_json())
    last_words, prepared = None, None
    kills_before = oom_kill_count()
    child = start_child(preparation.MODULE, workdir, device=neighbours.device, cache_dir=neighbours.settings.cache_dir)
    try:
        watch.look_after(child)
        for event in child.events(timeout=EVENT_PAUSE_SECONDS):
            if isinstance(event, FailureEvent):
                last_words = event
            elif isinstance(event, PreparedEvent):
                prepared = event
    except BaseException:
        child.kill()
        raise
    finally:
        code = child.wait()
        watch.look_after(None)
    failure = failure_of(code, last_words, watch.stop_reason, oom_kills=oom_kill_count() - kills_before)
    return failure or prepared or stopped(StopReason.DRAIN)


def _request(report: Report, workdir: Path, neighbours: Neighbours, kept: ExitStack) -> ReportRequest:
    spec = ReportSpec.model_validate(report.spec)
    tokenizer = kept.enter_context(neighbours.base_models.tokenizer(spec.base_model, spec.revision))
    train_file, validation_file = workdir / "train.jsonl", None
    fetch_rows(report.tenant, DatasetSource(file=report.file_id), train_file, neighbours, param="dataset")
    if spec.validation is not None and spec.validation.file is not None:
        validation_file = workdir / "validation.jsonl"
        held_out = DatasetSource(file=spec.validation.file)
        fetch_rows(report.tenant, held_out, validation_file, neighbours, param="validation")
    return ReportRequest(
        spec=report.spec,
        tokenizer_path=str(tokenizer.path),
        train_file=str(train_file),
        validation_file=str(validation_file) if validation_file else None,
    )


def _settle(report: Report, made: PreparedEvent | Failure, neighbours: Neighbours, watch: Watch) -> None:
    if watch.stop_reason is StopReason.LEASE_LOST:
        raise LeaseLost(job_id=report.id, epoch=report.epoch)
    if isinstance(made, PreparedEvent):
        neighbours.reports.settle(report.id, report.epoch, made.report)
        REPORTS.labels("made").inc()
        log_event(logger, "report_made", report_id=report.id, epoch=report.epoch)
    elif watch.stop_reason is not None:
        neighbours.reports.give_back(report.id, report.epoch)
        REPORTS.labels("given_back").inc()
    else:
        neighbours.reports.fail(report.id, report.epoch, made)
        facts = {"reason": made.reason.value, "message": made.message}
        REPORTS.labels(made.reason.value).inc()
        log_event(logger, "report_failed", level=logging.WARNING, report_id=report.id, **facts)


def _patience(neighbours: Neighbours, watch: Watch) -> Patience:
    seconds = neighbours.settings.upload_patience_seconds
    return Patience(seconds=seconds, gave_up=lambda: watch.stop_reason is not None)

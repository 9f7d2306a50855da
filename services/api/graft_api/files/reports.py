"""Reports on files: asked for here, made by a worker that prepares data; the API itself never tokenises."""

from __future__ import annotations

from graft_api.deps import Neighbours
from graft_api.files.schemas import DataReport, ReportBody, ReportStatus
from graft_shared.errors import (
    GatedBaseModel,
    GraftError,
    InvalidParameter,
    InvalidTrainingFile,
    ReportUnavailable,
    UnsupportedBaseModel,
)
from graft_shared.ids import new_report_id
from graft_shared.jobs import FailureReason
from graft_shared.specs import DEFAULT_MAX_LENGTH, CompletionOnlyLoss, ReportSpec, Validation
from graft_shared.store import Report, ReportState

# What a worker found that its tenant has to change.
_REFUSALS: dict[str, type[GraftError]] = {
    FailureReason.INVALID_TRAINING_FILE: InvalidTrainingFile,
    FailureReason.INVALID_PARAMETER: InvalidParameter,
    FailureReason.UNSUPPORTED_BASE_MODEL: UnsupportedBaseModel,
    FailureReason.GATED_BASE_MODEL: GatedBaseModel,
}
_STATUSES = {
    ReportState.QUEUED: ReportStatus.QUEUED,
    ReportState.RUNNING: ReportStatus.RUNNING,
    ReportState.DONE: ReportStatus.READY,
}


def spec_of(
    here: Neighbours,
    *,
    base_model: str,
    revision: str,
    max_length: int | None,
    completion_only_loss: CompletionOnlyLoss,
    validation: Validation | None,
    seed: int,
) -> ReportSpec:
    """What is asked for, with the base's own longest length where none is given.

    Raises:
        UnknownBaseModel, GatedBaseModel, UnsupportedBaseModel, BaseModelUnavailable: Of the base.
        InvalidParameter: The base cannot read rows of this length.
    """
    positions = here.bases.resolve(base_model, revision).max_position_embeddings
    if max_length is not None and max_length > positions:
        raise InvalidParameter(param="max_length", reason=f"'{base_model}' has {positions} positions")
    return ReportSpec(
        base_model=base_model,
        revision=revision,
        validation=validation,
        max_length=max_length or min(DEFAULT_MAX_LENGTH, positions),
        completion_only_loss=completion_only_loss,
        seed=seed,
    )


def report_on(tenant: str, file_id: str, spec: ReportSpec, here: Neighbours) -> ReportBody:
    """The report, or how far it is; if nobody has asked for it before, a worker is woken to make it.

    Raises:
        FileNotFound: No such file, or another tenant's.
        TooManyReports: The tenant waits for many already.
        InvalidTrainingFile, InvalidParameter, UnsupportedBaseModel, GatedBaseModel: A job would fail of the same.
        ReportUnavailable: No worker could make it.
    """
    report_id = new_report_id()
    report = here.reports.ask(report_id, tenant, file_id, spec.model_dump(mode="json"))
    if report.id == report_id:
        here.bells.ring_for_report(report)
    if report.state is ReportState.FAILED:
        raise _error_of(report)
    return ReportBody(
        id=report.id,
        file_id=file_id,
        status=_STATUSES[report.state],
        settings=spec.model_dump(mode="json"),
        report=DataReport.model_validate(report.report) if report.report is not None else None,
    )


def _error_of(report: Report) -> GraftError:
    error = report.error or {}
    refusal = _REFUSALS.get(error["reason"])
    if refusal is None:
        return ReportUnavailable(reason=error["message"])
    return refusal(error["message"], param=error["param"], **error["facts"])

"""Admission: from a spec to a committed job or a refusal (what fits where is decided in `graft_shared`); resuming."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from typing import Any

from graft_api.deps import Neighbours
from graft_api.jobs.earlier import going_on
from graft_api.jobs.schemas import SpeedForecast
from graft_api.parsing import parse_spec
from graft_shared.capacity import Placement, within_positions
from graft_shared.catalogue import ModelShape
from graft_shared.errors import FileNotFound, InvalidParameter
from graft_shared.ids import new_job_id
from graft_shared.jobs import Job
from graft_shared.logs import log_event
from graft_shared.specs import JobSpec, ReportTo
from graft_shared.speed import forecast
from graft_shared.store import NewJob, Sending
from graft_shared.tracing import current_trace
from graft_shared.webhooks import TargetRefused

WEBHOOKS_ARE_OFF = "this service sends no webhooks; its operator has not set GRAFT_WEBHOOK_SECRET"

logger = logging.getLogger(__name__)


def submit(
    tenant: str, body: Any, idempotency_key: str | None, here: Neighbours, *, sending: Sending | None = None
) -> Job:
    """Commit the job that the body asks for, ring for it, and return it.

    A key that was used before gives its job back before anything else is looked at: neither a catalogue nor a file
    that has changed since can turn a repeated POST into a refusal. So does, where there is no key, a `sending` that is
    a repetition.

    Raises:
        IdempotencyConflict: The key was used with another body.
        Everything that `parse_spec` and `admit` raise.
    """
    spec = parse_spec(body)
    request_sha256 = _fingerprint(body)
    if idempotency_key is not None:
        earlier = here.jobs.find_by_key(tenant, idempotency_key, request_sha256)
        if earlier is not None:
            return earlier
    if sending is not None and sending.sent_before:
        made = here.jobs.find_sent(tenant, request_sha256, sending)
        if made is not None:
            return made
    spec, shape, placement = admit(tenant, spec, here)
    job, is_new = here.jobs.submit(
        replace(_new_job(tenant, spec, shape, placement, request_sha256, idempotency_key), sending=sending)
    )
    if is_new:
        here.bells.ring(job)
        log_event(
            logger, "job_submitted", job_id=job.id, tenant=tenant, base_model=spec.base_model, gpu_class=job.gpu_class
        )
    return job


def resume(tenant: str, job_id: str, here: Neighbours) -> Job:
    """Let a paused job go on, and ring for it.

    Raises:
        JobNotFound, JobFinished, JobCancelling: As `Jobs.resume`.
    """
    job = here.jobs.resume(tenant, job_id)
    if job.may_be_claimed:
        here.bells.ring(job)
    return job


def admit(tenant: str, spec: JobSpec, here: Neighbours) -> tuple[JobSpec, ModelShape, Placement]:
    """Decide where a job would be trained; the spec comes back with its defaults fitted to the base.

    Raises:
        UnknownBaseModel, GatedBaseModel, UnsupportedBaseModel, BaseModelUnavailable: Of the base.
        InvalidParameter: A file, bucket, class, target, length or earlier adapter that does not exist here.
        VramCapacityExceeded: No GPU class holds it.
    """
    spec = going_on(tenant, spec, here.jobs)
    shape = here.bases.resolve(spec.base_model, spec.revision)
    placement = here.capacity.place(shape, spec, here.bases.catalogue, here.bases.registered())
    _check_sources(tenant, spec, here)
    _check_webhook(spec, here)
    _check_trackers(spec, here)
    return within_positions(shape, spec), shape, placement


def speed_of(
    tenant: str, spec: JobSpec, shape: ModelShape, placement: Placement, here: Neighbours
) -> SpeedForecast | None:
    """How fast an admitted job would train; an uploaded file tells how much there is to train on."""
    rows = row_bytes = None
    if spec.dataset.file is not None:
        report = here.files.get(tenant, spec.dataset.file).report
        rows, row_bytes = report["rows"], report["bytes"] / max(1, report["rows"])
    gpu = placement.gpu_class
    found = forecast(
        shape,
        spec,
        placement.plan,
        gpu.cards,
        calibrated=gpu.calibrated,
        price_per_hour=gpu.price_per_hour,
        rows=rows,
        row_bytes=row_bytes,
    )
    return None if found is None else SpeedForecast.model_validate(found)


def normalised(spec: JobSpec) -> dict[str, Any]:
    """The spec as it is stored and echoed."""
    return spec.model_dump(mode="json", by_alias=True)


def _fingerprint(body: Any) -> str:
    """What makes two bodies the same: their values, not their spelling."""
    return hashlib.sha256(json.dumps(_whole(body), sort_keys=True).encode()).hexdigest()


def _whole(value: Any) -> Any:
    """The value with 3.0 written as 3."""
    if isinstance(value, dict):
        return {key: _whole(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_whole(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _new_job(
    tenant: str, spec: JobSpec, shape: ModelShape, placement: Placement, request_sha256: str, key: str | None
) -> NewJob:
    return NewJob(
        id=new_job_id(),
        tenant=tenant,
        spec=normalised(spec),
        plan=placement.plan.to_dict(),
        placement={
            "target_modules": list(placement.target_modules),
            "max_position_embeddings": shape.max_position_embeddings,
            "estimate": placement.estimate.to_dict(),
            "gpu": placement.gpu_class.facts,
        },
        gpu_class=placement.gpu_class.name,
        request_sha256=request_sha256,
        idempotency_key=key,
        warnings=[dict(warning) for warning in placement.warnings],
        files={param: file_id for param, file_id in _files_of(spec) if file_id is not None},
        adapter_of=spec.adapter.job if spec.adapter is not None else None,
        traceparent=current_trace(),
    )


def _check_sources(tenant: str, spec: JobSpec, here: Neighbours) -> None:
    for param, named in _files_of(spec):
        _check_file(tenant, param, named, here)
    if spec.dataset.uri is not None:
        bucket = spec.dataset.uri.removeprefix("s3://").partition("/")[0]
        allowed = here.settings.dataset_buckets
        if bucket not in allowed:
            there_are = f"datasets may come from {', '.join(allowed)}" if allowed else "the operator has allowed none"
            raise InvalidParameter(param="dataset.uri", reason=f"the bucket '{bucket}' is not allowed; {there_are}")


def _files_of(spec: JobSpec) -> list[tuple[str, str | None]]:
    return [
        ("dataset.file", spec.dataset.file),
        ("validation.file", spec.validation.file if spec.validation else None),
    ]


def _check_webhook(spec: JobSpec, here: Neighbours) -> None:
    if spec.webhook_url is None:
        return
    if here.postman is None:
        raise InvalidParameter(param="webhook_url", reason=WEBHOOKS_ARE_OFF)
    try:
        here.postman.check(spec.webhook_url)
    except TargetRefused as error:
        raise InvalidParameter(param="webhook_url", reason=str(error)) from error


def _check_trackers(spec: JobSpec, here: Neighbours) -> None:
    settings = here.settings
    needed = {
        ReportTo.MLFLOW: ("MLFLOW_TRACKING_URI", settings.mlflow_tracking_uri),
        ReportTo.TENSORBOARD: ("GRAFT_TENSORBOARD_DIR", settings.tensorboard_dir),
    }
    for tracker in spec.training.report_to:
        name, value = needed[tracker]
        if not value:
            reason = f"'{tracker.value}' is not set up here; the operator sets {name} for API and workers"
            raise InvalidParameter(param="training.report_to", reason=reason)


def _check_file(tenant: str, param: str, file_id: str | None, here: Neighbours) -> None:
    if file_id is None:
        return
    try:
        here.files.get(tenant, file_id)
    except FileNotFound as error:
        reason = f"there is no file '{file_id}'; POST /files gives an id"
        raise InvalidParameter(param=param, reason=reason) from error

"""Every error a caller of Graft can meet, as one small tree.

GraftError
├── BadRequest                     the request cannot be read
│   ├── MalformedBody
│   └── UnknownParameter
├── Refused                        the request is read and refused by its meaning
│   ├── InvalidParameter
│   ├── UnknownBaseModel
│   ├── GatedBaseModel
│   ├── UnsupportedBaseModel
│   ├── InvalidTrainingFile
│   ├── NoTrainableTokens
│   ├── FileTooLarge
│   ├── UploadDiffers
│   ├── VramCapacityExceeded
│   └── IdempotencyConflict
├── NotFound
│   ├── JobNotFound
│   ├── MergedModelNotFound
│   ├── FileNotFound
│   ├── UploadNotFound
│   ├── ReportNotFound
│   ├── BaseModelNotFound
│   ├── KeyNotFound
│   └── ObjectNotFound
├── Conflict                       right in itself, too late or too early
│   ├── JobFinished
│   ├── JobNotEnded
│   ├── JobInUse
│   ├── MergedModelInUse
│   ├── JobCancelling
│   ├── AdapterNotReady
│   ├── ReportNotReady
│   ├── FileInUse
│   ├── UploadNotReceived
│   ├── UploadExpired
│   └── WorkerNameTaken
├── LimitReached                   right in itself, and more than its tenant may have now
│   ├── QuotaExceeded
│   └── TooManyReports
├── LeaseLost                      another epoch owns the job now
├── ArtifactCorrupt                bytes read back differ from bytes written
└── NeighbourUnavailable           worth trying again
    ├── StoreUnavailable
    ├── BucketUnavailable
    ├── BaseModelUnavailable
    └── ReportUnavailable

The class name gives the stable `code`, the docstring the default message (a format string over the facts).
Facts travel to the answer and to the logs. HTTP status codes stand in `graft_api.errors` and nowhere else.
"""

from __future__ import annotations

import re
from typing import Any


class GraftError(Exception):
    """Something went wrong."""

    def __init__(self, message: str | None = None, *, param: str | None = None, **facts: Any) -> None:
        self.param = param
        self.facts = facts
        self.message = message or (type(self).__doc__ or "").strip().format(param=param, **facts)
        super().__init__(self.message)

    @property
    def code(self) -> str:
        """The stable word for this error: the class name in snake case."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()


class BadRequest(GraftError):
    """The request cannot be read."""


class MalformedBody(BadRequest):
    """The body is not valid JSON: {reason}."""


class UnknownParameter(BadRequest):
    """Unknown parameter '{param}'. {hint}"""


class Refused(GraftError):
    """The request was read and refused."""


class InvalidParameter(Refused):
    """'{param}' is not valid: {reason}."""


class UnknownBaseModel(Refused):
    """Unknown base model '{base_model}'. {hint}"""


class GatedBaseModel(Refused):
    """'{base_model}' is gated on the hub: accept its terms and give the operator's token access to it."""


class UnsupportedBaseModel(Refused):
    """'{base_model}' cannot be trained here: {reason}."""


class InvalidTrainingFile(Refused):
    """Line {line}: {reason}."""


class NoTrainableTokens(Refused):
    """No row leaves a token to learn from: {reason}."""


class FileTooLarge(Refused):
    """The file is larger than {limit_bytes} bytes. Split it, or ask the operator to raise GRAFT_MAX_FILE_BYTES."""


class UploadDiffers(Refused):
    """What came is not the file that was announced: {found}, where {announced} was expected. Send it again."""


class VramCapacityExceeded(Refused):
    """No GPU class of this service holds the job."""


class IdempotencyConflict(Refused):
    """This Idempotency-Key was used with another body. Use a new key for a new job."""


class NotFound(GraftError):
    """There is no such thing."""


class JobNotFound(NotFound):
    """There is no job '{job_id}'."""


class MergedModelNotFound(NotFound):
    """Nobody has asked for the merged model of '{job_id}'. POST /jobs/{job_id}/merged does."""


class FileNotFound(NotFound):
    """There is no file '{file_id}'."""


class UploadNotFound(NotFound):
    """There is no upload '{upload_id}', or it was begun more than a day ago. POST /files/uploads begins one."""


class ReportNotFound(NotFound):
    """The data of the job '{job_id}' was prepared by an earlier version, which left no such report."""


class BaseModelNotFound(NotFound):
    """There is no base model '{base_model}' in the catalogue. GET /models lists them."""


class KeyNotFound(NotFound):
    """There is no key '{key_id}'."""


class ObjectNotFound(NotFound):
    """There is no object '{key}' in the bucket."""


class Conflict(GraftError):
    """The request does not fit the present state."""


class JobFinished(Conflict):
    """The job '{job_id}' has already ended as '{status}'."""


class JobNotEnded(Conflict):
    """The job '{job_id}' is '{status}', and only a job that has ended can be deleted. Cancel it first."""


class JobInUse(Conflict):
    """The job '{reader_id}' goes on from the adapter of '{job_id}', and has not copied it yet. Wait, or cancel it."""


class MergedModelInUse(Conflict):
    """The adapter of '{job_id}' is being merged. Wait until that has ended: GET /jobs/{job_id}/merged tells."""


class JobCancelling(Conflict):
    """The job '{job_id}' is being cancelled: it can be neither paused nor resumed."""


class AdapterNotReady(Conflict):
    """The job '{job_id}' is '{status}': its adapter exists once it has succeeded."""


class ReportNotReady(Conflict):
    """The data of the job '{job_id}' is not prepared: its status is '{status}'."""


class UploadNotReceived(Conflict):
    """Nothing has come through the link of '{upload_id}' yet. Send the file there first, then complete the upload."""


class FileInUse(Conflict):
    """The job '{job_id}' has not read the file '{file_id}' yet. Wait until its data is prepared, or cancel it first."""


class UploadExpired(Conflict):
    """The upload took longer than a day and was given up. Send the file again."""


class WorkerNameTaken(Conflict):
    """Another live worker is named '{name}'. Set GRAFT_WORKER_NAME to a name that no other worker of the fleet has."""


class LimitReached(GraftError):
    """This is more than the tenant may have now."""


class QuotaExceeded(LimitReached):
    """The quota '{quota}' of this tenant is {limit}, and {used} are in use."""


class TooManyReports(LimitReached):
    """{limit} reports of this tenant wait already. Ask again once some of them are made."""


class LeaseLost(GraftError):
    """Epoch {epoch} of job '{job_id}' no longer holds the lease."""


class ArtifactCorrupt(GraftError):
    """'{key}' reads back with other bytes than were written: expected sha256 {expected}, found {found}."""


class NeighbourUnavailable(GraftError):
    """Something this service depends on does not answer."""


class StoreUnavailable(NeighbourUnavailable):
    """The database does not answer: {reason}."""


class BucketUnavailable(NeighbourUnavailable):
    """The object store does not answer: {reason}."""


class BaseModelUnavailable(NeighbourUnavailable):
    """The hub does not answer for '{base_model}': {reason}."""


class ReportUnavailable(NeighbourUnavailable):
    """The report could not be made, and will be tried again when it is asked for later: {reason}"""

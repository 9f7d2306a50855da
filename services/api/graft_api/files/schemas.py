"""How an uploaded file looks over HTTP."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from graft_shared.rows import RowKind
from graft_shared.specs import NO_NUL
from graft_shared.store import StoredFile


class RowsFound(BaseModel):
    """What the check of every line found."""

    rows: int
    kind: RowKind
    bytes: int


class FileBody(BaseModel):
    """One uploaded file; every line of it was checked."""

    id: str
    object: Literal["file"] = "file"
    filename: str
    bytes: int
    sha256: str
    purpose: Literal["fine-tune"] = "fine-tune"
    status: Literal["processed"] = "processed"
    created_at: int = Field(description="Unix seconds.")
    report: RowsFound


class UploadRequest(BaseModel):
    """The file that is going to be sent."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    filename: Annotated[str, Field(min_length=1, max_length=1024, pattern=NO_NUL)]
    bytes: Annotated[int, Field(ge=1)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="Of the whole file, in hex.")]


class UploadBody(BaseModel):
    """Where to send a file: one PUT of exactly these bytes, with these headers."""

    id: str
    object: Literal["upload"] = "upload"
    filename: str
    bytes: int
    sha256: str
    method: Literal["PUT"] = "PUT"
    url: str
    headers: dict[str, str]
    expires_at: int = Field(description="Unix seconds.")


class Side(BaseModel):
    """Rows that are trained or evaluated on, cut at `max_length`."""

    rows: int
    tokens: int
    trained_tokens: int = Field(description="Those that the loss is computed on.")


class HeldOut(Side):
    """The validation rows."""

    overlap_rows: int = Field(description="Of these rows, those that are trained on as well.")


class Histogram(BaseModel):
    """Bin n counts rows of `edges[n]` tokens up to before `edges[n + 1]`."""

    edges: list[int]
    counts: list[int]


class Lengths(BaseModel):
    """Tokens of the rows before they are cut."""

    percentiles: dict[str, int]
    histogram: Histogram


class TextSpan(BaseModel):
    """A stretch of a row as the model reads it."""

    text: str
    trained: bool = Field(description="The model learns to write it.")
    cut: bool = Field(description="It lies beyond `max_length` and is not read.")
    left_out: int = Field(description="Characters left out in the middle of a long text.")


class ShownRow(BaseModel):
    """One row through the base's chat template, with its loss mask."""

    line: int
    tokens: int
    spans: list[TextSpan]
    spans_left_out: int


class ReportWarning(BaseModel):
    """Something about the data that its owner should know."""

    code: str
    message: str


class DataReport(BaseModel):
    """What a job on this base would learn from the rows."""

    kind: RowKind
    rows: int = Field(description="In the dataset, those with nothing to learn included.")
    max_length: int
    train: Side
    validation: HeldOut | None
    truncated_rows: int
    truncated_share: float
    duplicate_rows: int = Field(description="Rows that stand earlier in the dataset already, word for word.")
    nothing_to_learn_rows: int = Field(description="Left out: what is to be learnt is empty or beyond `max_length`.")
    lengths: Lengths
    first_rows: list[ShownRow]
    warnings: list[ReportWarning]
    source: dict[str, str] | None = Field(default=None, description="Of a job: where its rows came from.")


class ReportStatus(StrEnum):
    """How far a report is."""

    QUEUED = "queued"
    RUNNING = "running"
    READY = "ready"


class ReportBody(BaseModel):
    """A report on a file; while it is being made, the answer is a 202 without one."""

    id: str
    object: Literal["file.report"] = "file.report"
    file_id: str
    status: ReportStatus
    settings: dict[str, Any] = Field(description="What it depends on: the same settings give the same report.")
    report: DataReport | None


class FileDeleted(BaseModel):
    """A file that is no more."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def file_body(file: StoredFile) -> FileBody:
    """One file as its user sees it."""
    return FileBody(
        id=file.id,
        filename=file.filename,
        bytes=file.object.size,
        sha256=file.object.sha256,
        created_at=int(file.created_at.timestamp()),
        report=RowsFound.model_validate(file.report),
    )

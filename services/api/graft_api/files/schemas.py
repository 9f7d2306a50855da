"""How an uploaded file looks over HTTP."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from graft_shared.rows import RowKind
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

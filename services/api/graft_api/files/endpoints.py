"""The routes of files."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import ValidationError

from graft_api.auth import MayReadFiles, MayWriteFiles
from graft_api.deps import Here, JsonBody, Neighbours
from graft_api.errors import documented
from graft_api.files import uploads
from graft_api.files.reports import report_on, spec_of
from graft_api.files.schemas import (
    FileBody,
    FileDeleted,
    ReportBody,
    ReportStatus,
    UploadBody,
    UploadRequest,
    file_body,
)
from graft_api.files.service import receive
from graft_api.paging import After, Limit, Page, envelope
from graft_api.parsing import error_of
from graft_api.streams import chunks_of
from graft_shared.errors import InvalidParameter
from graft_shared.specs import (
    BASE_MODEL_PATTERN,
    DEFAULT_SEED,
    REVISION_PATTERN,
    FileId,
    MaxLength,
    Seed,
    Validation,
)
from graft_shared.store import StoredFile

router = APIRouter(prefix="/files", tags=["files"])

REPORT_PAUSE_SECONDS = 1  # of who waits for a report; most take a few

CONTENT: dict[int | str, dict[str, Any]] = {200: {"content": {"application/jsonl": {}}}}
FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "JSONL, UTF-8, one row a line."},
                        "purpose": {"type": "string", "const": "fine-tune"},
                    },
                }
            }
        },
    }
}


@router.post("", status_code=201, summary="Upload a dataset", openapi_extra=FORM, responses=documented(409, 413, 415))
async def create_file(request: Request, tenant: MayWriteFiles, here: Here) -> FileBody:
    """Take a JSONL file; a line that cannot be trained on is refused with its number."""
    return file_body(await receive(request, tenant, here))


UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/UploadRequest"}}},
    }
}


@router.post(
    "/uploads",
    status_code=201,
    summary="Get a link to send a dataset to the bucket",
    openapi_extra=UPLOAD,
    responses=documented(413, 415),
)
def create_upload(request: Request, tenant: MayWriteFiles, body: JsonBody, here: Here) -> UploadBody:
    """Give a link for one PUT of exactly the announced bytes; then complete the upload."""
    if not isinstance(body, dict):
        raise InvalidParameter("The body must be a JSON object: the file that is going to be sent.")
    try:
        announced = UploadRequest.model_validate(body)
    except ValidationError as error:
        raise error_of(error.errors(), body=body, model=UploadRequest) from error
    return uploads.begin(announced, tenant, here, str(request.base_url))


@router.post(
    "/uploads/{upload_id}/complete",
    status_code=201,
    summary="Check what was sent, and make a file of it",
    responses=documented(404, 409),
)
def complete_upload(upload_id: str, tenant: MayWriteFiles, here: Here) -> FileBody:
    """Check every line, as of any upload; completed twice, an upload is the same file."""
    return file_body(uploads.complete(upload_id, tenant, here))


@router.get("", summary="List files, newest first", responses=documented(404))
def list_files(
    tenant: MayReadFiles,
    here: Here,
    after: After = None,
    limit: Limit = 20,
) -> Page[FileBody]:
    """List this tenant's files."""
    files, has_more = here.files.list(tenant, after=after, limit=limit)
    return envelope([file_body(file) for file in files], [file.id for file in files], has_more=has_more)


@router.get("/{file_id}", summary="One file", responses=documented(404))
def get_file(file_id: str, tenant: MayReadFiles, here: Here) -> FileBody:
    """Return what is known of it."""
    return file_body(here.files.get(tenant, file_id))


@router.get(
    "/{file_id}/content",
    summary="A file's bytes",
    response_class=StreamingResponse,
    responses={**CONTENT, **documented(404)},
)
def get_content(file_id: str, tenant: MayReadFiles, here: Here) -> StreamingResponse:
    """Stream the file as it was uploaded."""
    return content_of(here.files.get(tenant, file_id), here)


@router.get(
    "/{file_id}/report",
    summary="What a job on a base would learn from a file",
    responses={
        202: {"model": ReportBody, "description": "It is being made: ask again after `Retry-After`."},
        **documented(404),
    },
)
def get_report(
    response: Response,
    file_id: str,
    tenant: MayReadFiles,
    here: Here,
    base_model: Annotated[str, Query(pattern=BASE_MODEL_PATTERN, max_length=200)],
    revision: Annotated[str, Query(pattern=REVISION_PATTERN)] = "main",
    max_length: Annotated[MaxLength | None, Query(description="1024, or what the base can read at most.")] = None,
    completion_only_loss: Annotated[Literal["auto", "true", "false"], Query()] = "auto",
    validation_split: Annotated[float | None, Query(gt=0, lt=1)] = None,
    validation_file: Annotated[FileId | None, Query()] = None,
    seed: Annotated[Seed, Query(description="Of the split.")] = DEFAULT_SEED,
) -> ReportBody:
    """Return the report; it is made once for a file and these settings, on a CPU worker, before any job."""
    if validation_split is not None and validation_file is not None:
        raise InvalidParameter(param="validation_split", reason="give it or 'validation_file', not both")
    validates = validation_split is not None or validation_file is not None
    spec = spec_of(
        here,
        base_model=base_model,
        revision=revision,
        max_length=max_length,
        completion_only_loss="auto" if completion_only_loss == "auto" else completion_only_loss == "true",
        validation=Validation(split=validation_split, file=validation_file) if validates else None,
        seed=seed,
    )
    body = report_on(tenant, file_id, spec, here)
    if body.status is not ReportStatus.READY:
        response.status_code = 202
        response.headers["retry-after"] = str(REPORT_PAUSE_SECONDS)
    return body


@router.delete("/{file_id}", summary="Delete a file", responses=documented(404, 409))
def delete_file(file_id: str, tenant: MayWriteFiles, here: Here) -> FileDeleted:
    """Delete it for good; 409 while a job has not prepared its data from it yet."""
    here.files.delete(tenant, file_id)
    return FileDeleted(id=file_id)


def content_of(file: StoredFile, here: Neighbours) -> StreamingResponse:
    """The answer that streams a file."""
    headers = {
        "content-length": str(file.object.size),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
        "cache-control": "private, no-store",
    }
    source = here.bucket.open(file.object.key)
    return StreamingResponse(chunks_of(source), media_type="application/jsonl", headers=headers)

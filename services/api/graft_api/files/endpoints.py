"""The routes of files."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from graft_api.auth import MayReadFiles, MayWriteFiles
from graft_api.deps import Here, Neighbours
from graft_api.errors import documented
from graft_api.files.schemas import FileBody, FileDeleted, file_body
from graft_api.files.service import receive
from graft_api.paging import After, Limit, Page, envelope
from graft_api.streams import chunks_of
from graft_shared.store import StoredFile

router = APIRouter(prefix="/files", tags=["files"])

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

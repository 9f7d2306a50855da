"""The routes of files, as OpenAI's clients call them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from graft_api.auth import MayReadFiles, MayWriteFiles
from graft_api.compatible.schemas import FileObject
from graft_api.compatible.views import file_object
from graft_api.deps import Here
from graft_api.errors import documented
from graft_api.files.endpoints import CONTENT, FORM, content_of
from graft_api.files.multipart import PURPOSE
from graft_api.files.schemas import FileDeleted
from graft_api.files.service import receive
from graft_api.paging import After, Page, envelope
from graft_shared.specs import NO_NUL
from graft_shared.store import Order

router = APIRouter(prefix="/v1/files", tags=["compatible"])

MOST_FILES = 10_000  # in a page, as OpenAI has it


@router.post("", summary="Upload a dataset", openapi_extra=FORM, responses=documented(409, 413, 415))
async def create_file(request: Request, tenant: MayWriteFiles, here: Here) -> FileObject:
    """Take a JSONL file; a line that cannot be trained on is refused with its number. `expires_after` is refused."""
    return file_object(await receive(request, tenant, here))


@router.get("", summary="List files", responses=documented(404))
def list_files(
    tenant: MayReadFiles,
    here: Here,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=MOST_FILES)] = MOST_FILES,
    order: Annotated[Order, Query(description="By the time of their upload.")] = Order.DESC,
    purpose: Annotated[str, Query(pattern=NO_NUL, description="Any other than `fine-tune` finds none.")] = PURPOSE,
) -> Page[FileObject]:
    """List this tenant's files."""
    if purpose != PURPOSE:
        return envelope([], [], has_more=False)
    files, has_more = here.files.list(tenant, after=after, limit=limit, order=order)
    return envelope([file_object(file) for file in files], [file.id for file in files], has_more=has_more)


@router.get("/{file_id}", summary="One file", responses=documented(404))
def get_file(file_id: str, tenant: MayReadFiles, here: Here) -> FileObject:
    """Return what is known of it."""
    return file_object(here.files.get(tenant, file_id))


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

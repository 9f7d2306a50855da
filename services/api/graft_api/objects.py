"""Signed links of a bucket that is a directory: whoever holds one may read, or write, that one object for a while."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from graft_api.deps import Here, limited
from graft_api.errors import LinkExpired, documented
from graft_api.files.service import room_needed, scratch_file
from graft_api.streams import chunks_of
from graft_shared.buckets.directory import DirectoryBucket
from graft_shared.errors import UploadDiffers
from graft_shared.jobs import StoredObject

router = APIRouter(tags=["objects"])

Expires = Annotated[int, Query(ge=0, description="Until when the link holds, in Unix seconds.")]
Signature = Annotated[str, Query(pattern="^[0-9a-f]{64}$")]
_BYTES: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.get(
    "/objects/{key:path}",
    summary="An object, by a signed link",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/octet-stream": {}}}, **documented(403, 404)},
)
def read_object(
    here: Here,
    key: str,
    expires: Expires,
    signature: Signature,
) -> StreamingResponse:
    """Stream the object; 403 for a link that has expired or was not signed here."""
    bucket = here.bucket
    if not isinstance(bucket, DirectoryBucket) or not bucket.is_signed(key, expires, signature):
        raise LinkExpired
    size = bucket.size(key)
    headers = {"content-length": str(size), "cache-control": "private, no-store"}
    return StreamingResponse(chunks_of(bucket.open(key)), media_type="application/octet-stream", headers=headers)


@router.put(
    "/objects/{key:path}",
    status_code=204,
    summary="Send an object, by a signed link",
    openapi_extra=_BYTES,
    responses=documented(403, 404, 415),
)
async def write_object(
    request: Request,
    here: Here,
    key: str,
    expires: Expires,
    signature: Signature,
    bytes: Annotated[int, Query(ge=0, description="How many the link was signed for.")],
    sha256: Annotated[str, Query(pattern="^[0-9a-f]{64}$")],
) -> Response:
    """Store exactly the bytes that the link was signed for; 422 for others, 403 for a link that does not hold."""
    announced = StoredObject(key=key, size=bytes, sha256=sha256)
    bucket = here.bucket
    if not isinstance(bucket, DirectoryBucket) or not bucket.may_write(announced, expires, signature):
        raise LinkExpired
    longer = UploadDiffers(found=f"more than {bytes} bytes", announced=f"{bytes} bytes")
    digest = hashlib.sha256()
    with room_needed(), await run_in_threadpool(scratch_file, here) as scratch:
        async for chunk in limited(request, bytes, longer):
            digest.update(chunk)
            await run_in_threadpool(scratch.write, chunk)
        if scratch.tell() != bytes:
            raise UploadDiffers(found=f"{scratch.tell()} bytes", announced=f"{bytes} bytes")
        if digest.hexdigest() != sha256:
            raise UploadDiffers(found=f"sha256 {digest.hexdigest()}", announced=f"sha256 {sha256}")
        scratch.flush()
        await run_in_threadpool(bucket.put_file, key, Path(f"/proc/self/fd/{scratch.fileno()}"))
    return Response(status_code=204)

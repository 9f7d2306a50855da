"""Signed links of a bucket that is a directory: whoever holds one may read that one object for a while."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse

from graft_api.deps import Here
from graft_api.errors import LinkExpired, documented
from graft_api.streams import chunks_of
from graft_shared.buckets.directory import DirectoryBucket

router = APIRouter(tags=["objects"])


@router.get(
    "/objects/{key:path}",
    summary="An object, by a signed link",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/octet-stream": {}}}, **documented(403, 404)},
)
def read_object(
    here: Here,
    key: str,
    expires: Annotated[int, Query(ge=0, description="Until when the link holds, in Unix seconds.")],
    signature: Annotated[str, Query(pattern="^[0-9a-f]{64}$")],
) -> StreamingResponse:
    """Stream the object; 403 for a link that has expired or was not signed here."""
    bucket = here.bucket
    if not isinstance(bucket, DirectoryBucket) or not bucket.is_signed(key, expires, signature):
        raise LinkExpired
    size = bucket.size(key)
    headers = {"content-length": str(size), "cache-control": "private, no-store"}
    return StreamingResponse(chunks_of(bucket.open(key)), media_type="application/octet-stream", headers=headers)

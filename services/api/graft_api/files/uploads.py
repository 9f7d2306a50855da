"""Files that clients send to the bucket themselves: a link for the announced bytes, then the check of what came."""

from __future__ import annotations

import hashlib
import time
from typing import BinaryIO

from graft_api.deps import Neighbours
from graft_api.files.schemas import UploadBody, UploadRequest
from graft_api.files.service import keep, room_needed, safe_name, scratch_file
from graft_shared.artifacts import upload_key
from graft_shared.buckets.base import CHUNK_BYTES
from graft_shared.errors import FileTooLarge, ObjectNotFound, UploadDiffers, UploadNotFound, UploadNotReceived
from graft_shared.ids import new_upload_id
from graft_shared.jobs import StoredObject
from graft_shared.store import StoredFile, Upload


def begin(request: UploadRequest, tenant: str, here: Neighbours, base_url: str) -> UploadBody:
    """Give out a link through which exactly the announced bytes may be written.

    Raises:
        FileTooLarge, InvalidParameter, QuotaExceeded: Such a file would be refused.
    """
    if request.bytes > here.settings.max_file_bytes:
        raise FileTooLarge(limit_bytes=here.settings.max_file_bytes)
    upload_id = new_upload_id()
    announced = StoredObject(key=upload_key(tenant, upload_id), size=request.bytes, sha256=request.sha256)
    name = safe_name(request.filename, param="filename")
    here.files.await_upload(Upload(id=upload_id, tenant=tenant, filename=name, object=announced))
    life = here.settings.upload_link_life
    link = here.bucket.presign_upload(announced, expires=life, base_url=base_url)
    return UploadBody(
        id=upload_id,
        filename=name,
        bytes=request.bytes,
        sha256=request.sha256,
        url=link.url,
        headers=link.headers,
        expires_at=int(time.time() + life.total_seconds()),
    )


def complete(upload_id: str, tenant: str, here: Neighbours) -> StoredFile:
    """Make a file of what came through the link; completed again, an upload gives the same file.

    What is checked is a copy, and the copy is kept: whoever still has the link can change nothing of it.

    Raises:
        UploadNotFound: No such upload of this tenant within the last day.
        UploadNotReceived: Nothing has come yet.
        UploadDiffers: Other bytes came than were announced.
        InvalidTrainingFile: A line that cannot be trained on.
        UploadDiskFull: The API has no room for the copy.
    """
    upload = here.files.awaited(tenant, upload_id)
    if upload.file_id is not None:
        return here.files.get(tenant, upload.file_id)
    with room_needed(), scratch_file(here) as scratch:
        _fetch(upload, scratch, here)
        try:
            file = keep(scratch, upload.filename, tenant, here, upload=upload)
        except UploadNotFound:
            made = here.files.awaited(tenant, upload_id).file_id  # by another request for the same
            if made is None:
                raise
            return here.files.get(tenant, made)
    here.bucket.delete(upload.object.key)  # what is written there later goes with the upload's row
    return file


def _fetch(upload: Upload, scratch: BinaryIO, here: Neighbours) -> None:
    announced = upload.object
    try:
        size = here.bucket.size(announced.key)
        if size != announced.size:
            raise UploadDiffers(found=f"{size} bytes", announced=f"{announced.size} bytes")
        digest = hashlib.sha256()
        with here.bucket.open(announced.key) as source:
            while (chunk := source.read(CHUNK_BYTES)) and scratch.tell() <= announced.size:
                digest.update(chunk)
                scratch.write(chunk)
    except ObjectNotFound as error:
        raise UploadNotReceived(upload_id=upload.id) from error
    if digest.hexdigest() != announced.sha256:
        raise UploadDiffers(found=f"sha256 {digest.hexdigest()}", announced=f"sha256 {announced.sha256}")

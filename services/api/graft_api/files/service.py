"""Taking a file in: to disk as it arrives, checked line by line, then into the bucket, then into the database."""

from __future__ import annotations

import errno
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from graft_api.deps import Neighbours, limited
from graft_api.errors import UploadDiskFull
from graft_api.files.multipart import FileForm
from graft_shared.artifacts import file_key
from graft_shared.errors import FileTooLarge, InvalidParameter, QuotaExceeded
from graft_shared.ids import new_file_id
from graft_shared.logs import log_event
from graft_shared.rows import check_lines, lines_of
from graft_shared.store import StoredFile, Upload

FORM_OVERHEAD_BYTES = 16_384  # boundaries and part headers around the file
MAX_FILENAME = 255

logger = logging.getLogger(__name__)


async def receive(request: Request, tenant: str, here: Neighbours) -> StoredFile:
    """Take the file of a multipart request.

    Raises:
        FileTooLarge: As soon as it is known.
        MalformedBody, UnknownParameter, InvalidParameter: The form is not the one that is wanted, or the file's name.
        InvalidTrainingFile: A line that cannot be trained on.
        QuotaExceeded: The tenant has no room for it; where its length is declared, before it is read.
        UploadDiskFull: The API has none.
    """
    limit = here.settings.max_file_bytes
    await run_in_threadpool(here.files.require_room, tenant, _declared(request))
    # Without a name on disk (Linux: O_TMPFILE), nothing can be left behind, however this process ends.
    with room_needed(), await run_in_threadpool(scratch_file, here) as scratch:
        form = FileForm(request.headers.get("content-type", ""), scratch)
        too_large = FileTooLarge(limit_bytes=limit)
        async for chunk in limited(request, limit + FORM_OVERHEAD_BYTES, too_large):
            await run_in_threadpool(form.feed, chunk)
        filename = form.finish()
        if scratch.tell() > limit:
            raise too_large
        return await run_in_threadpool(_store, scratch, filename, tenant, here)


def _declared(request: Request) -> int:
    """The least size that the file can have, by what the request says of itself."""
    declared = request.headers.get("content-length", "")
    return max(1, int(declared) - FORM_OVERHEAD_BYTES) if declared.isdigit() else 1


@contextmanager
def room_needed() -> Iterator[None]:
    """Raise UploadDiskFull where the disk is; around a scratch file, which may write once more when it is closed."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UploadDiskFull from error
        raise


def scratch_file(here: Neighbours) -> BinaryIO:
    """An empty file without a name, for what comes in."""
    folder = here.settings.upload_dir
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryFile(dir=folder)


def _store(scratch: BinaryIO, filename: str, tenant: str, here: Neighbours) -> StoredFile:
    return keep(scratch, safe_name(filename, param="file"), tenant, here)


def keep(scratch: BinaryIO, name: str, tenant: str, here: Neighbours, *, upload: Upload | None = None) -> StoredFile:
    """Check what has come, and make a file of it.

    Args:
        upload: Of what came through a link.

    Raises:
        InvalidTrainingFile: A line that cannot be trained on.
        UploadNotFound: The upload has become a file meanwhile.
    """
    scratch.flush()
    scratch.seek(0)
    report = check_lines(lines_of(scratch))
    file_id = new_file_id()
    path = Path(f"/proc/self/fd/{scratch.fileno()}")  # a name for the nameless, as open() takes it
    key = file_key(tenant, file_id)
    here.files.announce(key)
    stored = here.bucket.put_file(key, path)
    found = report.to_dict()
    try:
        file = here.files.add(id=file_id, tenant=tenant, filename=name, object=stored, report=found, upload=upload)
    except QuotaExceeded:
        here.files.give_up(key)
        raise
    log_event(logger, "file_stored", file_id=file.id, tenant=tenant, rows=report.rows, bytes=stored.size)
    return file


def safe_name(filename: str, *, param: str) -> str:
    """The last part of the name that the client gave.

    Raises:
        InvalidParameter: It holds control characters or climbs; no file's own name does.
    """
    parts = filename.replace("\\", "/").split("/")
    if ".." in parts or re.search(r"[\x00-\x1f\x7f]", filename):
        raise InvalidParameter(param=param, reason="a file's name holds no control characters and no '..'")
    return parts[-1][:MAX_FILENAME] or "upload.jsonl"

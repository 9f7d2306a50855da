"""Uploaded files: what is known of them; their bytes lie in the bucket.

Bytes are announced before they are written, so that those that never got a row are known and can be removed. So are
those that a client sends to the bucket itself, through a link: what comes there stays an upload, and what was checked
of it becomes an object and a file of its own, that nobody has a link to.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Select, and_, delete, insert, or_, select, update
from sqlalchemy.engine import Connection, RowMapping

from graft_shared.errors import FileInUse, FileNotFound, UploadExpired, UploadNotFound
from graft_shared.jobs import JobState, Stage, StoredObject
from graft_shared.store.engine import Database, as_datetime, now
from graft_shared.store.quotas import NO_QUOTAS, Quotas, require_room
from graft_shared.store.tables import files, jobs, uploads
from graft_shared.store.uploads import is_lost


class Order(StrEnum):
    """Which of a tenant's files comes first: the oldest or the newest."""

    ASC = "asc"
    DESC = "desc"


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """One uploaded file, checked line by line before it got its row."""

    id: str
    tenant: str
    filename: str
    object: StoredObject
    report: dict[str, Any]
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A file that a client sends to the bucket itself, as it was announced."""

    id: str
    tenant: str
    filename: str
    object: StoredObject
    file_id: str | None = None  # of the file that it became


class Files:
    """Files as their tenants see them; `quotas` are those of a tenant that has none of its own."""

    def __init__(self, database: Database, quotas: Quotas = NO_QUOTAS) -> None:
        self._database = database
        self._quotas = quotas

    def require_room(self, tenant: str, size: int) -> None:
        """See that a file has room before its bytes are taken; `add` makes sure of it.

        Raises:
            QuotaExceeded: It would be more than the tenant may store.
        """
        with self._database.reading() as connection:
            require_room(connection, tenant, size, self._quotas, about_to_add=False)

    def announce(self, key: str) -> None:
        """Say that bytes are about to be written under this key."""
        with self._database.writing() as connection:
            connection.execute(insert(uploads).values(key=key, started_at=now()))

    def await_upload(self, upload: Upload) -> None:
        """Say that a client was given a link to write these bytes.

        Raises:
            QuotaExceeded: They would be more than the tenant may store.
        """
        values = {
            "id": upload.id,
            "tenant": upload.tenant,
            "filename": upload.filename,
            "key": upload.object.key,
            "bytes": upload.object.size,
            "sha256": upload.object.sha256,
        }
        with self._database.writing() as connection:
            require_room(connection, upload.tenant, upload.object.size, self._quotas, about_to_add=True)
            connection.execute(insert(uploads).values(**values, started_at=now()))

    def awaited(self, tenant: str, upload_id: str) -> Upload:
        """Return an upload that was announced less than `UPLOAD_LIFE` ago.

        Raises:
            UploadNotFound: There is none, or it is another tenant's.
        """
        query = select(uploads).where(uploads.c.tenant == tenant, uploads.c.id == upload_id, ~is_lost())
        with self._database.reading() as connection:
            row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise UploadNotFound(upload_id=upload_id)
        return Upload(
            id=row["id"],
            tenant=row["tenant"],
            filename=row["filename"],
            object=StoredObject(key=row["key"], size=row["bytes"], sha256=row["sha256"]),
            file_id=row["file_id"],
        )

    def add(
        self,
        *,
        id: str,
        tenant: str,
        filename: str,
        object: StoredObject,
        report: dict[str, Any],
        upload: Upload | None = None,
    ) -> StoredFile:
        """Record a file whose bytes were announced and are in the bucket now.

        Args:
            upload: What it came from; it becomes one file, however often it is completed.

        Raises:
            UploadExpired: They were announced longer than `UPLOAD_LIFE` ago, or not at all, and may be gone.
            QuotaExceeded: It would be more than the tenant may store; `give_up` its bytes.
            UploadNotFound: The upload is too old, or has become a file already.
        """
        with self._database.writing() as connection:
            came_through = upload.id if upload is not None else None
            require_room(connection, tenant, object.size, self._quotas, about_to_add=True, upload_id=came_through)
            if upload is not None:
                this = and_(uploads.c.id == upload.id, uploads.c.file_id.is_(None), ~is_lost())
                if not connection.execute(update(uploads).where(this).values(file_id=id)).rowcount:
                    raise UploadNotFound(upload_id=upload.id)
            announced = delete(uploads).where(uploads.c.key == object.key, ~is_lost())
            if not connection.execute(announced).rowcount:
                raise UploadExpired(file_id=id)
            added = (
                insert(files)
                .values(
                    id=id,
                    tenant=tenant,
                    filename=filename,
                    key=object.key,
                    bytes=object.size,
                    sha256=object.sha256,
                    report=report,
                    created_at=now(),
                )
                .returning(files)
            )
            return _file_from(connection.execute(added).mappings().one())

    def lost_uploads(self, *, limit: int) -> list[str]:
        """Keys that were announced longer than `UPLOAD_LIFE` ago and never got their row; none can get one now."""
        with self._database.reading() as connection:
            return list(connection.execute(select(uploads.c.key).where(is_lost()).limit(limit)).scalars())

    def give_up(self, key: str) -> None:
        """Say that announced bytes will get no row, so that a sweeper removes them soon."""
        with self._database.writing() as connection:
            connection.execute(update(uploads).where(uploads.c.key == key).values(started_at=0.0))

    def forget_upload(self, key: str) -> None:
        """Say that nothing lies under a lost upload's key any more."""
        with self._database.writing() as connection:
            connection.execute(delete(uploads).where(uploads.c.key == key))

    def get(self, tenant: str, file_id: str) -> StoredFile:
        """Return one file.

        Raises:
            FileNotFound: No such file, or another tenant's.
        """
        with self._database.reading() as connection:
            return _file_from(_row(connection, tenant, file_id))

    def delete(self, tenant: str, file_id: str) -> None:
        """Forget a file that no job needs any more. A job needs it until its data is prepared.

        What is left is a lost upload, so that a sweeper removes the bytes: whoever dies before that leaves its note.

        Raises:
            FileNotFound: No such file, or another tenant's.
            FileInUse: A job that waits or runs has not prepared its data from it yet.
        """
        with self._database.writing() as connection:
            row = _row(connection, tenant, file_id, lock=True)
            reader = connection.execute(_readers(tenant, file_id)).scalar_one_or_none()
            if reader is not None:
                raise FileInUse(file_id=file_id, job_id=reader)
            connection.execute(delete(files).where(files.c.id == file_id))
            connection.execute(insert(uploads).values(key=row["key"], started_at=0.0))

    def list(
        self, tenant: str, *, after: str | None = None, limit: int = 20, order: Order = Order.DESC
    ) -> tuple[list[StoredFile], bool]:
        """Return one page of files in this order, and whether there are more.

        Raises:
            FileNotFound: `after` is no file of this tenant.
        """
        query = select(files).where(files.c.tenant == tenant)
        if after is not None:
            self.get(tenant, after)
            last = files.alias()
            moment = select(last.c.created_at).where(last.c.id == after).scalar_subquery()
            same_moment = files.c.created_at == moment
            if order is Order.DESC:
                query = query.where(or_(files.c.created_at < moment, and_(same_moment, files.c.id < after)))
            else:
                query = query.where(or_(files.c.created_at > moment, and_(same_moment, files.c.id > after)))
        by = (files.c.created_at, files.c.id)
        query = query.order_by(*(column.desc() if order is Order.DESC else column for column in by)).limit(limit + 1)
        with self._database.reading() as connection:
            page = connection.execute(query).mappings().all()
        return [_file_from(row) for row in page[:limit]], len(page) > limit


def _row(connection: Connection, tenant: str, file_id: str, *, lock: bool = False) -> RowMapping:
    query = select(files).where(files.c.tenant == tenant, files.c.id == file_id)
    row = connection.execute(query.with_for_update() if lock else query).mappings().one_or_none()
    if row is None:
        raise FileNotFound(file_id=file_id)
    return row


def _readers(tenant: str, file_id: str) -> Select[str]:
    """The oldest job that has yet to prepare its data from this file."""
    named = [jobs.c.spec[(part, "file")].as_string() == file_id for part in ("dataset", "validation")]
    alive = jobs.c.state.in_([JobState.QUEUED.value, JobState.RUNNING.value])
    unprepared = and_(jobs.c.tenant == tenant, alive, jobs.c.stage == Stage.PREPARE.value)
    return select(jobs.c.id).where(unprepared, or_(*named)).order_by(jobs.c.created_at).limit(1)


def _file_from(row: RowMapping) -> StoredFile:
    return StoredFile(
        id=row["id"],
        tenant=row["tenant"],
        filename=row["filename"],
        object=StoredObject(key=row["key"], size=row["bytes"], sha256=row["sha256"]),
        report=row["report"],
        created_at=as_datetime(row["created_at"]),
    )

"""Uploaded files: what is known of them; their bytes lie in the bucket."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import and_, insert, or_, select
from sqlalchemy.engine import RowMapping

from graft_shared.errors import FileNotFound
from graft_shared.jobs import StoredObject
from graft_shared.store.engine import Database, as_datetime, now
from graft_shared.store.tables import files


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """One uploaded file, checked line by line before it got its row."""

    id: str
    tenant: str
    filename: str
    object: StoredObject
    report: dict[str, Any]
    created_at: datetime


class Files:
    """Files as their tenants see them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, *, id: str, tenant: str, filename: str, object: StoredObject, report: dict[str, Any]) -> StoredFile:
        """Record a file whose bytes are in the bucket."""
        with self._database.writing() as connection:
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

    def get(self, tenant: str, file_id: str) -> StoredFile:
        """Return one file.

        Raises:
            FileNotFound: No such file, or another tenant's.
        """
        with self._database.reading() as connection:
            query = select(files).where(files.c.tenant == tenant, files.c.id == file_id)
            row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise FileNotFound(file_id=file_id)
        return _file_from(row)

    def list(self, tenant: str, *, after: str | None = None, limit: int = 20) -> tuple[list[StoredFile], bool]:
        """Return one page of files, newest first, and whether there are more.

        Raises:
            FileNotFound: `after` is no file of this tenant.
        """
        query = select(files).where(files.c.tenant == tenant)
        if after is not None:
            self.get(tenant, after)
            last = files.alias()
            moment = select(last.c.created_at).where(last.c.id == after).scalar_subquery()
            query = query.where(
                or_(files.c.created_at < moment, and_(files.c.created_at == moment, files.c.id < after))
            )
        query = query.order_by(files.c.created_at.desc(), files.c.id.desc()).limit(limit + 1)
        with self._database.reading() as connection:
            page = connection.execute(query).mappings().all()
        return [_file_from(row) for row in page[:limit]], len(page) > limit


def _file_from(row: RowMapping) -> StoredFile:
    return StoredFile(
        id=row["id"],
        tenant=row["tenant"],
        filename=row["filename"],
        object=StoredObject(key=row["key"], size=row["bytes"], sha256=row["sha256"]),
        report=row["report"],
        created_at=as_datetime(row["created_at"]),
    )

"""Keys of the API: whose each is and what it may do. A key itself is nowhere; its digest is what is kept."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import and_, func, insert, or_, select, update
from sqlalchemy.engine import RowMapping

from graft_shared.errors import KeyNotFound
from graft_shared.store.engine import Database, as_datetime, now
from graft_shared.store.tables import api_keys


@dataclass(frozen=True, kw_only=True)
class StoredKey:
    """What is known of one key."""

    id: str
    tenant: str
    digest: str
    scopes: tuple[str, ...]
    name: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None


class Keys:
    """Keys as the operator sees them, and the API that is shown one."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self, *, id: str, tenant: str, digest: str, scopes: Sequence[str], name: str, life: timedelta | None
    ) -> StoredKey:
        """Record a key; without a `life` it holds until it is revoked."""
        values = {"id": id, "tenant": tenant, "digest": digest, "scopes": list(scopes), "name": name}
        expires_at = now() + life.total_seconds() if life is not None else None
        added = insert(api_keys).values(**values, created_at=now(), expires_at=expires_at).returning(api_keys)
        with self._database.writing() as connection:
            return _key_from(connection.execute(added).mappings().one())

    def live(self) -> list[StoredKey]:
        """Those that are neither revoked nor expired, by the database's clock."""
        in_force = and_(api_keys.c.revoked_at.is_(None), or_(api_keys.c.expires_at.is_(None), _EXPIRES_LATER))
        with self._database.reading() as connection:
            return [_key_from(row) for row in connection.execute(select(api_keys).where(in_force)).mappings()]

    def any(self) -> bool:
        """Whether there has ever been one."""
        with self._database.reading() as connection:
            return bool(connection.execute(select(func.count()).select_from(api_keys)).scalar_one())

    def revoke(self, key_id: str) -> StoredKey:
        """End a key for good; one that was revoked stays as it is.

        Raises:
            KeyNotFound: There is none of this id.
        """
        revoked_at = func.coalesce(api_keys.c.revoked_at, now())
        revoked = update(api_keys).where(api_keys.c.id == key_id).values(revoked_at=revoked_at).returning(api_keys)
        with self._database.writing() as connection:
            row = connection.execute(revoked).mappings().one_or_none()
        if row is None:
            raise KeyNotFound(key_id=key_id)
        return _key_from(row)

    def mark_used(self, key_ids: Collection[str]) -> None:
        """Say that these were used just now."""
        with self._database.writing() as connection:
            connection.execute(update(api_keys).where(api_keys.c.id.in_(sorted(key_ids))).values(last_used_at=now()))

    def list(self) -> list[StoredKey]:
        """Every key that was ever made, by tenant, the oldest first."""
        query = select(api_keys).order_by(api_keys.c.tenant, api_keys.c.created_at, api_keys.c.id)
        with self._database.reading() as connection:
            return [_key_from(row) for row in connection.execute(query).mappings()]


_EXPIRES_LATER = api_keys.c.expires_at > now()


def _key_from(row: RowMapping) -> StoredKey:
    moments = {
        name: as_datetime(row[name]) if row[name] is not None else None
        for name in ("expires_at", "revoked_at", "last_used_at")
    }
    return StoredKey(
        id=row["id"],
        tenant=row["tenant"],
        digest=row["digest"],
        scopes=tuple(row["scopes"]),
        name=row["name"],
        created_at=as_datetime(row["created_at"]),
        **moments,
    )

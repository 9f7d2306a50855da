"""Tenants as the operator sees them: what each may have, and what it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import delete, insert, literal, select, union
from sqlalchemy.engine import Connection

from graft_shared.jobs import Stage
from graft_shared.store.engine import Database, one_at_a_time
from graft_shared.store.quotas import Quotas, Standing, count_stored_bytes, count_waiting, quotas_of
from graft_shared.store.tables import api_keys, files, jobs, tenants, worker_time


@dataclass(frozen=True, kw_only=True)
class TenantUse:
    """One tenant: its quotas in force, its share of the workers, and what it has now."""

    name: str
    quotas: Quotas
    share: float
    queued_jobs: int
    running_jobs: int
    gpu_hours: float  # this month
    stored_bytes: int


class Tenants:
    """What the operator has said of tenants; `quotas` are those of one of which nothing was said."""

    def __init__(self, database: Database, quotas: Quotas) -> None:
        self._database = database
        self._quotas = quotas

    def set(self, name: str, changes: Mapping[str, float | None]) -> TenantUse:
        """Change a tenant's share or some of its quotas; None gives one back to the default. In force at once.

        Args:
            changes: By the names of the table's columns.
        """
        with self._database.writing() as connection:
            one_at_a_time(connection, "tenants")
            row = connection.execute(select(tenants).where(tenants.c.name == name)).mappings().one_or_none()
            values = {"name": name, "share": 1.0, **(row or {}), **changes}
            connection.execute(delete(tenants).where(tenants.c.name == name))
            connection.execute(insert(tenants).values(values))
            return self._use(connection, name)

    def get(self, name: str) -> TenantUse:
        """One tenant; a name that nobody has used is one that has nothing."""
        with self._database.reading() as connection:
            return self._use(connection, name)

    def list(self) -> list[TenantUse]:
        """Everybody of whom there is anything, by name."""
        sources = (tenants.c.name, jobs.c.tenant, files.c.tenant, api_keys.c.tenant, worker_time.c.tenant)
        with self._database.reading() as connection:
            names = sorted(connection.execute(union(*(select(source) for source in sources))).scalars())
            return [self._use(connection, name) for name in names]

    def _use(self, connection: Connection, name: str) -> TenantUse:
        of_training = Standing(Stage.TRAIN, self._quotas)
        one = select(literal(name, tenants.c.name.type).label("tenant")).subquery("one")
        query = select(of_training.runs, of_training.this_month, of_training.share)
        runs, seconds, share = connection.execute(query.select_from(of_training.beside(one))).one()
        return TenantUse(
            name=name,
            quotas=quotas_of(connection, name, self._quotas),
            share=share,
            queued_jobs=connection.execute(count_waiting(name)).scalar_one(),
            running_jobs=runs,
            gpu_hours=seconds / 3600,
            stored_bytes=int(connection.execute(count_stored_bytes(name)).scalar_one()),
        )

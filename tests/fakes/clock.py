"""A clock for the store that stands still until the test moves it, on SQLite and on PostgreSQL.

The store asks the database for the time, by the functions `julianday` and `clock_timestamp`: those are what is faked,
so that no line of the store knows of it.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from sqlalchemy import event, text
from sqlalchemy.engine import Connection

from graft_shared.store import Database, open_database
from graft_shared.store.migrate import migrate

TICK_SECONDS = 1 / 64  # far above what a Julian day can tell apart, 40 µs, and far below any time of the store

_FAKED = """
create schema faked;
create function faked.clock_timestamp() returns timestamptz language sql as
    $$ select to_timestamp(current_setting('faked.now')::double precision) $$
"""


@dataclass
class FakeClock:
    """The time of every database that was opened with it, Unix seconds."""

    now: float = 1_800_000_000.0

    def tick(self) -> None:
        """Let the shortest time pass."""
        self.now += TICK_SECONDS

    def open_sqlite(self) -> Database:
        """A migrated database in memory; for one thread."""
        database = open_database("sqlite://")
        event.listen(database.engine, "connect", self._fake_julianday)
        migrate(database)
        return database

    def open_postgres(self, url: str) -> Database:
        """An empty database of a server, migrated."""
        database = open_database(url)
        migrate(database)
        with database.writing() as connection:
            connection.execute(text(_FAKED))
        event.listen(database.engine, "begin", self._fake_clock_timestamp)
        return database

    def _fake_julianday(self, connection: sqlite3.Connection, _record: object) -> None:
        connection.create_function("julianday", 1, lambda _: self.now / 86400 + 2440587.5)

    def _fake_clock_timestamp(self, connection: Connection) -> None:
        # Of the session: a look has no transaction that would hold them. Whoever begins sets them anew.
        connection.exec_driver_sql(f"select set_config('faked.now', '{self.now!r}', false)")
        connection.exec_driver_sql("set search_path = faked, pg_catalog, public")

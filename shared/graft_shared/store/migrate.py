"""`python -m graft_shared.store.migrate`: bring the database to this version's tables; harmless when it is there."""

from __future__ import annotations

import logging
import sys
import time
from datetime import timedelta
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import bindparam, text

from graft_shared.errors import StoreUnavailable
from graft_shared.logs import configure_logging, log_event
from graft_shared.settings import SharedSettings
from graft_shared.store.engine import Database, open_database, wait_at_most
from graft_shared.store.tables import metadata

_LOCK = 0x67726166  # "graf": the advisory lock that lets one of many starting processes migrate
_LOCK_WAIT_SECONDS = 2  # that a migration stands in line for a table: behind it every query stands, too
_PAUSE_SECONDS = 3.0  # in which these go on
_IN_THE_WAY = ("55P03", "40P01")  # PostgreSQL: a lock was not to be had in time, or only by a deadlock
PATIENCE = timedelta(minutes=8)  # the chart gives its Job ten

logger = logging.getLogger(__name__)


class MigrationMissing(Exception):
    """The tables are not this version's; `is_newer` where they are a later version's."""

    def __init__(self, message: str, *, is_newer: bool) -> None:
        super().__init__(message)
        self.is_newer = is_newer


class MigrationBlocked(Exception):
    """Others held the tables for as long as was waited for them; nothing was changed."""


def check_migrations(database: Database) -> str:
    """Return the newest migration, which this database has.

    Raises:
        MigrationMissing: It has not, and which it lacks; or it has one that this version does not know.
    """
    scripts = ScriptDirectory.from_config(_config())
    known = [script.revision for script in scripts.walk_revisions()][::-1]
    with database.reading() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
    if current is not None and current not in known:
        raise MigrationMissing(f"the database is at {current}, this version ends with {known[-1]}", is_newer=True)
    lacking = known[known.index(current) + 1 :] if current is not None else known
    if lacking:
        at = f"at {current}" if current is not None else "empty"
        raise MigrationMissing(f"the database is {at} and lacks {', '.join(lacking)}", is_newer=False)
    return known[-1]


def migrate(database: Database, *, patience: timedelta = PATIENCE) -> None:
    """Run every migration that this database lacks, in one transaction; several processes may ask at once.

    Who has read a table keeps it from being changed until his transaction ends, as a pg_dump does for its whole time.

    Raises:
        MigrationBlocked: That took longer than `patience`.
    """
    give_up_at = time.monotonic() + patience.total_seconds()
    while True:
        try:
            return _migrate(database)
        except StoreUnavailable as error:
            if getattr(getattr(error.__cause__, "orig", None), "sqlstate", None) not in _IN_THE_WAY:
                raise
            holder = _holder(database)
            if time.monotonic() >= give_up_at:
                raise MigrationBlocked(
                    f"For {patience.total_seconds():.0f} s the tables could not be changed: {holder} has one in use. "
                    "Nothing was changed. Let it end, or end it with pg_terminate_backend, then migrate again."
                ) from error
        log_event(logger, "migration_postponed", level=logging.WARNING, held_by=holder)
        time.sleep(_PAUSE_SECONDS)


def _migrate(database: Database) -> None:
    config = _config()
    with database.writing() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("select pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
            wait_at_most(connection, _LOCK_WAIT_SECONDS)
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _holder(database: Database) -> str:
    """Who has had one of the tables in use for longest, in PostgreSQL's words."""
    asked = text(
        "select a.pid, coalesce(nullif(a.application_name, ''), a.backend_type, '?') as program, a.usename as role"
        " from pg_locks l join pg_class c on c.oid = l.relation join pg_stat_activity a on a.pid = l.pid"
        " where a.datname = current_database() and c.relname in :tables and l.granted and a.pid <> pg_backend_pid()"
        " order by a.xact_start limit 1"
    ).bindparams(bindparam("tables", expanding=True))
    with database.reading() as connection:
        found = connection.execute(asked, {"tables": list(metadata.tables)}).one_or_none()
    return f"process {found.pid} ({found.program}, role {found.role})" if found else "somebody who is gone by now"


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def main() -> None:
    """Migrate the configured database."""
    settings = SharedSettings()
    configure_logging(settings.log_format)
    database = open_database(settings.database, answers_within=None)  # a table is as large as it is
    try:
        migrate(database)
    except MigrationBlocked as error:
        sys.exit(f"error: {error}")
    log_event(logger, "database_migrated", backend=database.engine.dialect.name)
    database.close()


if __name__ == "__main__":
    main()

"""`python -m graft_shared.store.migrate`: bring the database to this version's tables; harmless when it is there."""

from __future__ import annotations

import logging
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

from graft_shared.logs import configure_logging, log_event
from graft_shared.settings import SharedSettings
from graft_shared.store.engine import Database, open_database

_LOCK = 0x67726166  # "graf": the advisory lock that lets one of many starting processes migrate

logger = logging.getLogger(__name__)


class MigrationMissing(Exception):
    """The tables are not this version's; `is_newer` where they are a later version's."""

    def __init__(self, message: str, *, is_newer: bool) -> None:
        super().__init__(message)
        self.is_newer = is_newer


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


def migrate(database: Database) -> None:
    """Run every migration that this database lacks, in one transaction; several processes may ask at once."""
    config = _config()
    with database.writing() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("select pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def main() -> None:
    """Migrate the configured database."""
    settings = SharedSettings()
    configure_logging(settings.log_format)
    database = open_database(settings.database)
    migrate(database)
    log_event(logger, "database_migrated", backend=database.engine.dialect.name)
    database.close()


if __name__ == "__main__":
    main()

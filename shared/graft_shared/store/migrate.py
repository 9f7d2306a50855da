"""`python -m graft_shared.store.migrate`: bring the database to this version's tables; harmless when it is there."""

from __future__ import annotations

import logging
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import text

from graft_shared.logs import configure_logging, log_event
from graft_shared.settings import SharedSettings
from graft_shared.store.engine import Database, open_database

_LOCK = 0x67726166  # "graf": the advisory lock that lets one of many starting processes migrate

logger = logging.getLogger(__name__)


def migrate(database: Database) -> None:
    """Run every migration that this database lacks, in one transaction; several processes may ask at once."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with database.writing() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("select pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


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

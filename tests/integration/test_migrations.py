"""The tables change while the version before still runs: a migration may only add what that version can do without."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text

import graft_shared.store.migrate as migrating
from graft_shared.store import Database, open_database
from tests.waiting import wait_until


def config(database: Database, connection: Any) -> Config:
    made = Config()
    made.set_main_option("script_location", str(Path(migrating.__file__).parent / "migrations"))
    made.attributes["connection"] = connection
    return made


def columns(connection: Any) -> dict[tuple[str, str], tuple[str, bool, bool]]:
    """Type, whether null is allowed, and whether there is a default, of every column."""
    asked = inspect(connection)
    return {
        (table, column["name"]): (str(column["type"]), column["nullable"], column["default"] is not None)
        for table in asked.get_table_names()
        if table != "alembic_version"
        for column in asked.get_columns(table)
    }


def unique(connection: Any) -> set[tuple[str, tuple[str, ...]]]:
    """The columns that together may not be the same twice."""
    asked = inspect(connection)
    return {
        (table, tuple(each["column_names"]))
        for table in asked.get_table_names()
        for each in (*asked.get_unique_constraints(table), *asked.get_indexes(table))
        if each.get("unique", True)
    }


def test_what_the_version_before_reads_and_writes_is_still_there(empty_database: Database) -> None:
    before: dict[tuple[str, str], tuple[str, bool, bool]] = {}
    unique_before: set[tuple[str, tuple[str, ...]]] = set()
    scripts = Path(migrating.__file__).parent / "migrations"
    revisions = [script.revision for script in ScriptDirectory(str(scripts)).walk_revisions()][::-1]
    assert len(revisions) >= 10
    for revision in revisions:
        with empty_database.writing() as connection:
            command.upgrade(config(empty_database, connection), revision)
        with empty_database.reading() as connection:
            after, unique_after = columns(connection), unique(connection)
        assert {name: after.get(name) for name in before} == before, revision
        tables_before = {table for table, _ in before}
        for (table, name), (_, nullable, has_default) in after.items():
            if table in tables_before and (table, name) not in before:
                assert nullable or has_default, f"{revision}: rows of the version before have no {table}.{name}"
        for table, names in unique_after - unique_before:
            if table in tables_before:
                assert not any((table, name) in before for name in names), f"{revision}: {table} {names}"
        before, unique_before = after, unique_after


@pytest.fixture
def earlier(postgres_url: str) -> Iterator[Database]:
    """A database of an earlier version, on PostgreSQL: SQLite's readers see the tables as they were."""
    database = open_database(postgres_url + "?application_name=nightly_dump")
    with database.writing() as connection:
        command.upgrade(config(database, connection), "0001")
    yield database
    database.close()


def test_a_migration_waits_for_who_reads_a_table_and_nobody_waits_for_long_behind_it(earlier: Database) -> None:
    count, read = text("select count(*) from jobs"), 0
    with ThreadPoolExecutor(1) as pool:
        with earlier.engine.begin() as dump, earlier.engine.connect() as reader:
            dump.execute(count)  # holds ACCESS SHARE until it ends, as pg_dump does
            migrating_now = pool.submit(migrating.migrate, earlier)
            reader.execute(text("set statement_timeout = '3s'"))
            reader.commit()
            wait_until(lambda: _waits_for_a_table(reader), what="the migration in line")
            while read < 100 or _waits_for_a_table(reader):
                reader.execute(count)
                reader.commit()
                read += 1
            assert not migrating_now.done()
        migrating_now.result(timeout=30)
    assert migrating.check_migrations(earlier)


def test_a_migration_that_meets_a_deadlock_is_tried_again(earlier: Database) -> None:
    with ThreadPoolExecutor(1) as pool:
        with earlier.engine.begin() as reader, earlier.engine.connect() as looker:
            reader.execute(text("set local deadlock_timeout = '60s'"))  # so that the migration is the one who notices
            reader.execute(text("select count(*) from jobs"))
            migrating_now = pool.submit(migrating.migrate, earlier)
            wait_until(lambda: _waits_for_a_table(looker), what="the migration in line")
            reader.execute(text("select count(*) from workers"))
        migrating_now.result(timeout=60)
    assert migrating.check_migrations(earlier)


def test_a_migration_that_cannot_have_its_tables_says_who_has_them(earlier: Database) -> None:
    with earlier.engine.begin() as dump:
        dump.execute(text("select count(*) from jobs"))
        pid = dump.execute(text("select pg_backend_pid()")).scalar_one()
        with pytest.raises(migrating.MigrationBlocked, match=rf"process {pid} \(nightly_dump, role graft\)"):
            migrating.migrate(earlier, patience=timedelta(0))
    with pytest.raises(migrating.MigrationMissing, match="at 0001"):
        migrating.check_migrations(earlier)


def _waits_for_a_table(connection: Any) -> bool:
    waiting = connection.execute(text("select count(*) from pg_locks where not granted and locktype = 'relation'"))
    connection.commit()
    return bool(waiting.scalar_one())

"""The tables change while the version before still runs: a migration may only add what that version can do without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import inspect

import graft_shared.store.migrate as migrating
from graft_shared.store import Database


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

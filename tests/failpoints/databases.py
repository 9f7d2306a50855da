"""A database for each trial, copied from a migrated one, behind an engine whose statements are compiled already."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import psycopg
from sqlalchemy import URL, event, make_url

from graft_shared.jobs import Checkpoint, Failure, FailureReason, Phase, Stage, StoredObject
from graft_shared.store import Database, Jobs, Leases, Workers, open_database, postgres
from graft_shared.store.migrate import migrate
from tests.servers import PostgresServer
from tests.store_factories import a_beat, a_new_job


class Databases(Protocol):
    """Where the trials' databases come from."""

    def create(self, folder: Path) -> str:
        """A migrated database for a trial in this folder; returns its URL."""

    def drop(self, folder: Path) -> None:
        """Remove it again."""


@dataclass(frozen=True)
class SqliteFiles:
    """A file in the trial's folder."""

    template: Path

    def create(self, folder: Path) -> str:
        shutil.copy(self.template, folder / "graft.db")
        return f"sqlite:///{folder / 'graft.db'}"

    def drop(self, folder: Path) -> None:
        """The folder goes, and the file with it."""


@dataclass(frozen=True)
class PostgresDatabases:
    """A database of one server, named as the trial's folder."""

    template_url: str

    def create(self, folder: Path) -> str:
        self._execute(f'create database "{folder.name}" template "{self._template}"')
        return self.template_url.replace(self._template, folder.name)

    def drop(self, folder: Path) -> None:
        self._execute(f'drop database "{folder.name}" with (force)')

    @property
    def _template(self) -> str:
        return self.template_url.rpartition("/")[2]

    def _execute(self, statement: str) -> None:
        server = self.template_url.replace("+psycopg", "").replace(self._template, "postgres")
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(statement.encode())


@contextmanager
def databases(kind: str, folder: Path) -> Iterator[Databases]:
    """Those of this kind; a server is started for them if they need one."""
    if kind == "sqlite":
        made = SqliteFiles(folder / "template.db")
        _migrate(f"sqlite:///{made.template}")
        yield made
        return
    server = PostgresServer(folder / "postgres").start()
    try:
        url = server.new_database("graft_template")
        _migrate(url)
        yield PostgresDatabases(url)
    finally:
        server.stop()


def open_warm(url: str) -> Database:
    """Open a database by the one engine of this process and of those that it forks.

    It keeps its compiled statements, which take longer to make than most trials compute; so an engine may be pointed
    at another database of its kind, and whoever forks has to have closed it.
    """
    wanted = make_url(url)
    _TARGET["database"] = str(wanted.database)
    return _engine_of(wanted.set(database="another"))


def warm_up(databases: Databases, folder: Path) -> None:
    """Compile what trials will say, by bringing some jobs to their ends."""
    folder.mkdir()
    database = open_warm(databases.create(folder))
    jobs, leases, workers = Jobs(database), Leases(database, timedelta(seconds=60)), Workers(database)
    workers.beat(**a_beat(stages=tuple(Stage)))
    for ends_well in (True, False):
        job_id = jobs.submit(a_new_job())[0].id
        leases.mark_rung(job_id)
        leases.release_expired()
        leases.release_of("w/train", "here")
        leases.take_lost_bells(timedelta(0), workers.idle())
        _live(leases, ends_well=ends_well)
        jobs.events("default", job_id)
    database.close()
    databases.drop(folder)


def _live(leases: Leases, *, ends_well: bool) -> None:
    prepared = leases.claim("w/prepare", stage=Stage.PREPARE, gpu_classes=("cpu",))
    assert prepared is not None
    leases.hand_to_training(prepared.id, prepared.epoch, {"report": {}})
    job = leases.claim("w/train", stage=Stage.TRAIN, gpu_classes=("cpu",))
    assert job is not None
    mine: tuple[str, int] = (job.id, job.epoch)
    leases.renew(*mine)
    leases.orders(*mine)
    leases.record_phase(*mine, Phase.TRAINING)
    leases.record_warning(*mine, "code", "message")
    leases.record_progress(*mine, progress={}, metrics={}, steps=[{"step": 1}])
    stored = StoredObject(key="k", size=1, sha256="s")
    leases.commit_checkpoint(*mine, Checkpoint(step=1, epoch=job.epoch, object=stored))
    if ends_well:
        leases.settle_success(*mine, adapter={}, metrics={}, memory={})
    else:
        leases.settle_failure(*mine, Failure(reason=FailureReason.CRASH, message="m"))


_TARGET: dict[str, str] = {}


@functools.cache
def _engine_of(server: URL) -> Database:
    database = open_database(server.render_as_string(hide_password=False))

    if server.get_backend_name() == "sqlite":

        @event.listens_for(database.engine, "do_connect")
        def redirect(_dialect: Any, _record: Any, arguments: list[Any], _named: dict[str, Any]) -> None:
            arguments[0] = _TARGET["database"]

    else:  # no listener comes before the one that connects
        connect = postgres.connect
        postgres.connect = lambda *arguments, **named: connect(*arguments, **named | {"dbname": _TARGET["database"]})
    return database


def _migrate(url: str) -> None:
    database = open_database(url)
    migrate(database)
    database.close()

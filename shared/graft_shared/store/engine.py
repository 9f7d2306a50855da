"""One database, SQLite or PostgreSQL: how it is opened, its clock, and its transactions."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Double, ScalarSelect, create_engine, event, func, make_url, select, text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import (
    InterfaceError,
    InternalError,
    InvalidRequestError,
    OperationalError,
    ProgrammingError,
    TimeoutError,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import GenericFunction

from graft_shared.errors import StoreUnavailable
from graft_shared.store import postgres
from graft_shared.store.forks import GATE

BUSY_TIMEOUT_SECONDS = 30  # a SQLite writer waits this long for another; our transactions take milliseconds

# At most so many connections for a process, made when they are needed and kept: to make one takes longer than most of
# our transactions. By default five are kept, and under load the others are made and ended again and again.
POOL = {"pool_size": 15, "max_overflow": 0}


class now(GenericFunction[float]):  # noqa: N801 (reads as SQL)
    """The database's clock: Unix seconds, at the moment of evaluation."""

    type = Double()
    inherit_cache = True
    name = "graft_now"


@compiles(now, "sqlite")
def _now_sqlite(element: now, compiler: Any, **kw: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _now_postgresql(element: now, compiler: Any, **kw: Any) -> str:
    return "(extract(epoch from clock_timestamp())::double precision)"


def now_once() -> ScalarSelect[float]:
    """The same for conditions on many rows: a statement asks for it once, and PostgreSQL asks `now` for each row."""
    return select(now()).scalar_subquery()


class day_began(GenericFunction[float]):  # noqa: N801
    """The first second of the database's present day, UTC."""

    type = Double()
    inherit_cache = True
    name = "graft_day_began"


class month_began(GenericFunction[float]):  # noqa: N801
    """The first second of the database's present month, UTC."""

    type = Double()
    inherit_cache = True
    name = "graft_month_began"


@compiles(day_began, "sqlite")
@compiles(month_began, "sqlite")
def _began_sqlite(element: GenericFunction[float], compiler: Any, **kw: Any) -> str:
    unit = "day" if isinstance(element, day_began) else "month"
    return f"(strftime('%s', {compiler.process(now(), **kw)}, 'unixepoch', 'start of {unit}') * 1.0)"


@compiles(day_began, "postgresql")
@compiles(month_began, "postgresql")
def _began_postgresql(element: GenericFunction[float], compiler: Any, **kw: Any) -> str:
    unit = "day" if isinstance(element, day_began) else "month"
    return f"(extract(epoch from date_trunc('{unit}', clock_timestamp() at time zone 'utc'))::double precision)"


# PostgreSQL's transactions read what is committed when each statement begins: for looks they add two round trips only.
_LOOKS: dict[str, dict[str, Any]] = {
    "postgresql": {"isolation_level": "AUTOCOMMIT"},
    "sqlite": {"graft_read_only": True},
}


@dataclass(frozen=True)
class Database:
    """An opened database. Every foreign exception leaves as StoreUnavailable."""

    engine: Engine
    passage: Callable[[], AbstractContextManager[None]] = nullcontext  # that a transaction takes

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """One transaction that may write; on SQLite it takes the write lock at its start.

        Raises:
            StoreUnavailable: Nothing is kept; with the fact `in_commit` nobody can tell.
        """
        with _translated(), self.passage(), self._connect() as connection:
            connection.begin()
            yield connection
            try:
                with _translated(in_commit=True):
                    connection.commit()
            except BaseException:
                connection.rollback()  # else the pool keeps the connection with what it has locked
                raise

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A look: on SQLite at one moment and not in a writer's way, on PostgreSQL each statement at its own."""
        look = _LOOKS[self.engine.name]
        with _translated(), self.passage(), self._connect().execution_options(**look) as connection:
            yield connection

    def _connect(self) -> Connection:
        try:
            return self.engine.connect()
        except InvalidRequestError as error:  # the pool's word where one that it made anew is gone at once, too
            raise StoreUnavailable(reason=str(error)) from error

    def ping(self) -> None:
        """Raise StoreUnavailable unless the database answers and holds our tables."""
        try:
            with self.reading() as connection:
                connection.execute(text("select count(*) from jobs where 1 = 0"))
        except ProgrammingError as error:  # PostgreSQL's word for a missing table; SQLite's is OperationalError
            raise StoreUnavailable(reason=str(error.orig).strip().splitlines()[0]) from error

    def now(self) -> datetime:
        """The database's clock, UTC."""
        with self.reading() as connection:
            return as_datetime(connection.execute(select(now())).scalar_one())

    def close(self) -> None:
        """Give all connections back."""
        self.engine.dispose()


def open_database(url: str, *, answers_within: timedelta | None = postgres.ANSWERS_WITHIN) -> Database:
    """Open a database by its SQLAlchemy URL; connects lazily.

    Args:
        answers_within: How long PostgreSQL may take over one statement; None for any time.

    Raises:
        ValueError: The URL is neither SQLite nor PostgreSQL.
    """
    parsed = make_url(re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url))
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        pool = {}  # a database in memory has one of its own kind
        if parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
            pool = POOL
        engine = create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_SECONDS}, **pool)
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        if not parsed.database:
            return Database(engine)
        GATE.guard(engine)
        return Database(engine, GATE.passage)
    if backend == "postgresql":
        engine = create_engine(parsed, **POOL)
        event.listen(engine, "checkout", postgres.ask_in_doubt(engine.dialect))
        event.listen(engine, "do_connect", lambda _dialect, _record, a, b: postgres.connect(answers_within, *a, **b))
        return Database(engine)
    raise ValueError(f"GRAFT_DATABASE_URL names {backend!r}: use postgresql+psycopg://… or sqlite:///…")


def one_at_a_time(connection: Connection, name: str) -> None:
    """Let writing transactions that name the same thing wait for each other; SQLite's do so whatever they name."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))


def wait_at_most(connection: Connection, seconds: int) -> None:
    """Let this transaction wait so long for a lock, and then raise; SQLite has one lock, and it is short."""
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"set local lock_timeout = '{seconds}s'"))


def journal_mode(version: tuple[int, int, int] = sqlite3.sqlite_version_info) -> str:
    """The safe journal mode for a SQLite version.

    From 3.7.0 to 3.51.2 two connections can lose committed writes in WAL mode; fixed in 3.51.3, and in 3.50.7 and
    3.44.6 on their branches (SQLite's release notes).
    """
    fixed = version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51, 0) or (3, 44, 6) <= version < (3, 45, 0)
    return "WAL" if fixed else "DELETE"


def as_datetime(seconds: float) -> datetime:
    """A stored time as an aware UTC datetime."""
    return datetime.fromtimestamp(seconds, tz=UTC)


def _configure_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves
    for pragma in (f"journal_mode={journal_mode()}", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    read_only = connection.get_execution_options().get("graft_read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


@contextmanager
def _translated(**facts: Any) -> Iterator[None]:
    try:
        yield
    except (OperationalError, InternalError, InterfaceError, TimeoutError) as error:
        said = str(getattr(error, "orig", None) or error).strip() or type(error).__name__
        reason = said.splitlines()[0]
        raise StoreUnavailable(reason=reason, **facts) from error

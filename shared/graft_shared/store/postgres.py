"""Connections to PostgreSQL on which neither side waits for ever for the other, when that has vanished or hangs."""

from __future__ import annotations

import math
import select
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import psycopg
from psycopg.abc import PQGen
from sqlalchemy import Dialect
from sqlalchemy.exc import DisconnectionError, InvalidatePoolError

from graft_shared.clock import boottime

# That a transaction may stand still before it loses its locks, as that of a lost or frozen machine does; ours take
# milliseconds. So short that nobody's lease runs out behind them.
STILL_SECONDS = 15

# That an answer may take: longer than locks of a lost machine are waited for, and so short that behind it there is time
# to renew a lease over another connection.
ANSWERS_WITHIN = timedelta(seconds=20)

# A server that has vanished is given up by the kernel too, where an answer may take any time. In seconds, but for what
# was sent and is not acknowledged: milliseconds.
_SILENCE = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": 20_000,
}

# How long after its last answer a connection on which nothing has come is taken to be there still. Workers look once a
# second: to ask before each look whether anybody is there makes looking nearly twice as dear.
TRUSTED_SECONDS = 3.0

Answer = TypeVar("Answer")


def connect(answers_within: timedelta | None, *address: Any, **parameters: Any) -> Connection:
    """Connect; each answer may take so long then, or any time.

    Raises:
        psycopg.OperationalError: Nobody answers.
    """
    parameters |= _SILENCE | {"autocommit": True, "cursor_factory": Cursor}
    connection = Connection.connect(*address, **parameters)
    connection.answers_within = answers_within
    # A SET, and no startup parameter: PgBouncer refuses those, and a URL may bring `options` of its own.
    connection.execute(f"set idle_in_transaction_session_timeout = '{STILL_SECONDS}s'".encode())
    connection.autocommit = False
    return connection


def ask_in_doubt(dialect: Dialect) -> Callable[[Connection, object, object], None]:
    """What a pool does with a connection before it lends it: it asks those that may be gone whether they are there."""

    def ask(connection: Connection, _record: object, _loan: object) -> None:
        if connection.is_surely_there():
            return
        asked = cast(Any, connection)
        try:
            dialect.do_ping(asked)
        except psycopg.Error as error:
            if dialect.is_disconnect(cast(Any, error), asked, None):
                raise InvalidatePoolError from error  # the pool makes another, and trusts none that is older
            raise DisconnectionError from error

    return ask


class Connection(psycopg.Connection[Any]):
    """One that ends when an answer takes too long: of a server that hangs, the kernel acknowledges all it is sent."""

    answers_within: timedelta | None = None
    answered_at = -math.inf  # by `boottime`: a machine may have slept since

    def is_surely_there(self) -> bool:
        """It has answered just now, and the server has not hung up since: that would have come over the socket."""
        if self.closed or boottime() - self.answered_at > TRUSTED_SECONDS:
            return False
        news = select.poll()
        news.register(self.fileno(), select.POLLIN)
        return not news.poll(0)

    def wait(self, gen: PQGen[Answer], *args: Any, **kwargs: Any) -> Answer:
        """Every question to the server comes by here, and those of its transactions' ends; some need no answer."""
        return super().wait(self._in_time(gen), *args, **kwargs)

    def _in_time(self, gen: PQGen[Answer]) -> PQGen[Answer]:
        limit = math.inf if self.answers_within is None else self.answers_within.total_seconds()
        give_up_at = time.monotonic() + limit
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if ready:
                    self.answered_at = boottime()
                elif time.monotonic() > give_up_at:
                    self.close()
                    raise psycopg.OperationalError(f"no answer within {limit:g} s")
                wanted = gen.send(ready)
        except StopIteration as end:
            answer: Answer = end.value
            return answer


class Cursor(psycopg.Cursor[Any]):
    """One that tells of its columns what SQLAlchemy asks: a job has 45, and for each psycopg makes an object."""

    @property
    def description(self) -> list[Any] | None:
        """The name and the type of each column, as PEP 249 orders them; None if the statement gives no rows."""
        result = self.pgresult
        if result is None or not result.nfields:
            return super().description
        encoding = self._encoding
        return [
            ((result.fname(column) or b"").decode(encoding), result.ftype(column), None, None, None, None, None)
            for column in range(result.nfields)
        ]

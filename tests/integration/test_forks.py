"""A process that forks while its threads use a SQLite database, as a Celery worker does after its pool was killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text

from graft_shared.store.engine import Database, open_database
from tests.forked import end_after

SEEN = "select count(*) from notes"
UNDER_WAY_SECONDS = 0.3


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database file with a table in it."""
    path = tmp_path / "graft.db"
    with sqlite3.connect(path) as connection:
        connection.execute("create table notes (said text)")
    return path


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    """The database as this process has it open."""
    database = open_database(f"sqlite:///{path}")
    yield database
    database.close()


def note(database: Database, said: str) -> None:
    """Write, and look."""
    with database.writing() as connection:
        connection.execute(text("insert into notes values (:said)"), {"said": said})
    with database.reading() as connection:
        connection.execute(text(SEEN)).scalar_one()


@contextmanager
def forked(act: Callable[[], None]) -> Iterator[None]:
    """A process that has done this, and lives as long as the block."""
    done, says_done = os.pipe()
    waits, ends = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ends)

        def act_and_stay() -> None:
            act()
            os.write(says_done, b".")
            os.read(waits, 1)

        end_after(act_and_stay)
    os.close(says_done)
    os.close(waits)
    try:
        assert os.read(done, 1) == b".", "the forked process could not do its work"
        yield
    finally:
        os.write(ends, b".")  # to close it would not do: a process that another thread forked may have it too
        os.close(ends)
        os.close(done)
        assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("kind", ["reading", "writing"])
def test_a_process_forked_beside_a_transaction_locks_nobody_out(database: Database, path: Path, kind: str) -> None:
    under_way = threading.Event()

    def take_a_while() -> None:
        with getattr(database, kind)() as connection:
            connection.execute(text(SEEN)).fetchall()
            under_way.set()
            time.sleep(UNDER_WAY_SECONDS)

    thread = threading.Thread(target=take_a_while)
    thread.start()
    under_way.wait()
    with forked(lambda: note(open_database(f"sqlite:///{path}"), "the forked process")):
        thread.join()
        with sqlite3.connect(path, timeout=1) as another:
            another.execute("insert into notes values ('another process')")
        another.close()
        note(database, "this process")
    with database.reading() as connection:
        assert connection.execute(text(SEEN)).scalar_one() == 3


def test_threads_go_on_after_forks(database: Database) -> None:
    over, notes = threading.Event(), [0, 0]

    def go_on(number: int) -> None:
        while not over.is_set():
            note(database, f"thread {number}")
            notes[number] += 1

    threads = [threading.Thread(target=go_on, args=[number]) for number in range(len(notes))]
    for thread in threads:
        thread.start()
    before = []
    for number in range(10):
        before.append(sum(notes))
        with forked(lambda number=number: note(database, f"process {number}")):
            pass
    before.append(sum(notes))
    over.set()
    for thread in threads:
        thread.join()
    assert before[-1] > before[0]
    with database.reading() as connection:
        assert connection.execute(text(SEEN)).scalar_one() == sum(notes) + 10


def test_threads_inside_two_databases_and_forks_of_two_threads_get_past_each_other(
    database: Database, tmp_path: Path
) -> None:
    second = open_database(f"sqlite:///{tmp_path / 'second.db'}")
    over = threading.Event()
    rounds = [0, 0, 0]

    def nest() -> None:
        while not over.is_set():
            with database.reading() as connection, second.reading() as other:
                connection.execute(text(SEEN))
                other.execute(text("select 1"))
            rounds[2] += 1

    def fork(number: int) -> None:
        while not over.is_set():
            with forked(lambda: note(database, f"process {number}")):
                rounds[number] += 1

    threads = [threading.Thread(target=nest), *(threading.Thread(target=fork, args=[number]) for number in range(2))]
    for thread in threads:
        thread.start()
    time.sleep(1)
    over.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    second.close()
    assert min(rounds) > 0
    with database.reading() as connection:
        assert connection.execute(text(SEEN)).scalar_one() == rounds[0] + rounds[1]


def test_a_forked_process_can_fork(database: Database, path: Path) -> None:
    def fork_again() -> None:
        with forked(lambda: note(database, "the youngest")):
            note(database, "its parent")

    with forked(fork_again):
        note(database, "the oldest")
    with sqlite3.connect(path) as connection:
        assert connection.execute(SEEN).fetchone() == (3,)


def test_a_fork_waits_on_whatever_a_signal_raises(database: Database) -> None:
    under_way, let_go = threading.Event(), threading.Event()

    def take_a_while() -> None:
        with database.writing() as connection:
            connection.execute(text("insert into notes values ('late')"))
            under_way.set()
            let_go.wait()

    def interrupt(*_: object) -> None:
        threading.Timer(UNDER_WAY_SECONDS, let_go.set).start()
        raise InterruptedError

    thread = threading.Thread(target=take_a_while)
    thread.start()
    under_way.wait()
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        threading.Timer(UNDER_WAY_SECONDS, os.kill, [os.getpid(), signal.SIGUSR1]).start()
        with forked(lambda: note(database, "the forked process")):
            thread.join(5)
            assert let_go.is_set()
    finally:
        signal.signal(signal.SIGUSR1, before)
    with database.reading() as connection:
        assert connection.execute(text(SEEN)).scalar_one() == 2


def test_a_fork_within_a_transaction_does_not_wait_for_it(database: Database) -> None:
    with database.writing() as connection:
        connection.execute(text("insert into notes values ('first')"))
        with database.reading() as look:
            assert look.execute(text(SEEN)).scalar_one() == 0
        with forked(lambda: None):
            pass
    with database.reading() as connection:
        assert connection.execute(text(SEEN)).scalar_one() == 1

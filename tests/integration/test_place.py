"""A worker's name is its own: an earlier life of it is replaced at once, a live worker of the same name never."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import update

from graft_shared.errors import StoreUnavailable, WorkerNameTaken
from graft_shared.store import Database, Workers, open_database
from graft_shared.store.engine import now
from graft_shared.store.migrate import migrate
from graft_shared.store.tables import workers as workers_table
from graft_shared.store.workers import ALIVE_FOR
from graft_worker import place
from graft_worker.place import hold_name, place_of, register
from tests.store_factories import a_beat
from tests.waiting import wait_until


@pytest.fixture
def store(sqlite_url: str) -> Iterator[Database]:
    database = open_database(sqlite_url)
    migrate(database)
    yield database
    database.close()


def never() -> None:
    raise AssertionError("nothing is to be waited for")


def test_a_place_is_the_same_for_every_life_and_unlike_any_other_folder_or_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = place_of(tmp_path / "here"), place_of(tmp_path / "there")
    assert place_of(tmp_path / "here") == here != there
    (tmp_path / "boot_id").write_text("another machine, with a copy of the folder")
    monkeypatch.setattr(place, "_BOOT_ID", tmp_path / "boot_id")
    assert place_of(tmp_path / "here") != here


def test_an_earlier_life_at_this_place_is_replaced_at_once(store: Database) -> None:
    workers = Workers(store)
    for _ in range(2):
        register("w", workers, lambda: workers.beat(**a_beat("w")), never)
    assert [worker.name for worker in workers.alive()] == ["w"]


def test_a_worker_is_refused_once_one_of_its_name_elsewhere_is_seen_again(store: Database) -> None:
    workers = Workers(store)
    workers.beat(**a_beat("w", place="elsewhere"))
    with pytest.raises(WorkerNameTaken, match=r"named 'w'\. Set GRAFT_WORKER_NAME to a name that no other worker"):
        register(
            "w", workers, lambda: workers.beat(**a_beat("w")), lambda: workers.beat(**a_beat("w", place="elsewhere"))
        )
    assert [worker.place for worker in workers.alive()] == ["elsewhere"]


def test_a_worker_elsewhere_that_is_not_seen_again_is_replaced_when_it_counts_as_dead(store: Database) -> None:
    workers, waits = Workers(store), []
    workers.beat(**a_beat("w", place="elsewhere"))

    def wait() -> None:
        waits.append(1)
        with store.writing() as connection:
            age = ALIVE_FOR.total_seconds() / 2
            connection.execute(update(workers_table).values(seen_at=now() - age * len(waits) - 1))

    register("w", workers, lambda: workers.beat(**a_beat("w")), wait)
    assert ([worker.place for worker in workers.alive()], len(waits)) == (["here"], 2)


def test_a_database_that_is_away_is_waited_for_before_anything_is_claimed(store: Database) -> None:
    workers, waits = Workers(store), []

    def beat() -> None:
        if not waits:
            raise StoreUnavailable(reason="away")
        workers.beat(**a_beat("w"))

    register("w", workers, beat, lambda: waits.append(1))
    assert len(waits) == 1


HOLD = (
    "import sys; from pathlib import Path; from graft_worker.place import hold_name; hold_name('w', Path(sys.argv[1]))"
)


def can_hold(folder: Path) -> bool:
    """Whether another process can hold the name there, and is gone again."""
    return subprocess.run([sys.executable, "-c", HOLD, str(folder)], capture_output=True, check=False).returncode == 0


def test_a_name_is_free_again_when_its_worker_is_dead_though_a_process_of_its_pool_lives_on(tmp_path: Path) -> None:
    pipe, worker = os.pipe(), os.fork()
    if worker == 0:
        hold_name("w", tmp_path)
        if (pool_process := os.fork()) != 0:
            os.write(pipe[1], str(pool_process).encode())
        signal.pause()
    pool_process = int(os.read(pipe[0], 20))
    try:
        assert not can_hold(tmp_path)
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        assert can_hold(tmp_path)
    finally:
        os.kill(pool_process, signal.SIGKILL)


@pytest.fixture
def start_worker(sqlite_url: str, store: Database, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")}
    settings = {"STATE_DIR": str(tmp_path), "DATABASE_URL": sqlite_url, "WORKER_NAME": "w", "WORKER_STAGE": "prepare"}
    away = {"BROKER_URL": "redis://127.0.0.1:1/0"}
    environment = {**clean, **{f"GRAFT_{name}": value for name, value in {**settings, **away}.items()}}
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "graft_worker"]
        with (tmp_path / f"{len(started)}.log").open("w") as log:
            started.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True, start_new_session=True)
            )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_a_second_worker_of_a_name_is_refused_with_what_to_do_and_a_killed_one_is_replaced(
    start_worker: Callable[[], subprocess.Popen[str]], tmp_path: Path
) -> None:
    first = start_worker()
    wait_until(lambda: "worker_started" in (tmp_path / "0.log").read_text(), what="the first worker")
    assert start_worker().wait(60) == 1
    assert "error: Another live worker is named 'w'. Set GRAFT_WORKER_NAME" in (tmp_path / "1.log").read_text()
    assert first.poll() is None
    first.kill()
    first.wait()
    start_worker()
    wait_until(lambda: "worker_started" in (tmp_path / "2.log").read_text(), what="its next life")
    assert "name_waited_for" not in (tmp_path / "2.log").read_text()

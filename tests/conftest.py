"""Fixtures that start what a test needs; a neighbour that cannot be started fails the test."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from graft_shared.store import Database, open_database
from graft_shared.store.migrate import migrate
from tests.servers import PostgresServer, RedisServer, SwiftServer

_numbers = itertools.count()
settings.register_profile("untimed", deadline=None)  # what takes long is for tests/bench to say
settings.load_profile("untimed")


def pytest_configure() -> None:
    """A shell that runs us in the background has SIGINT ignored, and what we start would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    server = PostgresServer(tmp_path_factory.mktemp("postgres")).start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwiftServer]:
    server = SwiftServer(tmp_path_factory.mktemp("swift")).start()
    yield server
    server.stop()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'graft.db'}"


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> str:
    return postgres.new_database(f"graft{next(_numbers)}")


@pytest.fixture(params=["sqlite", "postgres"])
def empty_database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """A database of each kind, without tables."""
    opened = open_database(request.getfixturevalue(f"{request.param}_url"))
    yield opened
    opened.close()


@pytest.fixture
def database(empty_database: Database) -> Database:
    """A migrated database of each kind: every store test runs on both."""
    migrate(empty_database)
    return empty_database

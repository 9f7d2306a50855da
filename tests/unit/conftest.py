"""An API over a database of its own, for whatever is asked of it in this process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api_service import ApiService, make_service, migrated_database


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with our tables, of which each test gets a copy."""
    return migrated_database(tmp_path_factory.mktemp("template"))


@pytest.fixture
def api(tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiService]:
    monkeypatch.setattr("graft_api.jobs.bells.MARKED_AFTER_SECONDS", 0.0)  # no row changes while a test looks at it
    service = make_service(tmp_path, template)
    yield service
    service.database.close()


@pytest.fixture
def nothing_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the API holds for a moment is too old at once."""
    monkeypatch.setattr("graft_api.held.monotonic", itertools.count(10**12, 1000).__next__)
    monkeypatch.setattr("graft_api.held.HELD_TIMES", 0)

"""A minute of chaos with a fixed seed, on either database; `make chaos` makes hours of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.__main__ import Wanted, run
from tests.scratch import scratch_folder


@pytest.fixture
def folder() -> Iterator[Path]:
    made = scratch_folder("graft-chaos-")
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_faults_lose_nothing_and_double_nothing(folder: Path, database: str) -> None:
    report = run(folder, Wanted(db=database, jobs=6, faults=30, seed=7, trainers=4))
    assert report["violations"] == {}
    assert report["faults"]["kill_9"] >= 15
    assert report["webhooks"]["taken"] >= report["jobs"]["accepted"] and report["webhooks"]["turned_away"] > 0
    assert report["jobs"]["accepted"] >= 6
    assert sum(report["faults_that_hit_a_running_job"].values()) >= 15

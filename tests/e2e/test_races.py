"""A few of the cancels and drains that `make races` does by the hundred: the service bears them, the harness works."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.races import Wanted, run


def test_cancels_that_race_with_the_finish_and_a_drained_worker_break_no_promise(tmp_path: Path) -> None:
    report = run(tmp_path, Wanted(races=6, drains=1, seed=7, lease_seconds=4.0, trainers=2))
    assert report["violations"] == {}
    assert sum(report["cancel_against_finish"]["ended"].values()) == 6
    assert report["drain_of_a_busy_worker"]["seconds_until_gone"]["count"] == 1
    assert report["faults_that_hit_a_running_job"] == {"drain_worker": 1}

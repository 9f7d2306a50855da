"""Moments of the outages that `make outages` plays for minutes: the service bears them, and their harness works."""

from __future__ import annotations

from pathlib import Path

from tests.outages.__main__ import play
from tests.outages.wanted import Wanted

LEASE_SECONDS = 8.0  # so that the times that are waited for are short


def test_an_api_that_is_killed_again_and_again_loses_no_job_and_doubles_none(tmp_path: Path) -> None:
    report = play("api-killed", tmp_path, Wanted(kills=3, lease_seconds=LEASE_SECONDS))
    assert report["violations"] == {}
    assert report["kills"] == 3
    assert report["jobs_accepted"] == report["jobs_in_the_database"] > 3
    assert report["keys_tried_again"] > 0, "clients felt the kills"


def test_jobs_start_though_nobody_answers_at_redis(tmp_path: Path) -> None:
    report = play("redis-half-open", tmp_path, Wanted(seconds=6.0, lease_seconds=LEASE_SECONDS))
    assert report["violations"] == {}
    assert report["posts"]["answered_202"] == report["posts"]["count"] >= 3
    assert report["waited_seconds"]["nobody_answers"]["prepared_to_claimed"]["count"] > 0


def test_a_job_goes_on_soon_after_its_trainer_is_killed_or_its_machine_lost(tmp_path: Path) -> None:
    report = play("recovery", tmp_path, Wanted(kills=2, lease_seconds=LEASE_SECONDS))
    assert report["violations"] == {}
    assert {fault: found["count"] for fault, found in report["seconds_to_next_step"].items()} == {
        "kill_trainer": 2,
        "lose_worker": 2,
    }

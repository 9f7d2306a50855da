"""The load bench, for a second and on SQLite: its promises hold, and it cannot rot."""

from __future__ import annotations

from pathlib import Path

from tests.bench.load import Wanted, play


def test_every_job_that_was_accepted_under_load_is_there_once(tmp_path: Path) -> None:
    counts = {"workers": 8, "apis": 1, "clients": 2, "client_processes": 2}
    wanted = Wanted(db="sqlite", seconds=1.5, posts_per_second=20.0, gets_per_second=10.0, **counts)
    report = play(tmp_path, wanted)
    assert report["violations"] == []
    assert report["posts"]["answered"] > 0
    assert report["posts"]["errors"] == report["gets"]["errors"] == {}
    assert report["fleet"]["sent"]["renew"] > 0
    assert (report["durability"]["database"], report["durability"]["synchronous"]) == ("sqlite", "2")

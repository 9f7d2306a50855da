"""A reader that is cut off again and again, and dozens of open streams; `python -m tests.load.streams` has more."""

from __future__ import annotations

from pathlib import Path

from tests.load.streams import Wanted, run


def test_streams_lose_nothing_and_take_no_thread_each(tmp_path: Path, postgres_url: str) -> None:
    report = run(tmp_path, Wanted(cuts=10, streams=80, jobs=8, seconds=1.0, seed=7), postgres_url)
    assert report["violations"] == []
    assert report["cut_off"]["cut_in_mid_event"] >= 4 and report["cut_off"]["events"] >= 8
    busy = report["open_at_once"]["with"]
    assert busy["threads"] < 60 and busy["database_connections"] <= 15
    assert busy["memory_mib"] < 512

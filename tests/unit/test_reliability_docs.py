"""docs/reliability.md prints figures: they are those of the committed reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "docs" / "reliability.md").read_text().splitlines()
PAGE = " ".join(" ".join(LINES).split())


def report(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "tests/bench/results" / f"reliability-{name}.json").read_text())
    return found


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("chaos, PostgreSQL", "chaos-unscaled"),
        ("Redis flushed and killed", "redis-killed"),
        ("PostgreSQL stopped at once", "postgres-stopped"),
    ],
)
def test_each_row_is_a_run_that_broke_no_promise(title: str, name: str) -> None:
    run = report(name)
    faults = run["faults"]
    happened = (
        f"{faults['kill_9']} × kill -9 among {run['wanted']['faults']} faults"
        if isinstance(faults, dict)
        else f"every {run['every_seconds']:g} s, {faults} times"
    )
    jobs, steps = run["jobs"], run["steps"]
    assert jobs["succeeded"] + jobs["cancelled"] == jobs["accepted"]
    assert run["wanted"]["lease_seconds"] == 60
    assert run["violations"] == {}
    assert run["promises"]
    assert not any(run["promises"].values())
    cells = [f"{run['seconds']:,} s", happened, *(f"{jobs[key]:,}" for key in ("accepted", "succeeded", "cancelled"))]
    assert f"| {title} | {' | '.join(cells)} | {steps['made']:,}, {steps['needed']:,} |" in LINES
    assert f"`reliability-{name}.json`" in PAGE


def test_how_long_jobs_stood_still_is_what_was_measured() -> None:
    seconds = report("chaos-unscaled")["seconds_to_next_step"]
    lost, killed = seconds["lose_worker"], seconds["kill_trainer"]
    back, drained = seconds["kill_worker"], seconds["drain_worker"]
    assert f"after {lost['p50']:.0f} s in the median ({lost['count']} of them; {lost['highest']:.0f} s at most)" in PAGE
    assert f"it came after {killed['p50']:.1f} s ({killed['count']})" in PAGE
    assert f"came back at once after {back['p50']:.1f} s ({back['count']})" in PAGE
    assert f"with a checkpoint, after {drained['p50']:.1f} s ({drained['count']})" in PAGE


def test_every_end_was_told_in_the_run_with_webhooks() -> None:
    run = report("chaos-webhooks")
    assert run["violations"] == {} and run["promises"]["every job's end is told at least once"] == 0
    told, ended = run["webhooks"], run["jobs"]["accepted"]
    assert told["taken"] - told["of_them_twice"] == ended
    assert f"In one of {run['wanted']['faults']} faults, with leases of {run['wanted']['lease_seconds']:g} s" in PAGE
    assert f"the ends of {ended} jobs were told in {told['taken']} messages, {told['of_them_twice']} of them" in PAGE
    assert f"{told['turned_away']} that the receiver turned away" in PAGE

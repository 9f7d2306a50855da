"""docs/reliability.md prints figures: they are those of the committed reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.failpoints.points import POINTS

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


@pytest.mark.parametrize(("name", "database"), [("chaos-sqlite", "SQLite"), ("chaos-postgres", "PostgreSQL")])
def test_the_long_runs_with_short_leases_are_as_the_page_says(name: str, database: str) -> None:
    run = report(name)
    jobs, steps, faults = run["jobs"], run["steps"], run["faults"]
    assert run["violations"] == {} and run["promises"] and not any(run["promises"].values())
    poisoned = sum(count for ended, count in jobs.items() if ended in ("failed: worker_lost", "failed: drained"))
    assert jobs["succeeded"] + jobs["cancelled"] + poisoned == jobs["accepted"]
    assert f"With leases of {run['wanted']['lease_seconds']:g} s on {database}" in PAGE
    assert run["wanted"]["jobs"] >= 1000 and jobs["accepted"] >= 1000 and faults["kill_9"] >= 3000
    fewest = min(run["faults_that_hit_a_running_job"].values())
    assert fewest >= 50
    assert (
        f"{run['wanted']['faults']:,} faults within {run['seconds']:,} s, {faults['kill_9']:,} of them kill -9, "
        f"each kind at least {fewest} times" in PAGE
    )
    assert (
        f"{jobs['accepted']:,} jobs were accepted; {jobs['succeeded']:,} succeeded, {jobs['cancelled']} were "
        f"cancelled, and {poisoned} ended as poison" in PAGE
    )
    assert f"{steps['made']:,} steps were made where {steps['needed']:,} were needed" in PAGE
    told = run["webhooks"]
    assert f"told in {told['taken']:,} messages, {told['of_them_twice']} of them repetitions" in PAGE
    assert f"`reliability-{name}.json`" in PAGE


def test_how_long_jobs_stood_still_is_what_was_measured() -> None:
    seconds = report("chaos-unscaled")["seconds_to_next_step"]
    lost, killed = seconds["lose_worker"], seconds["kill_trainer"]
    back, drained = seconds["kill_worker"], seconds["drain_worker"]
    assert f"after {lost['p50']:.0f} s in the median ({lost['count']} of them; {lost['highest']:.0f} s at most)" in PAGE
    assert f"it came after {killed['p50']:.1f} s ({killed['count']})" in PAGE
    assert f"came back at once after {back['p50']:.1f} s ({back['count']})" in PAGE
    assert f"with a checkpoint, after {drained['p50']:.1f} s ({drained['count']})" in PAGE


def test_recovery_and_waits_without_redis_are_what_was_measured() -> None:
    recovery, down, half_open = (report(name) for name in ("recovery", "redis-down", "redis-half-open"))
    for run in (recovery, down, half_open):
        assert run["violations"] == {} and run["wanted"]["lease_seconds"] == 60
    killed, lost = (recovery["seconds_to_next_step"][fault] for fault in ("kill_trainer", "lose_worker"))
    assert (
        f"{killed['count']} trainers were killed, and their jobs had the next step after {killed['p50']:.1f} s" in PAGE
    )
    assert (
        f"in the median, {killed['p95']:.1f} s in the 95th percentile; {lost['count']} whole workers were killed"
        in PAGE
    )
    assert f"it came after {lost['p50']:.1f} s and {lost['p95']:.1f} s" in PAGE
    posts, waits = down["posts"], down["waited_seconds"]["away"]
    assert posts["answered_202"] == posts["count"]
    assert f"away for {down['wanted']['seconds']:.0f} s all {posts['count']} posts were answered 202" in PAGE
    assert f"no job waited longer than {max(wait['max'] for wait in waits.values()):.1f} s for a worker" in PAGE
    waits = half_open["waited_seconds"]["nobody_answers"]
    longest = max(wait["max"] for wait in waits.values())
    assert (
        f"half open for {half_open['wanted']['seconds']:.0f} s, neither answered nor closed: {longest:.1f} s at" in PAGE
    )


def test_the_api_that_was_killed_lost_what_the_page_says_which_is_nothing() -> None:
    run = report("api-killed")
    assert run["violations"] == {} and run["promises"]["the database is whole"] == 0
    assert f"killed {run['kills']} times within {run['seconds']} s while four clients" in PAGE
    assert run["clients"] == 4
    accepted, stored = f"{run['jobs_accepted']:,}", f"{run['jobs_in_the_database']:,}"
    assert f"{accepted} jobs were answered 202, {stored} were in the database" in PAGE
    assert f"{run['keys_tried_again']} posts were sent again" in PAGE
    assert f"{run['of_these_committed_before_the_kill']} of them after a commit whose answer was lost" in PAGE


def test_a_bucket_that_was_away_at_each_write_cost_the_time_that_the_page_says() -> None:
    run = report("bucket-away")
    assert run["violations"] == {} and run["promises"] and not any(run["promises"].values())
    assert list(run["writes"]) == ["file", "prepared_data", "checkpoint", "log", "adapter_file", "manifest"]
    assert {played["state"] for played in run["writes"].values()} == {"succeeded"}
    seconds = [played["seconds_from_its_end_to_the_job's"] for played in run["writes"].values()]
    assert f"refused connections for {run['wanted']['seconds']:.0f} s from each of six writes on" in PAGE
    assert f"Every job succeeded, {min(seconds):.1f} to {max(seconds):.1f} s after the bucket's return" in PAGE


def test_a_full_disk_cost_the_time_that_the_page_says() -> None:
    run = report("disk-full")
    assert run["violations"] == {} and run["promises"] and not any(run["promises"].values())
    assert {played["state"] for played in run["writes"].values()} == {"succeeded"}
    longest = max(played["seconds_from_its_end_to_the_job's"] for played in run["writes"].values())
    moments = f"full for {run['wanted']['seconds']:.0f} s from just before a write on, at {len(run['writes'])} moments"
    assert moments in PAGE
    assert f"Every job succeeded, at most {longest:.1f} s after there was space" in PAGE


@pytest.mark.parametrize(("title", "name"), [("SQLite", "races-sqlite"), ("PostgreSQL", "races-postgres")])
def test_races_and_drains_ended_as_the_page_says(title: str, name: str) -> None:
    run = report(name)
    assert run["violations"] == {} and run["promises"] and not any(run["promises"].values())
    assert run["wanted"]["lease_seconds"] == 60
    races, drains = run["cancel_against_finish"], run["drain_of_a_busy_worker"]
    ended, gone = races["ended"], drains["seconds_until_gone"]
    assert sum(ended.values()) == races["races"] and gone["count"] == drains["drains"] == drains["ended"]["succeeded"]
    cancelled, succeeded = ended["cancelled"], ended["succeeded"]
    assert f"On {title} {races['races']} such jobs ended {cancelled} times cancelled and {succeeded} times as a" in PAGE
    assert f"{drains['drains']} workers that were told to leave were gone after {gone['p50']:.1f} s in the" in PAGE
    assert f"{gone['highest']:.1f} s at most (`reliability-{name}.json`)" in PAGE


def test_every_end_was_told_in_the_run_with_webhooks() -> None:
    run = report("chaos-webhooks")
    assert run["violations"] == {} and run["promises"]["every job's end is told at least once"] == 0
    told, ended = run["webhooks"], run["jobs"]["accepted"]
    assert told["taken"] - told["of_them_twice"] == ended
    assert f"In one of {run['wanted']['faults']} faults, with leases of {run['wanted']['lease_seconds']:g} s" in PAGE
    assert f"the ends of {ended} jobs were told in {told['taken']} messages, {told['of_them_twice']} of them" in PAGE
    assert f"{told['turned_away']} that the receiver turned away" in PAGE


def test_the_killed_7b_ended_in_the_bytes_that_the_page_says() -> None:
    run = json.loads((ROOT / "tests/bench/results/h200-kill-points.json").read_text())
    assert run["sha256_under_fire"] == run["sha256_in_peace"]
    assert run["deterministic"] and run["device"] == "NVIDIA H200" and run["optim"].startswith("paged_")
    assert len(run["killed"]) == run["kills"] == 10
    steps = [int(place.rpartition(" ")[2]) for place in run["killed"] if place.startswith("behind step")]
    assert len(steps) == 9
    assert f"steps {min(steps)} to {max(steps)} of {run['steps']}" in PAGE


def test_the_trainer_that_was_killed_on_a_cpu_ended_in_the_bytes_that_the_page_says() -> None:
    run = json.loads((ROOT / "tests/bench/results/cpu-kill-points.json").read_text())
    assert run["sha256_under_fire"] == run["sha256_in_peace"]
    assert run["device"] == "CPU" and not run["deterministic"]
    assert f"--kills {run['kills']} --steps {run['steps']} --save-steps {run['save_steps']}" in PAGE
    assert f"after {len(run['killed'])} kills they were the same" in PAGE


@pytest.mark.parametrize(("kind", "database", "least"), [("sqlite", "SQLite", 20), ("postgres", "PostgreSQL", 1)])
def test_every_process_was_struck_at_every_point_as_the_page_says(kind: str, database: str, least: int) -> None:
    run = report(f"failpoints-{kind}")
    cells = {(cell["point"], cell["fault"]): cell for cell in run["cells"]}
    assert set(cells) == {(point.name, fault) for point in POINTS for fault in point.faults}
    assert all(cell["struck"] >= least and not cell["violations"] for cell in cells.values())
    assert (run["database"], run["void"], run["violations"]) == (kind, 0, [])
    assert f"on {database} {run['trials']:,} trials ({least} × {len(cells)})" in PAGE
    assert f"{run['steps_late']} on {database}" in PAGE
    assert f"`reliability-failpoints-{kind}.json`" in PAGE


def load(name: str) -> dict[str, Any]:
    """A run with everything as it should be, and 200 workers, all of them at work."""
    run = report(f"load-{name}")
    assert run["violations"] == run["fleet"]["violations"] == []
    assert run["posts"]["errors"] == run["gets"]["errors"] == {}
    assert run["wanted"]["workers"] == 200 and run["bells_in_redis"] == 0
    return run


def test_the_load_on_postgresql_is_as_the_page_says() -> None:
    run, busier = load("postgres"), load("postgres-stolen")
    assert run["durability"]["fsync"] == run["durability"]["synchronous_commit"] == "on"
    assert not any(run["fleet"]["late"].values())
    assert run["posts"]["per_second"] >= 150 and run["gets"]["p99_ms"] < 100
    assert busier["command"] == run["command"]
    told = (
        f"{run['wanted']['apis']} API processes took {run['posts']['per_second']} jobs a second on PostgreSQL beside "
        f"{run['wanted']['workers']} workers, all at work, so that no bell was rung, and a look at a job took "
        f"{run['gets']['p50_ms']} ms in the median and {run['gets']['p99_ms']} ms in the 99th percentile "
        "(`reliability-load-postgres.json`)."
    )
    assert told in PAGE
    told = (
        f"of those cores other virtual machines took {100 * run['stolen_share']:.1f} % (`stolen_share`), and where "
        f"they took {100 * busier['stolen_share']:.1f} % it was {busier['posts']['per_second']} jobs a second and "
        f"{busier['gets']['p99_ms']} ms (`reliability-load-postgres-stolen.json`)."
    )
    assert told in PAGE


def test_the_load_on_sqlite_is_as_the_page_says() -> None:
    run = load("sqlite")
    fleet = run["fleet"]
    assert run["posts"]["per_second"] >= 40
    told = (
        f"On SQLite it was {run['posts']['per_second']} jobs a second and {run['gets']['p99_ms']} ms; writers wait for "
        f"each other there: one post in a hundred took more than {run['posts']['p99_ms'] / 1000:.1f} s, and "
        f"{fleet['late']['renew']} of {fleet['sent']['renew']} renewals of leases of 60 s came more than a second "
        f"late, nothing of theirs more than {fleet['longest_delay_seconds']:.1f} s (`reliability-load-sqlite.json`)."
    )
    assert told in PAGE

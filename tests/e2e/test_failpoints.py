"""A process killed at each named point in turn: the job ends as it should, and nothing is lost or done twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.failpoints.points import POINTS, Actor

ROOT = Path(__file__).parents[2]

# A trainer that never looks at its deadline, under a supervisor that is frozen; and a point that nobody comes by.
SABOTAGED = """
import sys
from graft_worker.training import guard
from tests.failpoints import __main__ as matrix
from tests.failpoints.points import Actor, Moment, Point, Scenario

guard.read_deadline = lambda _: float("inf")
matrix.POINTS = (
    Point(
        name="deaf_trainer",
        actor=Actor.WORKER,
        target="graft_worker.supervisor.training_run:store_checkpoint",
        moment=Moment.BEFORE,
        scenario=Scenario(steps=100, step_seconds=0.05),
    ),
    Point(
        name="never_reached",
        actor=Actor.WORKER,
        target="graft_shared.store.leases:Leases.settle_cancelled",
        moment=Moment.BEFORE,
    ),
)
matrix.main()
"""


def run(folder: Path, *command: str) -> tuple[int, str, dict[str, Any]]:
    """Exit code, output and report of the matrix."""
    out = folder / "report.json"
    done = subprocess.run(
        [sys.executable, *command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert out.exists(), said
    return done.returncode, said, json.loads(out.read_text())


def test_a_process_killed_at_any_point_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    code, said, report = run(tmp_path, "-m", "tests.failpoints", "--fault", "kill")
    assert code == 0, said
    assert report["violations"] == []
    assert report["struck"] == report["trials"] == len(POINTS)
    assert {cell["actor"] for cell in report["cells"]} == {actor.value for actor in Actor}


def test_a_zombie_is_seen_and_a_point_that_is_never_reached_is_no_pass(tmp_path: Path) -> None:
    code, _, report = run(tmp_path, "-c", SABOTAGED, "--fault", "freeze")
    said = {wrong["case"].partition("-")[0]: " ".join(wrong["said"]) for wrong in report["violations"]}
    assert code != 0
    assert "no_trainer_stepped_after_a_newer_one" in said["deaf_trainer"]
    assert "the_point_was_reached" in said["never_reached"]

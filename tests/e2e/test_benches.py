"""The scripts that need a GPU for their figures run from end to end without one, on a tiny base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run(script: str, *words: str) -> None:
    done = subprocess.run(
        [sys.executable, f"tests/bench/{script}.py", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def results(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


def test_a_golden_run_is_measured_and_leaves_only_its_result(tmp_path: Path) -> None:
    run("golden", "--smoke", "--out-dir", str(tmp_path))
    (found,) = results(tmp_path / "golden.json")
    assert found["memory"]["measured_peak_bytes"] > 0
    assert len(found["losses"]) == 3
    assert all(loss > 0 for loss in found["losses"])
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_run_under_a_cap_is_made_and_judged(tmp_path: Path) -> None:
    run("caps", "--smoke", "--only", "short", "--out-dir", str(tmp_path))
    (found,) = results(tmp_path / "caps.json")
    assert found["verdict"] == "kept"
    assert found["steps"] == found["steps_wanted"] == 2
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []

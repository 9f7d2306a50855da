"""Some keys posted many times at once to two APIs, one of them killed; `python -m tests.load.idempotency` has more."""

from __future__ import annotations

from pathlib import Path

from tests.load.idempotency import Wanted, run


def test_a_key_comes_to_one_job_whoever_answers_and_whoever_dies(tmp_path: Path, postgres_url: str) -> None:
    report = run(tmp_path, Wanted(keys=8, posts=8, seed=7), postgres_url)
    assert report["violations"] == []
    assert set(report["answers"]) <= {"202", "422", "503"}
    assert sum(report["sent_again"].values()) > 0, "the kill was noticed"

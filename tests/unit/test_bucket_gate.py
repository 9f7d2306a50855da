"""The gate before a cluster's start: it waits for the bucket, and says why it did not open."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from graft_shared.buckets.directory import DirectoryBucket
from graft_shared.buckets.gate import wait_for_bucket
from graft_shared.errors import BucketUnavailable


@dataclass
class LateBucket(DirectoryBucket):
    """Answers from a moment on."""

    opens_at: float
    now: float = 0.0

    def ping(self) -> None:
        if self.now < self.opens_at:
            raise BucketUnavailable(reason="connection refused")

    def clock(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.now += seconds


def test_a_bucket_that_starts_late_is_waited_for() -> None:
    bucket = LateBucket(opens_at=20.0)
    wait_for_bucket(bucket, seconds=90.0, clock=bucket.clock, pause=bucket.pause)
    assert 20.0 <= bucket.now < 22.0


def test_a_bucket_that_never_answers_is_given_up() -> None:
    bucket = LateBucket(opens_at=1000.0)
    with pytest.raises(BucketUnavailable, match="connection refused"):
        wait_for_bucket(bucket, seconds=90.0, clock=bucket.clock, pause=bucket.pause)
    assert bucket.now <= 90.0


def test_the_gate_opens_for_the_configured_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_STATE_DIR", str(tmp_path))
    subprocess.run([sys.executable, "-m", "graft_shared.buckets.gate"], check=True, timeout=60)

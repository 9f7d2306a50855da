"""The guard of a trainer: it may go on until the lease's deadline, and until it is told to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft_shared.clock import boottime
from graft_worker.protocol import write_deadline
from graft_worker.training.guard import Guard, LeaseOver, ToldToStop


@pytest.fixture
def guard() -> Iterator[Guard]:
    before = signal.getsignal(signal.SIGTERM)
    yield Guard()
    signal.signal(signal.SIGTERM, before)


def test_the_guard_reads_the_deadline_anew_each_time(guard: Guard, tmp_path: Path) -> None:
    write_deadline(tmp_path, boottime() + 3600)
    guard.watch_lease(tmp_path)
    guard.check()
    write_deadline(tmp_path, boottime() - 1)
    with pytest.raises(LeaseOver):
        guard.check()


def test_who_is_told_to_stop_after_the_deadline_does_not_save_first(guard: Guard, tmp_path: Path) -> None:
    write_deadline(tmp_path, boottime() + 3600)
    guard.watch_lease(tmp_path)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(ToldToStop):
        guard.check()
    write_deadline(tmp_path, boottime() - 1)
    with pytest.raises(LeaseOver):
        guard.check()

"""The guard of a trainer: it may go on until the lease's deadline, and until it is told to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft_shared.clock import boottime
from graft_worker.protocol import write_deadline
from graft_worker.training import guard as guards
from graft_worker.training.guard import Guard, LeaseOver, ToldToStop

LEASE_SECONDS = 60.0


@pytest.fixture
def guard() -> Iterator[Guard]:
    before = signal.getsignal(signal.SIGTERM)
    yield Guard()
    signal.signal(signal.SIGTERM, before)


def test_the_guard_reads_the_deadline_anew_each_time(guard: Guard, tmp_path: Path) -> None:
    write_deadline(tmp_path, boottime() + 3600)
    guard.watch_lease(tmp_path, LEASE_SECONDS)
    guard.check()
    write_deadline(tmp_path, boottime() - 1)
    with pytest.raises(LeaseOver):
        guard.check()


def test_who_is_told_to_stop_after_the_deadline_does_not_save_first(guard: Guard, tmp_path: Path) -> None:
    write_deadline(tmp_path, boottime() + 3600)
    guard.watch_lease(tmp_path, LEASE_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(ToldToStop):
        guard.check()
    write_deadline(tmp_path, boottime() - 1)
    with pytest.raises(LeaseOver):
        guard.check()


class Trainer:
    """A trainer under a guard and a clock that the test moves."""

    def __init__(self, guard: Guard, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.guard, self.workdir, self.now = guard, workdir, 1000.0
        monkeypatch.setattr(guards, "boottime", lambda: self.now)
        self.is_renewed()
        guard.watch_lease(workdir, LEASE_SECONDS)

    def is_renewed(self) -> None:
        write_deadline(self.workdir, self.now + 0.9 * LEASE_SECONDS)

    def works(self, seconds: float) -> None:
        """Ask, and then do a microbatch or an update."""
        self.guard.check()
        self.now += seconds

    def seconds_before_the_leases_end(self) -> float:
        """Go on in small steps until the guard says no."""
        self.is_renewed()
        renewed_at = self.now
        while True:
            try:
                self.guard.check_lease()
            except LeaseOver:
                return renewed_at + LEASE_SECONDS - self.now
            self.now += 0.1


@pytest.fixture
def trainer(guard: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    return Trainer(guard, tmp_path, monkeypatch)


@pytest.mark.parametrize(("longest", "margin"), [(0.5, 6.0), (5.0, 10.0), (12.0, 24.0), (40.0, 30.0)])
def test_twice_the_longest_microbatch_stays_free_before_the_leases_end(
    trainer: Trainer, longest: float, margin: float
) -> None:
    trainer.guard.measure_from_here()
    for seconds in (0.2, longest, 0.3, 0.0):
        trainer.works(seconds)
        trainer.is_renewed()
    assert trainer.seconds_before_the_leases_end() == pytest.approx(margin, abs=0.2)


def test_what_is_no_microbatch_needs_no_margin(trainer: Trainer) -> None:
    trainer.works(20.0)  # loading, and what is compiled for the first time
    trainer.is_renewed()
    trainer.guard.measure_from_here()
    trainer.works(1.0)
    trainer.now += 20.0  # a checkpoint
    trainer.is_renewed()
    trainer.guard.measure_from_here()
    trainer.works(1.0)
    trainer.works(0.0)
    assert trainer.seconds_before_the_leases_end() == pytest.approx(6.0, abs=0.2)


def test_a_heartbeat_that_comes_in_time_is_never_too_late(trainer: Trainer) -> None:
    trainer.guard.measure_from_here()
    for _ in range(4):
        trainer.works(LEASE_SECONDS / 4)
        trainer.is_renewed()
    trainer.works(LEASE_SECONDS / 4)
    trainer.works(0.0)

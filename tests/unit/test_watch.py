"""The watch beside a child: until when it may go on, and how it hears that it may not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from graft_shared.errors import LeaseLost, StoreUnavailable
from graft_shared.store import Orders
from graft_worker.protocol import read_deadline
from graft_worker.supervisor import watch
from graft_worker.supervisor.watch import StopReason, Watch, WatchTimes
from tests.waiting import wait_until

LEASE_SECONDS = 60.0
GRACE_SECONDS = 30.0
BEGAN_AT = 1000.0


@dataclass
class Clock:
    """CLOCK_BOOTTIME, as the watch reads it."""

    now: float = BEGAN_AT


@dataclass
class FakeLeases:
    """The store, as a watch uses it: it answers slowly, or not, or with orders."""

    clock: Clock
    seconds_to_renew: float = 0.0
    error: Exception | None = None
    cancel: bool = False
    pause: bool = False
    answers: int = 0

    def renew(self, job_id: str, epoch: int) -> Orders:
        self.clock.now += self.seconds_to_renew
        return self.orders(job_id, epoch)

    def orders(self, job_id: str, epoch: int) -> Orders:
        self.answers += 1
        if self.error is not None:
            raise self.error
        return Orders(cancel=self.cancel, pause=self.pause)


@dataclass
class FakeChild:
    """A child that notes how it was told to leave."""

    told: list[str] = field(default_factory=list)

    def terminate(self) -> None:
        self.told.append("terminate")

    def kill(self) -> None:
        self.told.append("kill")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(watch, "boottime", lambda: made.now)
    return made


@pytest.fixture
def leases(clock: Clock) -> FakeLeases:
    return FakeLeases(clock)


@pytest.fixture
def begin(leases: FakeLeases, tmp_path: Path) -> Callable[..., Watch]:
    def begin(*, draining: Callable[[], bool] = lambda: False, ends_at: float | None = None) -> Watch:
        times = WatchTimes(lease=LEASE_SECONDS, heartbeat=15.0, orders=0.005, stop_grace=GRACE_SECONDS)
        faked: Any = leases
        return Watch(faked, "ftjob-a", 2, tmp_path, times=times, draining=draining, ends_at=ends_at)

    return begin


def looks_again(leases: FakeLeases) -> None:
    """Wait until the watch has looked twice more: once with what it knew before, and once since."""
    seen = leases.answers
    wait_until(lambda: leases.answers >= seen + 2, seconds=20, what="the watch to look", every=0.005)


def test_the_deadline_counts_from_before_the_renewal_was_sent_and_comes_before_the_leases_end(
    begin: Callable[..., Watch], leases: FakeLeases, tmp_path: Path
) -> None:
    leases.seconds_to_renew = 7.0
    with begin():
        assert BEGAN_AT + LEASE_SECONDS / 2 < read_deadline(tmp_path) <= BEGAN_AT + 0.9 * LEASE_SECONDS


def test_a_lease_is_renewed_at_every_heartbeat_and_the_deadline_with_it(
    begin: Callable[..., Watch], leases: FakeLeases, clock: Clock, tmp_path: Path
) -> None:
    with begin():
        first = read_deadline(tmp_path)
        clock.now += 15.0
        looks_again(leases)
        assert read_deadline(tmp_path) == pytest.approx(first + 15.0)


def test_a_child_whose_lease_is_lost_is_killed_and_not_asked(begin: Callable[..., Watch], leases: FakeLeases) -> None:
    child: Any = FakeChild()
    with begin() as watching:
        watching.look_after(child)
        leases.error = LeaseLost(job_id="ftjob-a", epoch=2)
        wait_until(lambda: watching.stop_reason is StopReason.LEASE_LOST, seconds=20, what="the loss")
        wait_until(lambda: bool(child.told), seconds=20, what="the child to be told")
    assert set(child.told) == {"kill"}


def test_a_store_that_is_away_ends_nothing_before_the_deadline_and_the_child_after_it(
    begin: Callable[..., Watch], leases: FakeLeases, clock: Clock
) -> None:
    child: Any = FakeChild()
    with begin() as watching:
        watching.look_after(child)
        leases.error = StoreUnavailable(reason="away")
        clock.now += 0.9 * LEASE_SECONDS - 1
        looks_again(leases)
        assert (watching.stop_reason, child.told) == (None, [])
        clock.now += 2
        wait_until(lambda: "kill" in child.told, seconds=20, what="the child's end")
        assert watching.stop_reason is StopReason.LEASE_LOST


def test_a_cancel_is_heard_by_a_run_that_already_leaves(begin: Callable[..., Watch], leases: FakeLeases) -> None:
    with begin(draining=lambda: True) as watching:
        wait_until(lambda: watching.stop_reason is StopReason.DRAIN, seconds=20, what="the drain")
        leases.cancel = True
        wait_until(lambda: watching.stop_reason is StopReason.CANCEL, seconds=20, what="the cancel")


def test_a_pause_goes_before_a_drain_and_a_limit_and_a_cancel_before_a_pause(
    begin: Callable[..., Watch], leases: FakeLeases
) -> None:
    leases.pause = True
    with begin(draining=lambda: True, ends_at=BEGAN_AT - 1) as watching:
        wait_until(lambda: watching.stop_reason is StopReason.PAUSE, seconds=20, what="the pause")
        looks_again(leases)
        assert watching.stop_reason is StopReason.PAUSE
        leases.cancel = True
        wait_until(lambda: watching.stop_reason is StopReason.CANCEL, seconds=20, what="the cancel")


def test_a_pause_that_is_taken_back_stays_ordered_for_the_child_is_leaving(
    begin: Callable[..., Watch], leases: FakeLeases
) -> None:
    child: Any = FakeChild()
    leases.pause = True
    with begin() as watching:
        watching.look_after(child)
        wait_until(lambda: watching.stop_reason is StopReason.PAUSE, seconds=20, what="the pause")
        leases.pause = False
        looks_again(leases)
        assert watching.stop_reason is StopReason.PAUSE
    assert child.told == ["terminate"]


def test_a_child_that_is_started_after_its_run_was_told_to_stop_hears_it(begin: Callable[..., Watch]) -> None:
    child: Any = FakeChild()
    with begin(draining=lambda: True) as watching:
        wait_until(lambda: watching.stop_reason is StopReason.DRAIN, seconds=20, what="the drain")
        watching.look_after(child)
        assert child.told == ["terminate"]


def test_a_child_is_asked_once_and_killed_when_its_grace_is_over(
    begin: Callable[..., Watch], leases: FakeLeases, clock: Clock
) -> None:
    child: Any = FakeChild()
    with begin(ends_at=BEGAN_AT + 5) as watching:
        watching.look_after(child)
        clock.now += 6
        wait_until(lambda: child.told == ["terminate"], seconds=20, what="the child to be asked")
        assert watching.stop_reason is StopReason.MAX_DURATION
        clock.now += GRACE_SECONDS - 1
        looks_again(leases)
        assert child.told == ["terminate"]
        clock.now += 2
        wait_until(lambda: "kill" in child.told, seconds=20, what="the child's end")

"""What can happen to a service, each under its name; drawn from a seed, so that a run can be made again."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from graft_shared.clock import boottime
from tests.chaos.service import ServiceInTrouble
from tests.fleet import parent_of
from tests.witness import Trainer, trainers_below

FROZEN_LEASES = 2.0  # how long a frozen process stands still, in leases: another worker has the job by then
LONGEST_WAIT_SECONDS = 5.0  # for a job that runs, so that a fault has something to hit


@dataclass(frozen=True)
class Hit:
    """A fault that met a job in training; `at` is CLOCK_BOOTTIME in seconds."""

    fault: str
    at: float
    job_id: str
    epoch: int


@dataclass
class Faults:
    """Does one fault after the other; remembers which met a running job."""

    service: ServiceInTrouble
    seed: int
    gap_seconds: float  # between two faults, in the mean
    wanted: int
    sent: Counter[str] = field(default_factory=Counter)
    kills: int = 0  # kill -9, whatever it was sent to
    hits: list[Hit] = field(default_factory=list)
    _thawing: list[threading.Timer] = field(default_factory=list)

    def run(self, on_fault: Callable[[], None]) -> None:
        """Do all of them; returns when the last one is over."""
        names, weights = zip(*self._classes().items(), strict=True)
        draw = random.Random(f"{self.seed}-faults")
        while sum(self.sent.values()) < self.wanted:
            time.sleep(draw.expovariate(1 / self.gap_seconds))
            name, rank = draw.choices(names, weights)[0], draw.random()
            if self._do(name, rank):
                self.sent[name] += 1
            on_fault()
        for timer in self._thawing:
            timer.join()

    def _classes(self) -> dict[str, float]:
        classes = {
            "kill_trainer": 50,
            "kill_supervisor": 16,
            "kill_worker": 8,
            "lose_worker": 4,
            "kill_preparing_worker": 4,
            "kill_reconciler": 4,
            "kill_api": 4,
            "kill_redis": 3.5,
            "freeze_trainer": 3,
            "freeze_supervisor": 3,
            "freeze_worker": 3,
            "drain_worker": 3,
        }
        return classes | ({"stop_postgres": 3} if self.service.postgres else {})

    def _do(self, name: str, rank: float) -> bool:
        """Do one fault; False when what it needs was not there."""
        trainer = self._trainer(rank)
        if trainer is None:
            return False
        everywhere = [trainer] if name in _AT_ONE_TRAINER else trainers_below(self.service.state_dir)
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, LookupError):  # it ended in this moment
            if getattr(self, f"_{name}")(trainer, rank):
                at = boottime()
                self.hits += [Hit(name, at, hit.job_id, hit.epoch) for hit in everywhere]
                return True
        return False

    def _trainer(self, rank: float) -> Trainer | None:
        until = time.monotonic() + LONGEST_WAIT_SECONDS
        while time.monotonic() < until:
            if found := trainers_below(self.service.state_dir):
                return sorted(found, key=lambda trainer: trainer.job_id)[int(rank * len(found))]
            time.sleep(0.05)
        return None

    def _kill_trainer(self, trainer: Trainer, _rank: float) -> bool:
        return self._kill(trainer.pid)

    def _kill_supervisor(self, trainer: Trainer, _rank: float) -> bool:
        return self._kill(self._above(trainer)[0])

    def _kill_worker(self, trainer: Trainer, _rank: float) -> bool:
        return self._kill_named(trainer.worker)

    def _lose_worker(self, trainer: Trainer, _rank: float) -> bool:
        """As `kill_worker`, but it comes back when its lease has run out: others have to notice."""
        return self._kill_named(trainer.worker, away_seconds=FROZEN_LEASES * self.service.lease_seconds)

    def _kill_preparing_worker(self, _trainer: Trainer, rank: float) -> bool:
        return self._kill_named(f"prepare-{int(rank * self.service.preparers)}")

    def _kill_reconciler(self, _trainer: Trainer, rank: float) -> bool:
        return self._kill_named(f"reconciler-{int(rank * 2)}")

    def _kill_api(self, _trainer: Trainer, _rank: float) -> bool:
        return self._kill_named("api")

    def _kill_redis(self, _trainer: Trainer, _rank: float) -> bool:
        self.service.redis.flush()
        self.service.redis.stop(signal.SIGKILL)
        self.service.redis.start()
        self.kills += 1
        return True

    def _stop_postgres(self, _trainer: Trainer, _rank: float) -> bool:
        assert self.service.postgres is not None
        self.service.postgres.stop(signal.SIGQUIT)
        self.service.postgres.start()
        return True

    def _freeze_trainer(self, trainer: Trainer, _rank: float) -> bool:
        return self._freeze([trainer.pid])

    def _freeze_supervisor(self, trainer: Trainer, _rank: float) -> bool:
        return self._freeze(self._above(trainer)[:1])

    def _freeze_worker(self, trainer: Trainer, _rank: float) -> bool:
        return self._freeze([*reversed(self._above(trainer)), trainer.pid])

    def _drain_worker(self, trainer: Trainer, _rank: float) -> bool:
        return self.service.terminate(trainer.worker)

    def _above(self, trainer: Trainer) -> list[int]:
        """The processes over a trainer, its supervisor first: Celery's pool process, or else the worker's own process.

        Raises:
            ProcessLookupError: It is an orphan, about to be ended.
        """
        worker = self.service.running[trainer.worker].pid
        supervisor = parent_of(trainer.pid)
        if supervisor == worker:
            return [worker]
        if parent_of(supervisor) != worker:
            raise ProcessLookupError(trainer.pid)
        return [supervisor, worker]

    def _kill(self, pid: int) -> bool:
        os.kill(pid, signal.SIGKILL)
        self.kills += 1
        return True

    def _kill_named(self, name: str, *, away_seconds: float = 0.0) -> bool:
        killed = self.service.kill(name, away_seconds=away_seconds)
        self.kills += killed
        return killed

    def _freeze(self, pids: list[int]) -> bool:
        births = {pid: _born(pid) for pid in pids}
        timer = threading.Timer(FROZEN_LEASES * self.service.lease_seconds, _thaw, [births])
        timer.start()
        self._thawing.append(timer)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        return True


ENDS_THE_RUN = frozenset({"kill_trainer", "kill_supervisor", "kill_worker", "lose_worker", "drain_worker"})
_AT_ONE_TRAINER = ENDS_THE_RUN | {"freeze_trainer", "freeze_supervisor", "freeze_worker"}


def _thaw(births: dict[int, str]) -> None:
    for pid in _still_there(births):
        with contextlib.suppress(ProcessLookupError):  # ended since
            os.kill(pid, signal.SIGCONT)


def _still_there(births: dict[int, str]) -> Iterator[int]:
    """Those of the processes that have not ended: an id may be another process's by now."""
    for pid, born in births.items():
        with contextlib.suppress(OSError, IndexError):
            if _born(pid) == born:
                yield pid


def _born(pid: int) -> str:
    """When a process began, in clock ticks."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]

"""`python -m tests.bench.load_fleet N`: so many simulated workers, each with a job in training, until stdin is closed.

They call the store as real workers do, at the intervals that these have by default; only the training is missing. Of
the look for orders, which is most of what they ask, they do what reaches the database and no more: real workers have
machines of their own, these share one with what is measured.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from graft_shared.errors import GraftError, LeaseLost
from graft_shared.jobs import Job, Stage
from graft_shared.settings import SharedSettings
from graft_shared.store import Database, Leases, Workers, open_database
from graft_shared.store.leases import _ORDERS
from graft_shared.store.postgres import ask_in_doubt
from graft_worker.celery_app import BEAT_SECONDS
from graft_worker.settings import WorkerSettings

THREADS = 8
LATE_SECONDS = 1.0  # after it was due
GPU_CLASS = "24gb"


class Looks:
    """One thread's looks for orders: the statements that `Leases.orders` sends, over a connection that is kept."""

    def __init__(self, database: Database) -> None:
        dialect = database.engine.dialect
        self._ask = ask_in_doubt(dialect) if dialect.name == "postgresql" else None
        self._statement = _ORDERS.compile(dialect=dialect)
        self._fairy = database.engine.raw_connection()
        self._connection: Any = self._fairy.dbapi_connection
        if dialect.name == "postgresql":
            self._connection.autocommit = True

    def look(self, job: Job) -> None:
        """Raise LeaseLost if the job is no longer this epoch's."""
        if self._ask is not None:
            self._ask(self._connection, None, None)  # as a pool does before it lends one
        wanted: Any = self._statement.construct_params({"job": job.id, "by": job.epoch})
        if self._statement.positional:
            wanted = [wanted[name] for name in self._statement.positiontup or ()]
        cursor = self._connection.cursor()
        try:
            if cursor.execute(str(self._statement), wanted).fetchone() is None:
                raise LeaseLost(job_id=job.id, epoch=job.epoch)
        finally:
            cursor.close()

    def close(self) -> None:
        self._fairy.close()


@dataclass
class Fleet:
    """Simulated workers and what became of their beats."""

    database: Database
    leases: Leases
    workers: Workers
    count: int
    heartbeat: float
    orders: float
    held: dict[int, Job] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)
    late: Counter[str] = field(default_factory=Counter)
    longest: float = 0.0
    violations: list[str] = field(default_factory=list)
    _end: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take_jobs(self, classes: list[str]) -> None:
        """Bring one job a worker into training."""
        for number in range(self.count):
            self._beat(number)
            job = self.leases.claim(f"load-{number}/prepare", stage=Stage.PREPARE, gpu_classes=[])
            assert job is not None
            self.leases.hand_to_training(job.id, job.epoch, {"report": {"rows": 1000}})
            training = self.leases.claim(f"load-{number}/train", stage=Stage.TRAIN, gpu_classes=classes)
            assert training is not None
            self.held[number] = training
        for job in self.held.values():
            self.leases.renew(job.id, job.epoch)  # on a busy machine the first are old by now; nobody reconciles yet

    def run(self) -> dict[str, Any]:
        """Beat until stdin is closed; returns how that went."""
        began = time.monotonic()
        threads = [threading.Thread(target=self._work, args=(number, began)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        sys.stdin.read()
        self._end.set()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - began
        return {
            "workers": self.count,
            "seconds": round(seconds, 1),
            "heartbeats_per_second": round((self.sent["renew"] + self.sent["beat"]) / seconds, 1),
            "sent": dict(self.sent),
            "late": dict(self.late),
            "longest_delay_seconds": round(self.longest, 3),
            "violations": self.violations,
        }

    def _work(self, thread: int, began: float) -> None:
        """What the workers of one thread do, each at its own moments, spread evenly over their intervals."""
        due = []
        for number in range(thread, self.count, THREADS):
            share = number / self.count
            due.append((began + share * BEAT_SECONDS, number, "beat", BEAT_SECONDS))
            due.append((began + share * self.heartbeat, number, "renew", self.heartbeat))
            due.append((began + share * self.orders, number, "orders", self.orders))
        heapq.heapify(due)
        with contextlib.closing(Looks(self.database)) as looks:
            self._keep(due, looks)

    def _keep(self, due: list[tuple[float, int, str, float]], looks: Looks) -> None:
        while due:
            moment, number, kind, every = due[0]
            if self._end.wait(max(0.0, moment - time.monotonic())):
                return
            self._act(number, kind, looks)
            self._count(kind, time.monotonic() - moment)
            heapq.heapreplace(due, (moment + every, number, kind, every))

    def _act(self, number: int, kind: str, looks: Looks) -> None:
        job = self.held.get(number)
        if job is None:
            return  # it has lost its lease, and said so
        try:
            if kind == "beat":
                self._beat(number)
            elif kind == "renew":
                self.leases.renew(job.id, job.epoch)
            else:
                looks.look(job)
        except GraftError as error:
            self.held.pop(number)
            self.violations.append(f"{kind} of worker {number}: {error.message}")

    def _beat(self, number: int) -> None:
        self.workers.beat(
            name=f"load-{number}",
            place=f"place-{number}",
            gpu_class=GPU_CLASS,
            device="simulated",
            stages=(Stage.TRAIN,),
            takes_classes=("16gb", GPU_CLASS),
        )

    def _count(self, kind: str, delay: float) -> None:
        with self._lock:
            self.sent[kind] += 1
            self.late[kind] += delay > LATE_SECONDS
            self.longest = max(self.longest, delay)


def main() -> None:
    """Take the jobs, say so, and beat."""
    settings = SharedSettings()
    database = open_database(settings.database)
    fleet = Fleet(
        database=database,
        leases=Leases(database, settings.lease),
        workers=Workers(database),
        count=int(sys.argv[1]),
        heartbeat=settings.heartbeat_seconds,
        orders=WorkerSettings().orders_seconds,
    )
    fleet.take_jobs(["16gb", "24gb", "40gb", "48gb", "80gb", "141gb", "cpu"])
    print("ready", flush=True)
    print(json.dumps(fleet.run()))
    database.close()


if __name__ == "__main__":
    main()

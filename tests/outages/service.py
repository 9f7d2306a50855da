"""A service whose neighbours are reached through fault proxies, and what its users keep of their answers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx

from graft_shared.buckets import Bucket
from graft_shared.store import Database, Leases, open_database
from tests.chaos.clients import SAVE_STEPS, STEP_SECONDS, Submitted
from tests.chaos.judge import gather, judge, unfinished
from tests.chaos.service import ServiceInTrouble
from tests.faultproxy import FaultProxy
from tests.fleet import JSONL
from tests.servers import PostgresServer, RedisServer
from tests.waiting import wait_until

UNSCALED_LEASE_SECONDS = 60.0
RETRY_SECONDS = 0.2


@dataclass
class Outage:
    """A running service, the proxy to its Redis, and everything that was submitted to it."""

    service: ServiceInTrouble
    redis_proxy: FaultProxy
    database: Database
    submitted: list[Submitted] = field(default_factory=list)
    post_seconds: list[float] = field(default_factory=list)
    unanswered: Counter[str] = field(default_factory=Counter)  # POSTs that had to be made again, by what came
    _file_id: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def leases(self) -> Leases:
        """The workers' door to the store."""
        return Leases(self.database, timedelta(seconds=self.service.lease_seconds))

    def submit(self, *, steps: int = 20, step_seconds: float = STEP_SECONDS, **behaviour: str) -> str:
        """Post a job under a key of its own until there is an answer of 202; returns its id."""
        with self._lock:
            job = Submitted(key=f"key-{len(self.submitted)}", steps=steps)
            self.submitted.append(job)
        job.ids.add(self.post(self.spec(steps, step_seconds, **behaviour), job.key))
        return next(iter(job.ids))

    def spec(self, steps: int = 20, step_seconds: float = STEP_SECONDS, **behaviour: str) -> dict[str, Any]:
        """The body of a toy job."""
        with self._lock:
            self._file_id = self._file_id or self.service.upload(JSONL)
        metadata = {
            "witness": str(self.service.state_dir),
            "steps": str(steps),
            "step_seconds": str(step_seconds),
            "save_steps": str(SAVE_STEPS),
            **behaviour,
        }
        return {"base_model": "graft/tiny", "dataset": {"file": self._file_id}, "metadata": metadata}

    def post(self, spec: dict[str, Any], key: str) -> str:
        """Ask until there is an answer; anything but 202 or the service's own trouble is an error of this harness."""
        with httpx.Client(base_url=self.service.url, timeout=30) as http:
            while True:
                began = time.monotonic()
                try:
                    answer = http.post("/jobs", json=spec, headers={"idempotency-key": key})
                except httpx.TransportError as error:
                    self.unanswered[type(error).__name__] += 1
                else:
                    if answer.status_code == 202:
                        self.post_seconds.append(time.monotonic() - began)
                        return str(answer.json()["id"])
                    if answer.status_code < 500:
                        raise AssertionError(answer.text)
                    self.unanswered[str(answer.status_code)] += 1
                time.sleep(RETRY_SECONDS)

    def wait_for_all(self, seconds: float) -> None:
        """Wait until every job has ended; those that have not are the judge's to name."""
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: unfinished(self.database) == 0, seconds=seconds, what="the last jobs", every=0.5)

    def violations(self, bucket: Bucket | None = None) -> dict[str, list[str]]:
        """Every promise of `tests.chaos.judge`, held against the store, the bucket and the trainers' testimony."""
        evidence = gather(self.service, self.submitted, ())
        if bucket is not None:
            object.__setattr__(evidence, "bucket", bucket)
        return {promise: found[:20] for promise, found in judge(evidence).violations.items() if found}


@contextlib.contextmanager
def outage(
    folder: Path,
    *,
    database: str = "postgres",
    lease_seconds: float = UNSCALED_LEASE_SECONDS,
    trainers: int = 2,
    preparers: int = 1,
    settings: dict[str, str] | None = None,
) -> Iterator[Outage]:
    """A running service with neighbours of its own, Redis behind a proxy."""
    with contextlib.ExitStack() as ended:
        redis = RedisServer(folder / "redis").start()
        ended.callback(redis.stop)
        proxy = FaultProxy(redis.port).start()
        ended.callback(proxy.stop)
        postgres = None
        if database == "postgres":
            postgres = PostgresServer(folder / "postgres").start()
            ended.callback(postgres.stop)
        state_dir = folder / "state"
        state_dir.mkdir(parents=True, exist_ok=True)
        broker = {"GRAFT_BROKER_URL": redis.url.replace(str(redis.port), str(proxy.port))}
        service = ServiceInTrouble(
            state_dir, redis, postgres, lease_seconds, trainers, preparers, settings={**broker, **(settings or {})}
        )
        ended.callback(service.stop)
        service.start()
        opened = open_database(service.database_url)
        ended.callback(opened.close)
        yield Outage(service, proxy, opened)


def spread(numbers: Sequence[float]) -> dict[str, float]:
    """Count, median, 95th and 99th percentile and highest."""
    if not numbers:
        return {"count": 0}
    ordered = sorted(numbers)

    def rank(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)

    shares = {"p50": rank(0.5), "p95": rank(0.95), "p99": rank(0.99), "highest": round(ordered[-1], 3)}
    return {"count": len(ordered), **shares}


def above(limit: float, numbers: Sequence[float], what: str) -> list[str]:
    """A sentence for each number that is above the limit."""
    return [f"{what} took {number:.1f} s, not {limit:.0f}" for number in numbers if number > limit]

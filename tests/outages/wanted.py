"""What is asked of a scenario, and the service that it is played on."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft_shared.store import open_database
from tests.chaos.clients import Submitted
from tests.chaos.judge import Evidence, judge, unfinished
from tests.chaos.service import ServiceInTrouble
from tests.servers import PostgresServer, RedisServer
from tests.waiting import wait_until

UNSCALED_LEASE_SECONDS = 60.0
REST_LEASES = 10.0  # how long the last jobs may take once nothing goes wrong any more, in leases


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How a scenario is to be played.

    Args:
        seconds: How long the outage lasts, or how long one follows the other.
        kills: How often the API is killed, where that is what happens; or a trainer, and a whole worker.
        lease_seconds: How long a lease lasts; every other time of the service keeps its ratio to it.
    """

    db: str = "sqlite"
    seconds: float = 600.0
    kills: int = 200
    lease_seconds: float = UNSCALED_LEASE_SECONDS
    seed: int = 1


@dataclass
class Played:
    """What came of a scenario: figures for its report, and by promise what broke it."""

    figures: dict[str, Any]
    violations: dict[str, list[str]] = field(default_factory=dict)


@contextlib.contextmanager
def neighbours(folder: Path, wanted: Wanted) -> Iterator[tuple[RedisServer, PostgresServer | None]]:
    """Redis, and PostgreSQL if it is wanted."""
    with contextlib.ExitStack() as ended:
        redis = RedisServer(folder / "redis").start()
        ended.callback(redis.stop)
        postgres = None
        if wanted.db == "postgres":
            postgres = PostgresServer(folder / "postgres").start()
            ended.callback(postgres.stop)
        yield redis, postgres


@contextlib.contextmanager
def running(service: ServiceInTrouble) -> Iterator[ServiceInTrouble]:
    """Start a service, and end it."""
    service.state_dir.mkdir(parents=True, exist_ok=True)
    try:
        yield service.start()
    finally:
        service.stop()


def come_to_rest(service: ServiceInTrouble, *, seconds: float | None = None) -> float:
    """Wait until every job has ended, or for too long; return how long. The judge says which job has not."""
    began = time.monotonic()
    database = open_database(service.database_url)
    rest = REST_LEASES * service.lease_seconds if seconds is None else seconds
    try:
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: unfinished(database) == 0, seconds=rest, what="the last jobs", every=0.5)
    finally:
        database.close()
    return time.monotonic() - began


def verdict_of(evidence: Evidence) -> dict[str, list[str]]:
    """Every promise of `tests.chaos.judge`, and what broke it."""
    return dict(judge(evidence).violations)


def waits(evidence: Evidence, submitted: Sequence[Submitted]) -> dict[str, list[float]]:
    """Seconds that these jobs waited for their first run, and prepared ones for a trainer."""
    found: dict[str, list[float]] = {"submitted_to_claimed": [], "prepared_to_claimed": []}
    for job_id in (job_id for job in submitted for job_id in job.ids):
        at: dict[str, float] = {}
        for event in evidence.events[job_id]:
            stage = f"claimed {event['data']['stage']}" if event["type"] == "claimed" else event["type"]
            at.setdefault(stage, event["created_at"])
        for name, since, until in (
            ("submitted_to_claimed", "submitted", "claimed prepare"),
            ("prepared_to_claimed", "prepared", "claimed train"),
        ):
            if since in at and until in at:
                found[name].append(at[until] - at[since])
    return found


def spread(numbers: Sequence[float]) -> dict[str, float]:
    """Their count, median and largest, to a millisecond."""
    if not numbers:
        return {"count": 0}
    return {"count": len(numbers), "p50": round(statistics.median(numbers), 3), "max": round(max(numbers), 3)}

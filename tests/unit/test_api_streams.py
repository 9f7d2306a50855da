"""Live streams share one look at the database, however many there are."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

import pytest

from graft_api.jobs import watch as module
from graft_api.jobs.events import event_stream
from graft_api.jobs.watch import Place, Watch
from graft_shared.errors import JobNotFound, StoreUnavailable
from graft_shared.jobs import JobEvent
from graft_shared.store import Jobs

HERE = Place("default", "ftjob-1", 0)


@dataclass
class FakeJobs:
    """Keeps what `Watch` asks of `Jobs`, and counts."""

    history: list[JobEvent] = field(default_factory=list)
    error: Exception | None = None
    looks: int = 0
    pages: int = 0

    def newest_events(self, asked: Collection[tuple[str, str]]) -> dict[tuple[str, str], int]:
        self.looks += 1
        if isinstance(self.error, StoreUnavailable):
            raise self.error
        return {} if self.error else dict.fromkeys(asked, len(self.history))

    def events(self, tenant: str, job_id: str, *, after: int, limit: int) -> tuple[Sequence[JobEvent], bool]:
        self.pages += 1
        if self.error is not None:
            raise self.error
        return self.history[after : after + limit], False

    def say(self, *types: str) -> None:
        for type in types:
            more: dict[str, Any] = {"message": "", "level": "info", "data": {}, "created_at": datetime.now(UTC)}
            self.history.append(JobEvent(id=len(self.history) + 1, job_id="ftjob-1", epoch=1, type=type, **more))


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> FakeJobs:
    monkeypatch.setattr(module, "LOOK_EVERY_SECONDS", 0.01)
    return FakeJobs()


async def still() -> bool:
    """The key is in force all the time."""
    return True


async def read(watch: Watch) -> str:
    return "".join([chunk async for chunk in event_stream(watch, HERE, [], may_go_on=still)])


def test_a_hundred_streams_of_a_job_are_one_look_and_one_page(jobs: FakeJobs) -> None:
    async def all_of_them() -> list[str]:
        watch = Watch(cast(Jobs, jobs))
        reading = [asyncio.create_task(read(watch)) for _ in range(100)]
        await asyncio.sleep(0)
        jobs.say("submitted", "claimed", "succeeded")
        return await asyncio.gather(*reading)

    streams = asyncio.run(all_of_them())
    assert [stream.count("\nid: ") for stream in streams] == [3] * 100
    assert (jobs.looks, jobs.pages) == (1, 1)


@pytest.mark.parametrize("error", [StoreUnavailable(reason="away"), JobNotFound(job_id="ftjob-1")])
def test_a_stream_ends_when_the_database_is_away_or_the_job_is_deleted(jobs: FakeJobs, error: Exception) -> None:
    jobs.error = error
    assert "id: " not in asyncio.run(asyncio.wait_for(read(Watch(cast(Jobs, jobs))), 10))


def test_nobody_looks_once_nobody_waits(jobs: FakeJobs) -> None:
    async def leave() -> None:
        watch = Watch(cast(Jobs, jobs))
        assert await watch.behind(HERE, seconds=0.05) == ()
        await asyncio.sleep(0.05)
        looks = jobs.looks
        assert looks > 0
        await asyncio.sleep(0.1)
        assert jobs.looks == looks

    asyncio.run(leave())

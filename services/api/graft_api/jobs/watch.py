"""One look for all live streams of this process: a stream that waits holds neither a thread nor a connection."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from starlette.concurrency import run_in_threadpool

from graft_api.jobs.schemas import event_body
from graft_shared.errors import JobNotFound, NeighbourUnavailable
from graft_shared.jobs import TERMINAL_STATES, JobEvent
from graft_shared.store import Jobs

LOOK_EVERY_SECONDS = 0.5
_PAGE = 500

_TERMINAL_TYPES = frozenset(state.value for state in TERMINAL_STATES)


class Place(NamedTuple):
    """Where a stream is: behind this event of this job."""

    tenant: str
    job_id: str
    after: int


class Line(NamedTuple):
    """One event as it is sent; written once, however many read it."""

    id: int
    text: str
    is_last: bool


def line_of(event: JobEvent) -> Line:
    """An event in the words of server-sent events."""
    text = f"id: {event.id}\nevent: {event.type}\ndata: {event_body(event).model_dump_json()}\n\n"
    return Line(event.id, text, event.type in _TERMINAL_TYPES)


class Watch:
    """Waits for the events of any number of jobs, for any number of streams; looks only while somebody waits."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._waiting: dict[Place, set[asyncio.Future[Sequence[Line]]]] = {}
        self._looker: asyncio.Task[None] | None = None

    async def behind(self, place: Place, *, seconds: float) -> Sequence[Line]:
        """The next lines behind a place, as soon as there are any; none after so many seconds.

        Raises:
            NeighbourUnavailable, JobNotFound: What the look for it found.
        """
        future: asyncio.Future[Sequence[Line]] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(place, set()).add(future)
        if self._looker is None or self._looker.done():
            self._looker = asyncio.create_task(self._look_on())
        try:
            return await asyncio.wait_for(future, seconds)
        except TimeoutError:
            return ()
        finally:
            self._forget(place, future)

    def _forget(self, place: Place, future: asyncio.Future[Sequence[Line]]) -> None:
        waiting = self._waiting.get(place, set())
        waiting.discard(future)
        if not waiting:
            self._waiting.pop(place, None)

    async def _look_on(self) -> None:
        while self._waiting:
            await asyncio.sleep(LOOK_EVERY_SECONDS)
            places = list(self._waiting)
            try:
                found = await run_in_threadpool(self._look, places)
            except NeighbourUnavailable as error:
                found = dict.fromkeys(places, error)
            for place, outcome in found.items():
                for future in self._waiting.pop(place, set()):
                    _answer(future, outcome)

    def _look(self, places: Sequence[Place]) -> dict[Place, Sequence[Line] | Exception]:
        """What there is behind these places; nothing of those where nothing has happened."""
        newest = self._jobs.newest_events({(place.tenant, place.job_id) for place in places})
        found: dict[Place, Sequence[Line] | Exception] = {}
        for place in places:
            if newest.get((place.tenant, place.job_id), place.after + 1) > place.after:
                found[place] = self._lines(place)
        return found

    def _lines(self, place: Place) -> Sequence[Line] | Exception:
        try:
            page, _ = self._jobs.events(place.tenant, place.job_id, after=place.after, limit=_PAGE)
        except JobNotFound as error:  # deleted meanwhile
            return error
        return [line_of(event) for event in page]


def _answer(future: asyncio.Future[Sequence[Line]], outcome: Sequence[Line] | Exception) -> None:
    if future.done():  # its stream has gone
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)

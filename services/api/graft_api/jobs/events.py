"""A job's history as a page or as a live stream of server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

from starlette.concurrency import run_in_threadpool

from graft_api.jobs.views import event_body
from graft_shared.errors import NeighbourUnavailable
from graft_shared.jobs import TERMINAL_STATES, JobEvent
from graft_shared.store import Jobs

LOOK_EVERY_SECONDS = 0.5
HEARTBEAT_SECONDS = 15.0  # proxies close a connection that is silent for 30 to 60 s
RECONNECT_MILLISECONDS = 2000
_PAGE = 500

_TERMINAL_TYPES = frozenset(state.value for state in TERMINAL_STATES)


def all_events(jobs: Jobs, tenant: str, job_id: str) -> Iterator[JobEvent]:
    """A job's whole history so far, oldest first, read page by page."""
    after, has_more = 0, True
    while has_more:
        page, has_more = jobs.events(tenant, job_id, after=after, limit=_PAGE)
        yield from page
        after = page[-1].id if page else after


async def event_stream(
    jobs: Jobs,
    tenant: str,
    job_id: str,
    first: Sequence[JobEvent],
    *,
    after: int,
    may_go_on: Callable[[], Awaitable[bool]],
) -> AsyncIterator[str]:
    """Server-sent events from behind `after` to the job's end, or that of the key that asked for them.

    When the database goes away the stream ends; the browser comes back with `Last-Event-ID` and misses nothing.

    Args:
        first: What was found behind `after` already.
        may_go_on: Asked before each further look.
    """
    yield f"retry: {RECONNECT_MILLISECONDS}\n\n"
    page, said = first, time.monotonic()
    while True:
        for event in page:
            yield f"id: {event.id}\nevent: {event.type}\ndata: {event_body(event).model_dump_json()}\n\n"
            after, said = event.id, time.monotonic()
            if event.type in _TERMINAL_TYPES:
                return
        if not page:
            if time.monotonic() > said + HEARTBEAT_SECONDS:
                yield ": still here\n\n"
                said = time.monotonic()
            await asyncio.sleep(LOOK_EVERY_SECONDS)
        try:
            if not await may_go_on():
                return
            page, _ = await run_in_threadpool(jobs.events, tenant, job_id, after=after, limit=_PAGE)
        except NeighbourUnavailable:
            return

"""A job's history as a page or as a live stream of server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

from graft_api.jobs.watch import Line, Place, Watch, line_of
from graft_shared.errors import JobNotFound, NeighbourUnavailable
from graft_shared.jobs import JobEvent
from graft_shared.store import Jobs

HEARTBEAT_SECONDS = 15.0  # proxies close a connection that is silent for 30 to 60 s
RECONNECT_MILLISECONDS = 2000
_PAGE = 500


def all_events(jobs: Jobs, tenant: str, job_id: str) -> Iterator[JobEvent]:
    """A job's whole history so far, oldest first, read page by page."""
    after, has_more = 0, True
    while has_more:
        page, has_more = jobs.events(tenant, job_id, after=after, limit=_PAGE)
        yield from page
        after = page[-1].id if page else after


async def event_stream(
    watch: Watch, place: Place, first: Sequence[JobEvent], *, may_go_on: Callable[[], Awaitable[bool]]
) -> AsyncIterator[str]:
    """Server-sent events from behind a place to the job's end, or that of the key that asked for them.

    When the database goes away the stream ends; the browser comes back with `Last-Event-ID` and misses nothing.

    Args:
        first: What was found there already.
        may_go_on: Asked before anything more is told.
    """
    yield f"retry: {RECONNECT_MILLISECONDS}\n\n"
    lines: Sequence[Line] = [line_of(event) for event in first]
    while not (lines and lines[-1].is_last):
        if lines:
            yield "".join(line.text for line in lines)
            place = place._replace(after=lines[-1].id)
        else:
            yield ": still here\n\n"
        try:
            lines = await watch.behind(place, seconds=HEARTBEAT_SECONDS)
            if not await may_go_on():
                return
        except (NeighbourUnavailable, JobNotFound):
            return
    yield "".join(line.text for line in lines)

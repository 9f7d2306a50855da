"""Finding the job that a request without a key has made already, when its client sends it again.

Some clients name no `Idempotency-Key` but count how often they have sent a request. Of the sendings of one request the
first commit wins, in whatever order they arrive: a sending that is a repetition is given the newest job of the same
body that was made since the request may have been sent first; the first sending, which may be slow, the job that a
repetition made while it was on its way. Two first sendings are two requests, and make two jobs.

A repetition cannot tell which of two equal requests it belongs to. When both are younger than the client's patience it
is given the newer one's job, and where that request never arrived, the user has one job and not two: of the two
mistakes the one that trains nothing twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.engine import Connection, RowMapping

from graft_shared.store.tables import jobs

CLOCK_GRAIN_SECONDS = 0.002  # SQLite's clock counts milliseconds, and times are rounded on their way


@dataclass(frozen=True, kw_only=True)
class Sending:
    """One sending of a request that has no key.

    Args:
        sent_before: How often the client had sent it before.
        first_at: When it was sent first, or the earliest moment at which that can have been; by the database's clock.
    """

    sent_before: int
    first_at: datetime


def made_before(connection: Connection, tenant: str, request_sha256: str, sending: Sending) -> RowMapping | None:
    """The row of the job that an earlier or faster sending of this request has made, if any."""
    counted = jobs.c.sent_before.is_not(None) if sending.sent_before else jobs.c.sent_before > 0
    query = select(jobs).where(
        jobs.c.tenant == tenant,
        jobs.c.created_at >= sending.first_at.timestamp() - CLOCK_GRAIN_SECONDS,
        jobs.c.request_sha256 == request_sha256,
        jobs.c.deleted_at.is_(None),
        counted,
    )
    return connection.execute(query.order_by(jobs.c.created_at.desc()).limit(1)).mappings().one_or_none()

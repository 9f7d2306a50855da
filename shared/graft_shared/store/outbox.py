"""Webhooks to be sent: each lies here since the commit that ended its job, until it is delivered or given up."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Update, insert, select, update
from sqlalchemy.engine import Connection, RowMapping

from graft_shared.errors import JobNotFound
from graft_shared.ids import new_webhook_id
from graft_shared.jobs import JobState
from graft_shared.store.engine import Database, as_datetime, now
from graft_shared.store.rows import is_there
from graft_shared.store.tables import jobs, webhooks

SENDING = timedelta(seconds=60)  # how long one sender has a webhook for itself; longer than any delivery takes
PAUSES = (5, 30, 300, 1800, 7200, 21_600, 43_200, 86_400)  # seconds after each try that failed; then it is given up
SAID_CHARACTERS = 500


@dataclass(frozen=True, kw_only=True)
class Webhook:
    """One message about a job's end, and how far it has come."""

    id: str
    job_id: str
    tenant: str
    url: str
    type: str
    tries: int
    said: str | None  # what went wrong the last time
    created_at: datetime
    next_try_at: datetime | None
    delivered_at: datetime | None


def put_in_outbox(connection: Connection, row: RowMapping, ended: JobState) -> None:
    """Write down what is to be sent, in the transaction that ends the job; nothing if nobody asked for it."""
    url = row["spec"].get("webhook_url")
    if url is None:
        return
    connection.execute(
        insert(webhooks).values(
            id=new_webhook_id(),
            job_id=row["id"],
            tenant=row["tenant"],
            url=url,
            type=f"fine_tuning.job.{ended.value}",
            tries=0,
            created_at=now(),
            next_try_at=now(),
        )
    )


class Outbox:
    """Webhooks as their senders see them, any number of them; and as their tenants do."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def take(self, *, limit: int) -> list[Webhook]:
        """Take those that have been due for longest; a sender that dies over one loses it to others after a while."""
        due = select(webhooks.c.id).where(webhooks.c.next_try_at <= now()).order_by(webhooks.c.next_try_at).limit(limit)
        with self._database.reading() as connection:  # most of the time there are none: nobody is kept from writing
            if connection.execute(due.limit(1)).scalar_one_or_none() is None:
                return []
        with self._database.writing() as connection:
            ids = connection.execute(due.with_for_update(skip_locked=True)).scalars().all()
            taken = (
                update(webhooks)
                .where(webhooks.c.id.in_(ids))
                .values(next_try_at=now() + SENDING.total_seconds(), tries=webhooks.c.tries + 1)
                .returning(webhooks)
            )
            return [_webhook_from(row) for row in connection.execute(taken).mappings()] if ids else []

    def delivered(self, webhook: Webhook) -> None:
        """Say that its receiver has taken it."""
        with self._database.writing() as connection:
            connection.execute(_of(webhook).values(delivered_at=now(), next_try_at=None, said=None))

    def failed(self, webhook: Webhook, said: str, *, finally_: bool = False) -> None:
        """Say why it was not taken: it is tried again later, or given up after the last try or `finally_`."""
        again = webhook.tries <= len(PAUSES) and not finally_
        pause = now() + PAUSES[webhook.tries - 1] if again else None
        with self._database.writing() as connection:
            connection.execute(_of(webhook).values(next_try_at=pause, said=said[:SAID_CHARACTERS]))

    def of_job(self, tenant: str, job_id: str) -> list[Webhook]:
        """What is or was to be sent about a job; nothing before its end.

        Raises:
            JobNotFound: No such job, or another tenant's.
        """
        with self._database.reading() as connection:
            known = select(jobs.c.id).where(jobs.c.tenant == tenant, jobs.c.id == job_id, is_there())
            if connection.execute(known).scalar_one_or_none() is None:
                raise JobNotFound(job_id=job_id)
            found = select(webhooks).where(webhooks.c.job_id == job_id).order_by(webhooks.c.created_at)
            return [_webhook_from(row) for row in connection.execute(found).mappings()]


def _of(webhook: Webhook) -> Update:
    """The row, if it is still in the hands of whoever took it then, and not delivered meanwhile."""
    return update(webhooks).where(
        webhooks.c.id == webhook.id, webhooks.c.tries == webhook.tries, webhooks.c.delivered_at.is_(None)
    )


def _webhook_from(row: RowMapping) -> Webhook:
    return Webhook(
        id=row["id"],
        job_id=row["job_id"],
        tenant=row["tenant"],
        url=row["url"],
        type=row["type"],
        tries=row["tries"],
        said=row["said"],
        created_at=as_datetime(row["created_at"]),
        next_try_at=as_datetime(row["next_try_at"]) if row["next_try_at"] is not None else None,
        delivered_at=as_datetime(row["delivered_at"]) if row["delivered_at"] is not None else None,
    )

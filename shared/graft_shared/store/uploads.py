"""How long bytes that were announced may take to come and to get their row."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import ColumnElement

from graft_shared.store.engine import now
from graft_shared.store.tables import uploads

UPLOAD_LIFE = timedelta(days=1)  # an upload that is older is given up, and what it wrote removed


def is_lost() -> ColumnElement[bool]:
    """Whether an upload is older than that."""
    return uploads.c.started_at < now() - UPLOAD_LIFE.total_seconds()

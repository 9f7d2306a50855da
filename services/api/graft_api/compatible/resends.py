"""Telling a request that OpenAI's client sends again from a new one.

The client (3.57, and every one before it) tries a POST again by itself after a lost connection, a timeout, 408, 409,
429 and 5xx, and sends no `Idempotency-Key`; what it sends is how often it has tried, and how long it waits for an
answer. `graft_shared.store.resends` tells what becomes of that.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from graft_shared.store import Sending

USUAL_PATIENCE_SECONDS = 600.0  # the client's read timeout, where it does not say another
LONGEST_PATIENCE_SECONDS = 86_400.0
LONGEST_PAUSE_SECONDS = 120.0  # between two tries: the longest `Retry-After` that the client heeds


def sending_of(sent_before: int | None, patience_seconds: float | None, arrived_at: datetime) -> Sending | None:
    """How a request without a key was sent; None where its client does not count.

    Args:
        sent_before: The header `x-stainless-retry-count`.
        patience_seconds: The header `x-stainless-read-timeout`.
        arrived_at: By the database's clock.
    """
    if sent_before is None:
        return None
    patience = min(patience_seconds or USUAL_PATIENCE_SECONDS, LONGEST_PATIENCE_SECONDS)
    earlier = timedelta(seconds=sent_before * (patience + LONGEST_PAUSE_SECONDS))
    return Sending(sent_before=sent_before, first_at=arrived_at - earlier)

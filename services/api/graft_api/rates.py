"""How often a tenant may ask: so many requests in any minute, counted by each API process for itself."""

from __future__ import annotations

import math
import time

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.datastructures import State

from graft_api.errors import RateLimited


class Rates:
    """The requests of the last minute, by tenant.

    Args:
        per_minute: None is no limit.
    """

    def __init__(self, per_minute: int | None) -> None:
        self._limit = RateLimitItemPerMinute(per_minute) if per_minute is not None else None
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def take(self, tenant: str, answer: State) -> None:
        """Count one request, and leave word of what remains for the head of its answer.

        Raises:
            RateLimited: It is one too many.
        """
        if self._limit is None:
            return
        is_within = self._limiter.hit(self._limit, tenant)
        window = self._limiter.get_window_stats(self._limit, tenant)
        seconds = max(1, math.ceil(window.reset_time - time.time()))  # until the oldest of them is a minute old
        answer.headers = {
            "x-ratelimit-limit-requests": str(self._limit.amount),
            "x-ratelimit-remaining-requests": str(window.remaining),
            "x-ratelimit-reset-requests": f"{seconds}s",
        }
        if not is_within:
            raise RateLimited(limit=self._limit.amount, retry_after_seconds=seconds)

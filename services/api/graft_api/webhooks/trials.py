"""How many webhooks are tried at once: a receiver that never answers holds a thread that other requests need."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from graft_api.errors import TooManyWebhookTests

MOST_AT_ONCE = 4  # of the 40 threads that every route shares; one of each tenant
AGAIN_SECONDS = 10


class Trials:
    """The tries that are under way in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tenants: set[str] = set()

    @contextmanager
    def one_of(self, tenant: str) -> Iterator[None]:
        """Hold a place for as long as the try takes.

        Raises:
            TooManyWebhookTests: The tenant has one under way, or all together have as many as may be.
        """
        with self._lock:
            if tenant in self._tenants or len(self._tenants) >= MOST_AT_ONCE:
                raise TooManyWebhookTests(retry_after_seconds=AGAIN_SECONDS)
            self._tenants.add(tenant)
        try:
            yield
        finally:
            with self._lock:
                self._tenants.discard(tenant)

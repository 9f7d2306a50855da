"""Bells rung beside the requests: a broker that is away must cost neither an answer nor a thread that answers."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

from graft_shared.dispatch import Doorbell, queue_for
from graft_shared.errors import NeighbourUnavailable
from graft_shared.jobs import Job
from graft_shared.logs import log_event
from graft_shared.store import Leases

MAX_WAITING = 100  # bells; a dead broker takes seconds for each, and the reconciler rings whatever was dropped

logger = logging.getLogger(__name__)


class Bells:
    """Rings for committed jobs, in order, on a thread of its own."""

    def __init__(self, doorbell: Doorbell, leases: Leases) -> None:
        self._doorbell = doorbell
        self._leases = leases
        self._ringer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bells")
        self._room = threading.BoundedSemaphore(MAX_WAITING)

    def ring(self, job: Job) -> None:
        """Wake a worker soon. Never raises and never waits."""
        if self._room.acquire(blocking=False):
            self._ringer.submit(self._ring, job)
        else:
            log_event(logger, "bell_dropped", level=logging.WARNING, job_id=job.id)

    def close(self) -> None:
        """Drop what has not been rung."""
        self._ringer.shutdown(wait=False, cancel_futures=True)

    def _ring(self, job: Job) -> None:
        try:
            if self._doorbell.ring(job.id, queue_for(job.stage, job.gpu_class)):
                self._leases.mark_rung(job.id)
        except NeighbourUnavailable as error:
            log_event(logger, "bell_not_marked", level=logging.WARNING, job_id=job.id, reason=error.message)
        finally:
            self._room.release()

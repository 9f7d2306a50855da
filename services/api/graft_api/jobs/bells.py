"""Bells rung beside the requests: a broker that is away must cost neither an answer nor a thread that answers.

Who is at work goes on until nothing is left to do, and needs no bell: it would lie in a queue and wake it for nothing.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from graft_shared.dispatch import Doorbell, queue_for
from graft_shared.errors import NeighbourUnavailable
from graft_shared.jobs import Job, Stage
from graft_shared.logs import log_event
from graft_shared.store import Leases, Report, Workers

MAX_WAITING = 100  # bells; a dead broker takes seconds for each, and the reconciler rings whatever was dropped
LOOKS_APART_SECONDS = 0.1  # at the fleet: whoever is committed meanwhile is rung for together
MARKED_AFTER_SECONDS = 0.25  # all that were rung meanwhile, in one transaction, because each waits for the disk

Item = TypeVar("Item")

logger = logging.getLogger(__name__)


class Bells:
    """Rings for committed jobs, in order, on a thread of its own, as far as there are idle workers to hear it.

    A second thread tells the store which were rung. Until then the reconciler may ring again for a job.
    """

    def __init__(self, doorbell: Doorbell, leases: Leases, workers: Workers) -> None:
        self._doorbell = doorbell
        self._leases = leases
        self._workers = workers
        self._look_at = -math.inf  # monotonic; not before
        self._ringer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bells")
        self._marker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bells-rung")
        self._waiting: deque[Job] = deque()
        self._reports: deque[str] = deque()
        self._rung: deque[str] = deque()  # and not marked
        self._closed = threading.Event()

    def ring(self, job: Job) -> None:
        """Wake a worker soon. Never raises and never waits."""
        if len(self._waiting) < MAX_WAITING:
            self._waiting.append(job)
            _hand_to(self._ringer, self._ring_for_the_idle)
        else:
            log_event(logger, "bell_dropped", level=logging.WARNING, job_id=job.id)

    def ring_for_report(self, report: Report) -> None:
        """Wake a worker that prepares data; a bell that is lost costs the time until one looks for work by itself."""
        if len(self._reports) < MAX_WAITING:
            self._reports.append(report.id)
            _hand_to(self._ringer, self._ring_for_a_report)

    def close(self) -> None:
        """Drop what has not been rung, and leave what has unmarked."""
        self._closed.set()
        self._waiting.clear()
        self._reports.clear()
        for thread in (self._ringer, self._marker):
            thread.shutdown(wait=False, cancel_futures=True)

    def _ring_for_the_idle(self) -> None:
        """Look who is idle, for all that wait by now; whoever comes after that finds nothing to do."""
        if not self._waiting:
            return
        self._closed.wait(max(0.0, self._look_at - time.monotonic()))
        waiting = _taken_from(self._waiting)
        for job in self._heard(waiting):
            _hand_to(self._ringer, self._ring_one, job)  # one by one: none is lost with another, none holds up the end
        self._look_at = time.monotonic() + LOOKS_APART_SECONDS

    def _heard(self, waiting: list[Job]) -> list[Job]:
        """Those for which a worker is idle, each another one, after they were committed.

        One that goes idle later has looked for work since; of a store that does not tell, all are rung for.
        """
        try:
            idle = self._workers.idle()
        except NeighbourUnavailable:
            return waiting
        idle.sort(key=lambda worker: len(worker.takes_classes))  # who could take more is left for more
        heard = []
        for job in waiting:
            able = next((worker for worker in idle if worker.takes(job.stage, job.gpu_class)), None)
            if able is not None:
                idle.remove(able)
                heard.append(job)
        return heard

    def _ring_one(self, job: Job) -> None:
        if self._doorbell.ring(job.id, queue_for(job.stage, job.gpu_class)):
            self._rung.append(job.id)
            _hand_to(self._marker, self._mark_all)

    def _ring_for_a_report(self) -> None:
        with contextlib.suppress(IndexError):  # closed meanwhile
            self._doorbell.ring(self._reports.popleft(), queue_for(Stage.PREPARE, ""))

    def _mark_all(self) -> None:
        """Mark all that were rung, a moment later; whoever comes after that finds nothing to do."""
        if not self._rung or self._closed.wait(MARKED_AFTER_SECONDS):
            return
        rung = _taken_from(self._rung)
        try:
            self._leases.mark_rung(*rung)
        except NeighbourUnavailable as error:
            log_event(logger, "bells_not_marked", level=logging.WARNING, job_ids=rung, reason=error.message)


def _hand_to(thread: ThreadPoolExecutor, work: Callable[..., Any], *arguments: Any) -> None:
    """Have it done there; what it raises is logged, and the reconciler rings for what was not."""
    with contextlib.suppress(RuntimeError):  # closed meanwhile
        thread.submit(work, *arguments).add_done_callback(_tell)


def _tell(done: Future[Any]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        logger.error("bells_failed", exc_info=error)


def _taken_from(waiting: deque[Item]) -> list[Item]:
    """All that are there by now; whoever closes may empty it meanwhile."""
    taken: list[Item] = []
    with contextlib.suppress(IndexError):
        while True:
            taken.append(waiting.popleft())
    return taken

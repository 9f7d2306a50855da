"""The watch: renews the lease beside the child, carries orders to it, and ends it when it may not go on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from graft_shared.clock import boottime
from graft_shared.errors import LeaseLost
from graft_shared.logs import log_event
from graft_shared.store import Orders
from graft_worker.protocol import DEADLINE_SHARE, write_deadline
from graft_worker.supervisor.child import Child

logger = logging.getLogger(__name__)


class Leases(Protocol):
    """What a watch asks of the store: jobs' leases and those of reports are held in the same way."""

    def renew(self, id: str, epoch: int, /) -> Orders:
        """Hold the lease for another full length; raises LeaseLost."""

    def orders(self, id: str, epoch: int, /) -> Orders:
        """Look without renewing; raises LeaseLost."""


class StopReason(StrEnum):
    """Why a child is told to leave."""

    CANCEL = "cancel"
    PAUSE = "pause"
    DRAIN = "drain"
    LEASE_LOST = "lease_lost"
    MAX_DURATION = "max_duration"


SAVING_STOPS = frozenset({StopReason.PAUSE, StopReason.DRAIN})  # the run goes on later: a graver reason may follow


@dataclass(frozen=True, kw_only=True)
class WatchTimes:
    """The watch's intervals, in seconds."""

    lease: float
    heartbeat: float
    orders: float
    stop_grace: float


class Watch:
    """Watches over one epoch, from before the child starts until after the job is settled."""

    def __init__(
        self,
        leases: Leases,
        job_id: str,
        epoch: int,
        workdir: Path,
        *,
        times: WatchTimes,
        draining: Callable[[], bool],
        ends_at: float | None,
    ) -> None:
        self._leases = leases
        self._job_id = job_id
        self._epoch = epoch
        self._workdir = workdir
        self._times = times
        self._draining = draining
        self._ends_at = ends_at
        self._child: Child | None = None
        self._stop_reason: StopReason | None = None
        self._stop_at = 0.0
        self._done = threading.Event()
        self._renewed_at = 0.0
        self._deadline = 0.0
        in_context = copy_context().run  # what it logs is about the same run
        self._thread = threading.Thread(target=in_context, args=(self._run,), name=f"watch-{job_id}", daemon=True)

    def __enter__(self) -> Watch:
        self._renew()
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def stop_reason(self) -> StopReason | None:
        """Why the child was told to leave; None while it may go on."""
        return self._stop_reason

    def look_after(self, child: Child | None) -> None:
        """From now on, orders reach this child; None once it has ended."""
        self._child = child
        if child is not None and self._stop_reason is not None:
            child.terminate()  # told to stop while it was being started

    def _run(self) -> None:
        while not self._done.wait(self._times.orders):
            reason = self._reason_to_stop()
            if reason is not None and self._stop_reason in (None, *SAVING_STOPS):
                self._order_stop(reason)
            self._kill_a_straggler()

    def _reason_to_stop(self) -> StopReason | None:
        try:
            due = boottime() >= self._renewed_at + self._times.heartbeat
            orders = self._renew() if due else self._leases.orders(self._job_id, self._epoch)
        except LeaseLost:
            return StopReason.LEASE_LOST
        except Exception as error:  # noqa: BLE001 (a watch that died would leave a child without lease and without orders)
            log_event(logger, "renewal_failed", level=logging.WARNING, job_id=self._job_id, reason=str(error))
            return StopReason.LEASE_LOST if boottime() > self._deadline else None
        if orders.cancel:
            return StopReason.CANCEL
        if orders.pause:
            return StopReason.PAUSE
        if self._ends_at is not None and boottime() > self._ends_at:
            return StopReason.MAX_DURATION
        return StopReason.DRAIN if self._draining() else None

    def _renew(self) -> Orders:
        """Renew the lease and tell the child its new deadline."""
        before = boottime()  # taken before the request, so that a slow answer shortens the deadline, never the safety
        orders = self._leases.renew(self._job_id, self._epoch)
        self._renewed_at = before
        self._deadline = before + DEADLINE_SHARE * self._times.lease
        write_deadline(self._workdir, self._deadline)
        return orders

    def _order_stop(self, reason: StopReason) -> None:
        if self._stop_reason is reason:
            return
        self._stop_at = self._stop_at or boottime()
        self._stop_reason = reason
        if self._child is not None:
            log_event(logger, "child_told_to_stop", job_id=self._job_id, epoch=self._epoch, reason=reason.value)
            self._child.kill() if reason is StopReason.LEASE_LOST else self._child.terminate()

    def _kill_a_straggler(self) -> None:
        overdue = self._stop_reason is not None and boottime() > self._stop_at + self._times.stop_grace
        if overdue and self._child is not None:
            self._child.kill()

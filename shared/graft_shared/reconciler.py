"""`python -m graft_shared.reconciler`: expired leases back, lost bells rung, the bucket swept, webhooks sent.

Any number may run.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from graft_shared.buckets import open_bucket
from graft_shared.dispatch import CeleryDoorbell, Doorbell, queue_for
from graft_shared.errors import StoreUnavailable
from graft_shared.logs import configure_logging, log_event
from graft_shared.metrics import (
    EXPIRED_LEASES,
    LOST_BELLS,
    RECONCILER,
    await_first_passes,
    counted_pass,
    serve_metrics,
)
from graft_shared.settings import SharedSettings
from graft_shared.store import Files, Leases, Outbox, Sweeps, Workers, open_database
from graft_shared.sweeper import Sweeper
from graft_shared.webhooks import Postman, WebhookSender

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reconciler:
    """One pass at a time over what time has left behind."""

    leases: Leases
    workers: Workers
    doorbell: Doorbell
    bell_again: timedelta

    def reconcile(self) -> None:
        """Give expired leases back, then ring for queued jobs whose bell is old, one for each idle worker.

        A job that no idle worker may take gets no bell: it would lie in a queue that nobody empties.

        Raises:
            StoreUnavailable: The database does not answer; the next pass will do.
        """
        for job in self.leases.release_expired():
            EXPIRED_LEASES.inc()
            log_event(logger, "lease_expired", job_id=job.id, epoch=job.epoch, state=job.state.value)
        self.workers.forget_dead()
        for bell in self.leases.take_lost_bells(self.bell_again, self.workers.idle()):
            queue = queue_for(bell.stage, bell.gpu_class)
            rung = self.doorbell.ring(bell.job_id, queue)
            LOST_BELLS.inc()
            log_event(logger, "bell_rung_again", level=logging.DEBUG, job_id=bell.job_id, queue=queue, rung=rung)

    def run(self, every: timedelta, stop: threading.Event, passed: Path | None = None) -> None:
        """Reconcile until `stop`; a database that is away is waited for.

        Args:
            passed: A file to touch after each pass, so that a health check can see when the last one was; its
                neighbour with `.tried` behind the name is touched after those that were postponed, too.
        """
        while not stop.wait(every.total_seconds()):
            try:
                with counted_pass("reconcile"):
                    self.reconcile()
                if passed is not None:
                    passed.touch()
            except StoreUnavailable as error:
                log_event(logger, "reconcile_postponed", level=logging.WARNING, reason=error.message)
            if passed is not None:
                passed.with_name(f"{passed.name}.tried").touch()


def run_beside(stop: threading.Event, *loops: Callable[[], None]) -> None:
    """Run loops beside each other until `stop`: a bucket that answers slowly must not keep a lease from expiring.

    What one of them raises ends all of them, and this process with them.
    """
    with ThreadPoolExecutor(max_workers=len(loops)) as threads:
        running = [threads.submit(loop) for loop in loops]
        wait(running, return_when=FIRST_EXCEPTION)
        stop.set()
    for loop in running:
        loop.result()


def main() -> None:
    """Run with the configured neighbours until SIGTERM or SIGINT."""
    settings = SharedSettings()
    configure_logging(settings.log_format)
    await_first_passes()
    serve_metrics(settings, RECONCILER)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    database = open_database(settings.database)
    leases = Leases(database, settings.lease)
    reconciler = Reconciler(
        leases=leases,
        workers=Workers(database),
        doorbell=CeleryDoorbell(settings.broker_url),
        bell_again=timedelta(seconds=settings.bell_again_seconds),
    )
    sweeper = Sweeper(
        sweeps=Sweeps(database),
        leases=leases,
        files=Files(database),
        bucket=open_bucket(settings),
        grace=settings.sweep_grace,
    )
    loops = [
        lambda: reconciler.run(timedelta(seconds=settings.reconcile_seconds), stop, settings.reconciler_passed_path),
        lambda: sweeper.run(timedelta(seconds=settings.sweep_seconds), stop),
    ]
    postman = Postman.of(settings)
    if postman is not None:
        sender = WebhookSender(outbox=Outbox(database), postman=postman)
        loops.append(lambda: sender.run(stop))
    log_event(logger, "reconciler_started")
    run_beside(stop, *loops)
    database.close()
    log_event(logger, "reconciler_stopped")


if __name__ == "__main__":
    main()

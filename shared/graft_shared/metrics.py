"""What a reconciler counts for Prometheus, and how any process shows its figures on a port of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, start_http_server

from graft_shared.errors import NeighbourUnavailable
from graft_shared.logs import log_event
from graft_shared.settings import SharedSettings

RECONCILER = CollectorRegistry()

PASSES = Counter(
    "graft_reconciler_passes",
    "Passes by what they were for (`reconcile`, `sweep`) and outcome (`done`; `postponed`: a neighbour was away).",
    ["kind", "outcome"],
    registry=RECONCILER,
)
PASS_SECONDS = Histogram(
    "graft_reconciler_pass_duration_seconds", "How long a pass took.", ["kind"], registry=RECONCILER
)
LAST_PASS = Gauge(
    "graft_reconciler_last_pass_timestamp_seconds",
    "When a pass was last done; before the first one, when the process began.",
    ["kind"],
    registry=RECONCILER,
)
EXPIRED_LEASES = Counter(
    "graft_reconciler_expired_leases", "Leases taken back from workers that were not heard of.", registry=RECONCILER
)
LOST_BELLS = Counter("graft_reconciler_lost_bells", "Bells rung again for jobs that still wait.", registry=RECONCILER)
REMOVED_OBJECTS = Counter(
    "graft_reconciler_removed_objects", "Objects that were swept from the bucket.", registry=RECONCILER
)
WEBHOOK_TRIES = Counter(
    "graft_webhook_tries",
    "Webhooks sent, by outcome: `taken`, `not_taken` (tried again later, a few times) or `refused` (never sent).",
    ["outcome"],
    registry=RECONCILER,
)
for _outcome in ("taken", "not_taken", "refused"):  # from 0 on, or the first one would be no increase
    WEBHOOK_TRIES.labels(_outcome)

logger = logging.getLogger(__name__)


def await_first_passes() -> None:
    """Have passes missed from now on: a process that has done none yet would tell nothing, and an alert end with it."""
    for kind in ("reconcile", "sweep"):
        LAST_PASS.labels(kind).set_to_current_time()


@contextmanager
def counted_pass(kind: str) -> Iterator[None]:
    """Count a pass, time it, and remember when it was done."""
    with PASS_SECONDS.labels(kind).time():
        try:
            yield
        except NeighbourUnavailable:
            PASSES.labels(kind, "postponed").inc()
            raise
    PASSES.labels(kind, "done").inc()
    LAST_PASS.labels(kind).set_to_current_time()


def serve_metrics(settings: SharedSettings, figures: CollectorRegistry) -> None:
    """Answer Prometheus on the port that the operator has set, from a thread; without one nothing is opened.

    A port that cannot be had costs the figures, not the process: Prometheus sees that nobody answers.
    """
    port = settings.metrics_port
    if port is None:
        return
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each, which nothing here asks for
    try:
        start_http_server(port, addr=settings.metrics_host, registry=figures)
    except OSError as error:
        facts = {"host": settings.metrics_host, "port": port, "reason": str(error)}
        log_event(logger, "metrics_not_served", level=logging.WARNING, **facts)

"""What this process counts of its requests. A route is named by its template, so that no id becomes a series."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.types import Scope

NO_ROUTE = "none"  # an address that stands for nothing
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# From what a row takes to what an upload does; streams of events stay open for as long as they are read.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

TRAFFIC = CollectorRegistry()

REQUESTS = Counter(
    "graft_http_requests",
    "Requests by route and status; `abandoned`: the client left before its answer.",
    ["method", "route", "status"],
    registry=TRAFFIC,
)
REQUEST_SECONDS = Histogram(
    "graft_http_request_duration_seconds",
    "From a request's first byte to the last one of its answer.",
    ["method", "route"],
    buckets=SECONDS,
    registry=TRAFFIC,
)


def route_of(scope: Scope) -> str:
    """The template of the route that answers; known once it does."""
    return str(getattr(scope.get("route"), "path_format", NO_ROUTE))


def count_request(scope: Scope, status: int | None, seconds: float) -> None:
    """Count one exchange that has ended; `status` is None where there was no answer."""
    method = scope["method"] if scope["method"] in METHODS else "other"
    route = route_of(scope)
    REQUESTS.labels(method, route, "abandoned" if status is None else str(status)).inc()
    REQUEST_SECONDS.labels(method, route).observe(seconds)

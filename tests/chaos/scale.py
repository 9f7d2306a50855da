"""Shorter leases, for more faults an hour: every time that a fault must be waited for keeps its ratio to the lease."""

from __future__ import annotations

from graft_shared.settings import SharedSettings
from graft_worker.settings import WorkerSettings

SCALE_VARIABLE = "GRAFT_TEST_TIME_SCALE"
_LEASE_SECONDS = float(SharedSettings.model_fields["lease_seconds"].default)
_SCALED = (
    "lease_seconds",
    "heartbeat_seconds",
    "bell_again_seconds",
    "reconcile_seconds",
    "look_seconds",
    "stop_grace_seconds",
    "upload_patience_seconds",
)


def scaled_environment(lease_seconds: float) -> dict[str, str]:
    """The settings of a service whose leases last this long, and the scale for `tests.chaos.member`."""
    scale = lease_seconds / _LEASE_SECONDS
    times = {name: WorkerSettings.model_fields[name].default * scale for name in _SCALED}
    orders = min(1.0, max(0.1, scale))
    settings = {f"GRAFT_{name.upper()}": str(value) for name, value in {**times, "orders_seconds": orders}.items()}
    return {**settings, SCALE_VARIABLE: str(scale)}

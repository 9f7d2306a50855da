"""Time in trials: every duration of Graft divided by thirty, so that a lease of a minute lasts two seconds."""

from __future__ import annotations

import importlib
from datetime import timedelta
from typing import Any

SCALE = 30
LEASE_SECONDS = 60.0 / SCALE

SETTINGS: dict[str, Any] = {
    "lease_seconds": LEASE_SECONDS,
    "heartbeat_seconds": 15.0 / SCALE,
    "bell_again_seconds": 30.0 / SCALE,
    "reconcile_seconds": 5.0 / SCALE,
}
WORKER_SETTINGS: dict[str, Any] = {
    **SETTINGS,
    "look_seconds": 10.0 / SCALE,
    "orders_seconds": 1.0 / SCALE,
    "stop_grace_seconds": 30.0 / SCALE,
    "upload_patience_seconds": 300.0 / SCALE,
}
BEAT_SECONDS = 15.0 / SCALE

_CONSTANTS = {
    "graft_shared.store.engine": ("BUSY_TIMEOUT_SECONDS",),
    "graft_shared.store.leases": ("RETRY_DELAY_SECONDS",),
    "graft_shared.store.workers": ("ALIVE_FOR",),
    "graft_worker.tasks": ("STORE_PATIENCE_SECONDS",),
    "graft_worker.supervisor.patience": ("FIRST_PAUSE_SECONDS", "LONGEST_PAUSE_SECONDS", "_ASK_EVERY_SECONDS"),
    "graft_worker.supervisor.progress": ("WRITE_EVERY_SECONDS",),
    "graft_worker.supervisor.run": ("EVENT_PAUSE_SECONDS", "LOG_UPLOAD_SECONDS", "FETCH_PATIENCE_SECONDS"),
    "graft_worker.supervisor.training_run": ("CHECKPOINT_PATIENCE_SECONDS",),
}


def scale_constants() -> None:
    """Divide those durations that are no settings, in this process and those that it forks; to be called once."""
    for module, names in _CONSTANTS.items():
        for name in names:
            owner = importlib.import_module(module)
            duration: float | timedelta = getattr(owner, name)
            setattr(owner, name, duration / SCALE)

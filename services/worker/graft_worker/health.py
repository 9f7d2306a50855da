"""`python -m graft_worker.health`: whether this worker was seen alive lately, for a container's health check."""

from __future__ import annotations

import sys

from graft_shared.errors import StoreUnavailable
from graft_shared.store import Workers, open_database
from graft_worker.place import place_of
from graft_worker.settings import WorkerSettings


def main() -> None:
    """Leave with 0 when the fleet's registry holds a fresh beat of the worker of this name."""
    settings = WorkerSettings()
    database = open_database(settings.database)
    try:
        alive = Workers(database).alive()
    except StoreUnavailable as error:
        sys.exit(f"unknown: {error}")
    finally:
        database.close()
    if (settings.worker_name, place_of(settings.lock_dir)) not in {(worker.name, worker.place) for worker in alive}:
        sys.exit(f"not seen lately: {settings.worker_name}")


if __name__ == "__main__":
    main()

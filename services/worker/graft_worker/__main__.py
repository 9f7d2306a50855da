"""`python -m graft_worker`: one worker for one device."""

import os
from tempfile import TemporaryDirectory

from graft_worker.settings import WorkerSettings


def main() -> None:
    """Run a worker. Where it shows its figures, all its processes count in one folder, as long as it lives."""
    if WorkerSettings().metrics_port is None:
        _run()
        return
    with TemporaryDirectory(prefix="graft-metrics-") as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        _run()


def _run() -> None:
    from graft_worker.celery_app import main as run  # what it imports reads the variable once, at import

    run()


if __name__ == "__main__":
    main()

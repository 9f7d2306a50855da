"""`python -m tests.chaos.member MODULE …`: a real process of the service in scaled time; workers have toy children."""

from __future__ import annotations

import os
import runpy
import sys

from graft_shared.store import leases, workers
from tests.chaos.scale import SCALE_VARIABLE


def main() -> None:
    module = sys.argv[1]
    sys.argv = sys.argv[1:]
    scale = float(os.environ[SCALE_VARIABLE])
    workers.ALIVE_FOR *= scale
    leases.RETRY_DELAY_SECONDS *= scale
    if module == "graft_worker":
        _scale_worker(scale)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _scale_worker(scale: float) -> None:
    from graft_worker import celery_app
    from graft_worker.supervisor import preparation, training_run

    celery_app.BEAT_SECONDS *= scale
    celery_app.REGISTER_PAUSE_SECONDS *= scale
    preparation.MODULE = training_run.MODULE = "tests.fakes.child"


if __name__ == "__main__":
    main()

"""`python -m tests.fakes.worker`: the real worker, whose children keep the protocol without torch (see `child`)."""

from __future__ import annotations

from graft_worker.celery_app import main
from graft_worker.supervisor import preparation, training_run

if __name__ == "__main__":
    preparation.MODULE = training_run.MODULE = "tests.fakes.child"
    main()

"""`python -m graft_worker.training WORKDIR`: train what `request.json` asks for; the exit code says how it ended.

Without WORKDIR: do the imports, then wait for it on standard input (see `graft_worker.protocol`).
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path

from graft_worker.parent import die_with_parent
from graft_worker.protocol import EventWriter, ExitCode, TrainRequest, read_request, wait_for_workdir
from graft_worker.training.guard import Guard, LeaseOver, ToldToStop

# Must stand before torch and the hub's libraries are imported.
_ENVIRONMENT = {
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # reserved memory is then a few percent above allocated
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what deterministic products need
    "HF_HUB_OFFLINE": "1",
}


def main() -> int:
    """Run the recipe and translate its end."""
    die_with_parent()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_news)
    events, guard = EventWriter(), Guard()

    from graft_worker.training.ending import ending_of
    from graft_worker.training.recipe import train

    workdir = Path(sys.argv[1]) if sys.argv[1:] else wait_for_workdir(lambda: guard.is_told_to_stop)
    if workdir is None:
        return ExitCode.DONE
    request = TrainRequest.model_validate(read_request(workdir))
    guard.watch_lease(workdir, request.lease_seconds)
    try:
        train(workdir, request, events, guard)
    except (LeaseOver, ToldToStop):
        return ExitCode.STOPPED
    except Exception as error:  # noqa: BLE001 (its last words reach the user, its traceback the log; then it is over)
        code, failure = ending_of(error, request.plan)
        events.emit(failure)
        traceback.print_exception(error)  # after it: the log lies on the same disk
        return code
    return ExitCode.DONE


def _is_news(record: logging.LogRecord) -> bool:
    """Whether it is more than that a kernel for CPUs, which nobody needs, is not installed."""
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")


if __name__ == "__main__":
    sys.exit(main())

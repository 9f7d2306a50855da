"""`python -m graft_worker.merging WORKDIR`: merge what `request.json` names; the exit code says how it ended."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from graft_shared.jobs import FailureReason, Phase
from graft_worker.disk import FULL_DISK_MESSAGE, is_of_full_disk
from graft_worker.parent import die_with_parent
from graft_worker.protocol import (
    EventWriter,
    ExitCode,
    FailureEvent,
    MergedEvent,
    MergeRequest,
    PhaseEvent,
    read_request,
)


def main() -> int:
    """Merge, and translate the end."""
    die_with_parent()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    workdir = Path(sys.argv[1])
    events = EventWriter()
    events.emit(PhaseEvent(phase=Phase.MERGING))
    request = MergeRequest.model_validate(read_request(workdir))

    from graft_worker.merging.merge import NoRoom, merge
    from graft_worker.training.versions import versions

    try:
        proof = merge(request, workdir / "merged")
    except (NoRoom, MemoryError) as error:
        message = f"The machine has too little memory: {error}"
        events.emit(FailureEvent(reason=FailureReason.HOST_OUT_OF_MEMORY, message=message))
        return ExitCode.CRASHED
    except Exception as error:  # noqa: BLE001 (its last words reach the user, its traceback the log; then it is over)
        last = traceback.format_exception_only(error)[-1].strip()
        crash = FailureEvent(reason=FailureReason.CRASH, message=f"Merging crashed: {last}")
        full = FailureEvent(reason=FailureReason.DISK_FULL, message=FULL_DISK_MESSAGE)
        events.emit(full if is_of_full_disk(error) else crash)
        traceback.print_exception(error)  # after it: the log lies on the same disk
        return ExitCode.CRASHED
    events.emit(MergedEvent(proof=proof, versions=versions()))
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())

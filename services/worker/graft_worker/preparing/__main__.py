"""`python -m graft_worker.preparing WORKDIR`: do what `request.json` asks for; the exit code says how it ended."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from graft_shared.errors import (
    GraftError,
    InvalidParameter,
    InvalidTrainingFile,
    NoTrainableTokens,
    UnsupportedBaseModel,
)
from graft_shared.jobs import FailureReason, Phase
from graft_worker.disk import FULL_DISK_MESSAGE, is_of_full_disk
from graft_worker.parent import die_with_parent
from graft_worker.protocol import (
    EventWriter,
    ExitCode,
    FailureEvent,
    PhaseEvent,
    PrepareRequest,
    ReportRequest,
    read_request,
)

_REASONS: dict[type[GraftError], FailureReason] = {
    InvalidTrainingFile: FailureReason.INVALID_TRAINING_FILE,
    InvalidParameter: FailureReason.INVALID_PARAMETER,
    NoTrainableTokens: FailureReason.NO_TRAINABLE_TOKENS,
    UnsupportedBaseModel: FailureReason.UNSUPPORTED_BASE_MODEL,
}


def main() -> int:
    """Prepare, and translate the end."""
    die_with_parent()
    workdir = Path(sys.argv[1])
    events = EventWriter()
    events.emit(PhaseEvent(phase=Phase.PREPARING))
    request = read_request(workdir)

    # Tokenising needs no torch, and transformers would spend seconds on importing it: it is told that there is none.
    sys.modules["torch"] = None  # type: ignore[assignment]
    from graft_worker.preparing.prepare import prepare, report

    try:
        if request["task"] == "report":
            report(ReportRequest.model_validate(request), events)
        else:
            prepare(workdir, PrepareRequest.model_validate(request), events)
    except tuple(_REASONS) as error:
        reason, param = _REASONS[type(error)], error.param or "dataset"
        events.emit(FailureEvent(reason=reason, message=error.message, param=param, facts=error.facts))
        return ExitCode.USER_ERROR
    except Exception as error:  # noqa: BLE001 (its last words reach the user, its traceback the log; then it is over)
        last = traceback.format_exception_only(error)[-1].strip()
        crash = FailureEvent(reason=FailureReason.CRASH, message=f"Preparing the data crashed: {last}")
        full = FailureEvent(reason=FailureReason.DISK_FULL, message=FULL_DISK_MESSAGE)
        events.emit(full if is_of_full_disk(error) else crash)
        traceback.print_exception(error)  # after it: the log lies on the same disk
        return ExitCode.CRASHED
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())

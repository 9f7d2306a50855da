"""`python -m graft_worker.training WORKDIR`: train what `request.json` asks for; the exit code says how it ended."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path

from graft_shared.errors import InvalidParameter
from graft_shared.jobs import FailureReason
from graft_worker.parent import die_with_parent
from graft_worker.protocol import EventWriter, ExitCode, FailureEvent, TrainRequest, read_request


def main() -> int:
    """Run the recipe and translate its end."""
    die_with_parent()
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    workdir = Path(sys.argv[1])
    events = EventWriter()
    request = TrainRequest.model_validate(read_request(workdir))

    import torch

    from graft_worker.training.checkpoint import CheckpointMismatch
    from graft_worker.training.guard import Guard, LeaseOver, ToldToStop
    from graft_worker.training.proof import NotProven
    from graft_worker.training.recipe import NotFinite, NothingToLearn, train

    guard = Guard(workdir)
    _cap_memory()
    try:
        train(workdir, request, events, guard)
        return ExitCode.DONE
    except (LeaseOver, ToldToStop):
        return ExitCode.STOPPED
    except NotFinite as error:
        events.emit(FailureEvent(reason=FailureReason.LOSS_NOT_FINITE, message=_sentence(error)))
        return ExitCode.USER_ERROR
    except NothingToLearn:
        message = "The prepared data holds no token to learn"
        events.emit(FailureEvent(reason=FailureReason.NO_TRAINABLE_TOKENS, message=message, param="dataset"))
        return ExitCode.USER_ERROR
    except InvalidParameter as error:
        reason = FailureReason.INVALID_PARAMETER
        events.emit(FailureEvent(reason=reason, message=error.message, param=error.param))
        return ExitCode.USER_ERROR
    except (NotProven, CheckpointMismatch) as error:
        events.emit(FailureEvent(reason=FailureReason.ADAPTER_NOT_PROVEN, message=_sentence(error)))
        return ExitCode.CRASHED
    except torch.cuda.OutOfMemoryError as error:
        facts = {"allocated_peak_bytes": torch.cuda.max_memory_allocated(), "plan": request.plan}
        message = f"The GPU ran out of memory: {str(error).splitlines()[0]}"
        events.emit(FailureEvent(reason=FailureReason.CUDA_OUT_OF_MEMORY, message=message, facts=facts))
        return ExitCode.CUDA_OUT_OF_MEMORY
    except MemoryError:
        events.emit(FailureEvent(reason=FailureReason.HOST_OUT_OF_MEMORY, message="The machine ran out of memory"))
        return ExitCode.CRASHED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return _crashed(error, events)
        events.emit(FailureEvent(reason=FailureReason.DISK_FULL, message="The worker's disk is full"))
        return ExitCode.CRASHED
    except Exception as error:  # noqa: BLE001 (its last words reach the user, its traceback the log; then it is over)
        return _crashed(error, events)


def _crashed(error: Exception, events: EventWriter) -> int:
    traceback.print_exception(error)
    last = traceback.format_exception_only(error)[-1].strip()
    events.emit(FailureEvent(reason=FailureReason.CRASH, message=f"Training crashed: {last}"))
    return ExitCode.CRASHED


def _sentence(error: Exception) -> str:
    text = str(error)
    return text[:1].upper() + text[1:]


def _cap_memory() -> None:
    """`GRAFT_MEMORY_FRACTION`: let this process have only a share of the card, for tests and for shared cards."""
    import torch

    fraction = os.environ.get("GRAFT_MEMORY_FRACTION")
    if fraction is not None and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(float(fraction))


if __name__ == "__main__":
    sys.exit(main())

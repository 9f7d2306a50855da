"""What a child's end means: its last words, its exit code and the reason it was stopped, as one Failure."""

from __future__ import annotations

import signal

from graft_shared.jobs import Failure, FailureReason
from graft_worker.protocol import ExitCode, FailureEvent
from graft_worker.supervisor.watch import SAVING_STOPS, StopReason


def failure_of(
    code: int, last_words: FailureEvent | None, stop_reason: StopReason | None, *, oom_kills: int
) -> Failure | None:
    """Name what went wrong; None when the child brought its result.

    Args:
        code: The exit code, or the negative number of the signal that ended the child.
        last_words: The `failure` event it sent, if any.
        stop_reason: Why it was told to leave, if it was.
        oom_kills: How many processes of this control group the kernel killed for memory during the run.
    """
    if code == ExitCode.DONE and last_words is None:
        return None
    if stop_reason is StopReason.MAX_DURATION:
        return stopped(stop_reason)
    if last_words is not None:
        words = last_words
        return Failure(reason=words.reason, message=words.message, param=words.param, facts=words.facts)
    if stop_reason in SAVING_STOPS:
        return stopped(stop_reason)
    if code == ExitCode.STOPPED:
        return stopped(StopReason.DRAIN)
    if code == ExitCode.CUDA_OUT_OF_MEMORY:
        return Failure(reason=FailureReason.CUDA_OUT_OF_MEMORY, message="The GPU ran out of memory")
    if code == -signal.SIGKILL and oom_kills > 0:
        return Failure(reason=FailureReason.HOST_OUT_OF_MEMORY, message="The machine ran out of memory")
    if code == -signal.SIGKILL:
        return Failure(reason=FailureReason.WORKER_LOST, message="The training process was killed from outside")
    if code < 0:
        name = signal.Signals(-code).name
        return Failure(reason=FailureReason.CRASH, message=f"The process ended by {name}", facts={"signal": name})
    return Failure(reason=FailureReason.CRASH, message=f"The process left with code {code}", facts={"exit_code": code})


def stopped(reason: StopReason) -> Failure:
    """What an ordered stop is, whatever it interrupted; cancelled and lost runs are settled in their own ways."""
    if reason is StopReason.MAX_DURATION:
        message = "The job ran longer than its 'max_duration_seconds'"
        return Failure(reason=FailureReason.MAX_DURATION_EXCEEDED, message=message, param="max_duration_seconds")
    if reason is StopReason.PAUSE:
        return Failure(reason=FailureReason.PAUSED, message="The job was paused")
    return Failure(reason=FailureReason.DRAINED, message="The worker was stopped")

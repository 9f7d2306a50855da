"""What a child's end is taken to mean."""

from __future__ import annotations

import signal

import pytest

from graft_shared.jobs import FailureReason
from graft_worker.protocol import ExitCode, FailureEvent
from graft_worker.supervisor.outcome import failure_of
from graft_worker.supervisor.watch import StopReason

WORDS = FailureEvent(reason=FailureReason.LOSS_NOT_FINITE, message="The loss is NaN", facts={"step": 3})


@pytest.mark.parametrize(
    ("code", "stop_reason", "oom_kills", "reason"),
    [
        (ExitCode.STOPPED, None, 0, FailureReason.DRAINED),
        (ExitCode.STOPPED, StopReason.DRAIN, 0, FailureReason.DRAINED),
        (-signal.SIGKILL, StopReason.DRAIN, 0, FailureReason.DRAINED),
        (ExitCode.STOPPED, StopReason.PAUSE, 0, FailureReason.PAUSED),
        (-signal.SIGTERM, StopReason.PAUSE, 0, FailureReason.PAUSED),
        (ExitCode.CUDA_OUT_OF_MEMORY, None, 0, FailureReason.CUDA_OUT_OF_MEMORY),
        (-signal.SIGKILL, None, 1, FailureReason.HOST_OUT_OF_MEMORY),
        (-signal.SIGKILL, None, 0, FailureReason.WORKER_LOST),
        (-signal.SIGSEGV, None, 0, FailureReason.CRASH),
        (ExitCode.CRASHED, None, 0, FailureReason.CRASH),
        (ExitCode.STOPPED, StopReason.MAX_DURATION, 0, FailureReason.MAX_DURATION_EXCEEDED),
    ],
)
def test_a_silent_end_is_named_by_code_and_circumstance(
    code: int, stop_reason: StopReason | None, oom_kills: int, reason: FailureReason
) -> None:
    failure = failure_of(code, None, stop_reason, oom_kills=oom_kills)
    assert failure is not None
    assert failure.reason is reason


def test_the_childs_last_words_count_before_its_exit_code() -> None:
    failure = failure_of(ExitCode.USER_ERROR, WORDS, None, oom_kills=0)
    assert failure is not None
    assert (failure.reason, failure.facts) == (FailureReason.LOSS_NOT_FINITE, {"step": 3})


def test_a_result_counts_even_when_the_worker_was_about_to_stop() -> None:
    assert failure_of(ExitCode.DONE, None, StopReason.DRAIN, oom_kills=0) is None


def test_a_child_that_failed_did_not_succeed_whatever_its_code() -> None:
    assert failure_of(ExitCode.DONE, WORDS, None, oom_kills=0) is not None

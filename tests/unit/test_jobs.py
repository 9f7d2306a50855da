"""What becomes of a failed run, decided as data."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft_shared.jobs import (
    MAX_RUNS_WITHOUT_PROGRESS,
    REMEDIES,
    Aftermath,
    FailureReason,
    JobState,
    Retry,
    after_failure,
)


def decide(reason: FailureReason, **changes: Any) -> Aftermath:
    facts: dict[str, Any] = {
        "attempt": 1,
        "max_attempts": 3,
        "runs_without_progress": 0,
        "made_progress": False,
        "cancel_requested": False,
    }
    return after_failure(reason, **{**facts, **changes})


def test_every_failure_reason_has_a_remedy() -> None:
    assert set(REMEDIES) == set(FailureReason)


@pytest.mark.parametrize("reason", [reason for reason in FailureReason if REMEDIES[reason].retry is Retry.NEVER])
def test_what_trying_again_cannot_help_fails_at_once(reason: FailureReason) -> None:
    assert decide(reason, max_attempts=20).state is JobState.FAILED


def test_running_out_of_memory_costs_nothing_while_there_is_another_plan_and_is_the_end_without() -> None:
    again = decide(FailureReason.CUDA_OUT_OF_MEMORY, attempt=3, max_attempts=3, replanned=True, runs_without_progress=2)
    assert again == Aftermath(state=JobState.QUEUED, attempt=2, runs_without_progress=2)
    assert decide(FailureReason.CUDA_OUT_OF_MEMORY, max_attempts=20).state is JobState.FAILED
    on_host = decide(FailureReason.HOST_OUT_OF_MEMORY, attempt=3, max_attempts=3, replanned=True)
    assert (on_host.state, on_host.attempt) == (JobState.QUEUED, 2)


def test_a_charged_failure_is_tried_again_until_max_attempts() -> None:
    states = [decide(FailureReason.CRASH, attempt=attempt).state for attempt in (1, 2, 3)]
    assert states == [JobState.QUEUED, JobState.QUEUED, JobState.FAILED]


def test_a_lost_worker_gives_its_attempt_back() -> None:
    assert decide(FailureReason.WORKER_LOST, attempt=3, max_attempts=3) == Aftermath(
        state=JobState.QUEUED, attempt=2, runs_without_progress=1
    )


def test_progress_takes_a_job_off_the_way_to_poison() -> None:
    last = MAX_RUNS_WITHOUT_PROGRESS - 1
    assert decide(FailureReason.DRAINED, runs_without_progress=last).state is JobState.FAILED
    assert decide(FailureReason.DRAINED, runs_without_progress=last, made_progress=True).runs_without_progress == 0


@pytest.mark.parametrize(("reason", "replanned"), [("crash", False), ("cuda_out_of_memory", True)])
def test_a_run_that_is_no_step_towards_poison_leads_off_the_way_if_it_made_progress(
    reason: str, replanned: bool
) -> None:
    decided = partial(decide, FailureReason(reason), replanned=replanned, runs_without_progress=3)
    assert (decided().state, decided().runs_without_progress) == (JobState.QUEUED, 3)
    assert decided(made_progress=True).runs_without_progress == 0


def test_a_pause_costs_no_attempt_and_is_no_step_towards_poison() -> None:
    last = MAX_RUNS_WITHOUT_PROGRESS - 1
    again = Aftermath(state=JobState.QUEUED, attempt=2, runs_without_progress=last)
    assert decide(FailureReason.PAUSED, attempt=3, runs_without_progress=last) == again
    assert decide(FailureReason.PAUSED, runs_without_progress=last, made_progress=True).runs_without_progress == 0


@given(
    reason=st.sampled_from(FailureReason),
    attempt=st.integers(1, 20),
    max_attempts=st.integers(1, 20),
    fruitless=st.integers(0, MAX_RUNS_WITHOUT_PROGRESS),
    made_progress=st.booleans(),
)
def test_a_cancelled_job_is_never_brought_back(
    reason: FailureReason, attempt: int, max_attempts: int, fruitless: int, made_progress: bool
) -> None:
    after = after_failure(
        reason,
        attempt=attempt,
        max_attempts=max_attempts,
        runs_without_progress=fruitless,
        made_progress=made_progress,
        cancel_requested=True,
    )
    assert after.state is JobState.CANCELLED

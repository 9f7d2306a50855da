"""The judge of cancels and drains: what is lawful is acquitted, each lie is named; and who watches, sees."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from graft_shared.jobs import JobState
from tests.chaos.cancels import Aim, Moment, Race, disagreements, lies, one_sided
from tests.chaos.drains import Family, costs
from tests.waiting import wait_until
from tests.witness import STEPS_NAME, listening

CANCELLED, SUCCEEDED, FAILED = JobState.CANCELLED, JobState.SUCCEEDED, JobState.FAILED


def an_aim() -> Aim:
    return Aim(moment=Moment.HEARD, step=1, centre=3.0, width=0.5)


def told(answer: str, looked: str, once_ended: str) -> Race:
    return Race(key="k", steps=8, aim=an_aim(), rank=0.5, answer=answer, looked=looked, answer_once_ended=once_ended)


@pytest.mark.parametrize(
    ("race", "state"),
    [
        (told("cancelling", "cancelling", "cancelled"), CANCELLED),
        (told("cancelling", "succeeded", "409 succeeded"), SUCCEEDED),
        (told("cancelled", "cancelled", "cancelled"), CANCELLED),
        (told("409 succeeded", "succeeded", "409 succeeded"), SUCCEEDED),
    ],
)
def test_either_end_of_a_race_is_lawful_while_its_cancel_was_not_answered_for_good(race: Race, state: JobState) -> None:
    assert list(lies(race, state)) == []


@pytest.mark.parametrize(
    ("race", "state"),
    [
        (told("cancelled", "cancelled", "409 succeeded"), SUCCEEDED),
        (told("409 succeeded", "succeeded", "cancelled"), CANCELLED),
        (told("cancelling", "running", "cancelled"), CANCELLED),
        (told("cancelling", "cancelling", "409 succeeded"), CANCELLED),
        (told("cancelling", "cancelling", "409 failed"), FAILED),
        (told("503 away", "running", "cancelled"), CANCELLED),
        (told("", "", ""), SUCCEEDED),
    ],
)
def test_an_answer_that_did_not_come_true_is_named(race: Race, state: JobState) -> None:
    assert list(lies(race, state))


def test_a_row_that_its_events_contradict_is_named() -> None:
    success, cancel = {"type": "succeeded"}, {"type": "cancelled"}
    assert list(disagreements(SUCCEEDED, [{"type": "claimed"}, success])) == []
    for events in ([cancel], [success, cancel], [{"type": "claimed"}]):
        assert list(disagreements(SUCCEEDED, events))


def test_a_harness_that_does_not_race_is_told_so_once_there_is_enough_to_tell() -> None:
    assert list(one_sided(Counter(cancelled=90, succeeded=10))) == []
    assert list(one_sided(Counter(cancelled=91, succeeded=9))) == ["9 of 100 ended succeeded: the harness did not race"]
    assert list(one_sided(Counter(succeeded=6))) == []


def test_an_aim_moves_to_where_half_the_cancels_are_in_time() -> None:
    aim, deciding_seconds = an_aim(), 1.0
    for turn in range(200):
        aim.learn(was_in_time=aim.seconds(rank=turn % 10 / 9) < deciding_seconds)
    assert aim.centre == pytest.approx(deciding_seconds, abs=0.3)


def event(type: str, epoch: int, **data: Any) -> dict[str, Any]:
    return {"type": type, "epoch": epoch, "data": data}


DRAINED = event("requeued", 2, reason="drained")
FIRST, NEXT = event("claimed", 2, attempt=1), event("claimed", 3, attempt=1)
SUCCESS = event("succeeded", 3)


def test_a_drain_that_cost_nothing_is_acquitted() -> None:
    assert list(costs([FIRST, DRAINED, NEXT, SUCCESS], 2, attempt_at_the_end=1)) == []


@pytest.mark.parametrize(
    ("events", "attempt"),
    [
        ([FIRST, DRAINED, event("claimed", 3, attempt=2), SUCCESS], 2),
        ([FIRST, DRAINED, NEXT, SUCCESS], 2),
        ([FIRST, event("requeued", 2, reason="worker_lost"), NEXT, SUCCESS], 1),
        ([FIRST, DRAINED, NEXT, event("failed", 3)], 1),
        ([FIRST, DRAINED], 0),
        ([FIRST, event("succeeded", 2)], 1),
    ],
)
def test_what_a_drain_cost_is_named(events: list[dict[str, Any]], attempt: int) -> None:
    assert list(costs(events, 2, attempt_at_the_end=attempt))


def test_a_process_that_went_its_own_way_still_counts_until_it_has_ended() -> None:
    """As a trainer does: it has a session of its own, and outlives whoever started it if nobody sees to it."""
    waits = "import sys; sys.stdin.read()"
    starts = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {waits!r}], start_new_session=True).wait()"
    )
    leader = subprocess.Popen([sys.executable, "-c", starts], stdin=subprocess.PIPE)
    assert leader.stdin is not None
    family = Family(leader.pid)
    wait_until(lambda: len(family.living()) == 2, what="the child")
    leader.kill()
    leader.wait()
    (child,) = family.living()
    assert child != leader.pid
    leader.stdin.close()
    wait_until(lambda: not family.living(), what="its end")


def test_a_step_is_heard_when_its_line_is_whole(tmp_path: Path) -> None:
    with listening(tmp_path) as listener, (tmp_path / STEPS_NAME).open("a") as log:
        log.write("ftjob-a 2 1 10.0\nftjob-b 2 1 1")
        log.flush()
        assert listener.wait_for("ftjob-a", 1, seconds=10).at == 10.0
        with pytest.raises(TimeoutError):
            listener.wait_for("ftjob-b", 1, seconds=0.1)
        log.write("1.0\nftjob-b 3 1 12.0\n")
        log.flush()
        assert listener.wait_for("ftjob-b", 1, seconds=10).at == 11.0

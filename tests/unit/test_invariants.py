"""The judges of reliability find what they are there to find."""

from __future__ import annotations

from typing import Any

import pytest

from tests.invariants import (
    Message,
    Step,
    accounting_closes,
    assert_history_holds,
    lost_by_interruption,
    nobody_steps_after_a_newer_epoch,
    runs_begin_behind_their_checkpoint,
    webhooks_are_delivered_or_exhausted,
)


def steps(*runs: tuple[int, list[int]]) -> list[Step]:
    """Steps of one job, made one after the other: (epoch, numbers)."""
    made = [(epoch, number) for epoch, numbers in runs for number in numbers]
    return [Step("ftjob-1", epoch, number, float(at)) for at, (epoch, number) in enumerate(made)]


def history(*events: tuple[str, int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"id": number, "type": type_, "epoch": epoch, "data": data}
        for number, (type_, epoch, data) in enumerate(events, start=1)
    ]


CLAIMED = {"stage": "train"}


def test_a_lawful_history_holds() -> None:
    assert_history_holds(
        history(
            ("submitted", 0, {}),
            ("claimed", 1, CLAIMED),
            ("checkpoint", 1, {"step": 2}),
            ("claimed", 3, CLAIMED),
            ("metrics", 3, {"step": 3}),
            ("succeeded", 3, {}),
        )
    )


@pytest.mark.parametrize(
    "events",
    [
        pytest.param([("claimed", 2, CLAIMED), ("claimed", 2, CLAIMED), ("failed", 2, {})], id="an epoch twice"),
        pytest.param([("metrics", 3, {}), ("metrics", 2, {}), ("failed", 3, {})], id="an old epoch's step"),
        pytest.param([("succeeded", 1, {}), ("failed", 1, {})], id="two ends"),
        pytest.param([("succeeded", 1, {}), ("metrics", 1, {})], id="something after the end"),
        pytest.param([("claimed", 1, CLAIMED)], id="no end"),
        pytest.param(
            [("checkpoint", 1, {"step": 4}), ("checkpoint", 2, {"step": 2}), ("failed", 2, {})],
            id="a checkpoint behind",
        ),
    ],
)
def test_a_broken_history_does_not(events: list[tuple[str, int, dict[str, Any]]]) -> None:
    with pytest.raises(AssertionError):
        assert_history_holds(history(*events))


def test_a_zombie_is_seen() -> None:
    assert nobody_steps_after_a_newer_epoch(steps((2, [1, 2]), (3, [3]))) == []
    assert len(nobody_steps_after_a_newer_epoch(steps((2, [1, 2]), (3, [3]), (2, [3, 4])))) == 2


def test_a_run_that_forgets_its_checkpoint_is_seen() -> None:
    events = history(("claimed", 1, CLAIMED), ("checkpoint", 1, {"step": 2}), ("claimed", 2, CLAIMED))
    assert runs_begin_behind_their_checkpoint(events, steps((1, [1, 2, 3]), (2, [3, 4]))) == []
    assert len(runs_begin_behind_their_checkpoint(events, steps((1, [1, 2, 3]), (2, [4])))) == 1


def test_what_interruptions_cost_is_counted() -> None:
    assert lost_by_interruption(steps((1, [1, 2, 3, 4, 5]), (2, [3, 4]), (3, [5, 6]))) == [3, 0]


@pytest.mark.parametrize(
    ("runs", "closes"),
    [
        pytest.param([(1, [1, 2, 3]), (2, [3, 4])], True, id="one made again"),
        pytest.param([(1, [1, 2, 3, 4])], True, id="no break"),
        pytest.param([(1, [1, 2]), (2, [4])], False, id="one left out"),
        pytest.param([(1, [1, 2, 2, 3, 4])], False, id="one twice in a run"),
        pytest.param([(1, [1, 2, 3, 4, 5])], False, id="one too many"),
    ],
)
def test_the_accounting_closes_or_not(runs: list[tuple[int, list[int]]], closes: bool) -> None:
    assert accounting_closes(steps(*runs), needed=4) is closes


ENDED = {"ftjob-1": "succeeded"}
TAKEN = {("evt_1", "ftjob-1", "fine_tuning.job.succeeded")}


def message(**changes: Any) -> Message:
    facts: dict[str, Any] = {"tries": 1, "is_delivered": True, "is_due": False, **changes}
    return Message(**{"id": "evt_1", "job_id": "ftjob-1", "type": "fine_tuning.job.succeeded", **facts})


def test_a_message_that_was_taken_or_given_up_is_lawful() -> None:
    given_up = message(is_delivered=False, tries=9)
    assert webhooks_are_delivered_or_exhausted(ENDED, [message()], TAKEN, most_tries=9) == []
    assert webhooks_are_delivered_or_exhausted(ENDED, [given_up], TAKEN, most_tries=9) == [], "only its answer was lost"
    assert webhooks_are_delivered_or_exhausted(ENDED, [given_up], set(), most_tries=9) == []


@pytest.mark.parametrize(
    ("messages", "taken", "found"),
    [
        ([], set(), "were written about"),
        ([message(), message(id="evt_2")], TAKEN, "were written about"),
        ([message(type="fine_tuning.job.failed")], TAKEN, "were written about"),
        ([message()], set(), "nobody took it"),
        ([message(is_delivered=False, is_due=True)], set(), "neither delivered nor given up"),
        ([message(is_delivered=False, tries=8)], set(), "neither delivered nor given up"),
        ([message()], TAKEN | {("evt_9", "ftjob-1", "fine_tuning.job.succeeded")}, "nobody has written it"),
    ],
)
def test_a_message_that_was_lost_doubled_or_made_up_is_found(
    messages: list[Message], taken: set[tuple[str, str, str]], found: str
) -> None:
    (first, *_) = webhooks_are_delivered_or_exhausted(ENDED, messages, taken, most_tries=9)
    assert found in first

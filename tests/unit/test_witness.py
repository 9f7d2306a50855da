"""The witness of the fault tests: it would see two trainers of one job, and says so."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.invariants import (
    Sighting,
    trainers_beside_each_other,
    trainers_came_in_turn,
    trainings_go_on_from_the_last_checkpoint,
)
from tests.waiting import wait_until
from tests.witness import Witness, watching


@pytest.fixture
def witness(tmp_path: Path) -> Iterator[Witness]:
    with watching(tmp_path) as made:
        yield made


def start_like_a_trainer(folder: Path, epoch: int) -> subprocess.Popen[bytes]:
    """A process that stands where a trainer does, and ends with its input."""
    workdir = folder / "work" / "train-0" / "train" / f"ftjob-abc-e{epoch}"
    workdir.mkdir(parents=True)
    return subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, cwd=workdir)


def seen(epoch: int, first_at: float, last_at: float) -> Sighting:
    return Sighting(job_id="ftjob-abc", epoch=epoch, pid=epoch, first_at=first_at, last_at=last_at)


def test_two_trainers_of_one_job_are_seen_side_by_side(tmp_path: Path, witness: Witness) -> None:
    trainers = [start_like_a_trainer(tmp_path, epoch) for epoch in (2, 3)]
    try:
        wait_until(lambda: len(witness.sightings()) == 2, what="both to be seen")
        looks = witness.looks
        wait_until(lambda: witness.looks > looks + 3, what="some more looks")
        assert trainers_beside_each_other(witness.sightings(), longer_than=0.05)
    finally:
        for trainer in trainers:
            trainer.communicate()


def test_a_trainer_elsewhere_is_no_concern_of_the_witness(tmp_path: Path) -> None:
    trainer = start_like_a_trainer(tmp_path / "here", 1)
    here, elsewhere = Witness(tmp_path / "here"), Witness(tmp_path / "elsewhere")
    try:
        wait_until(lambda: bool(here.look() or here.sightings()), what="the trainer")
        elsewhere.look()
        assert elsewhere.sightings() == []
    finally:
        trainer.communicate()


def test_trainers_that_follow_each_other_are_as_they_should_be() -> None:
    in_turn = [seen(2, 0.0, 5.0), seen(3, 5.1, 9.0)]
    assert trainers_beside_each_other(in_turn, longer_than=0.0) == []
    trainers_came_in_turn(in_turn)


@pytest.mark.parametrize("zombie", [seen(2, 0.0, 9.0), seen(2, 6.0, 9.5)])
def test_an_old_trainer_that_lives_on_is_told(zombie: Sighting) -> None:
    assert trainers_beside_each_other([zombie, seen(3, 5.0, 9.2)], longer_than=0.5)
    with pytest.raises(AssertionError):
        trainers_came_in_turn([seen(2, 0.0, 1.0), zombie, seen(3, 5.0, 7.0)])


def test_a_run_that_began_again_at_the_first_step_is_told() -> None:
    claimed = {"type": "claimed", "data": {"stage": "train"}}
    events = [
        {"id": 1, "epoch": 1, **claimed},
        {"id": 2, "epoch": 1, "type": "metrics", "data": {"step": 1, "loss": 3.0}},
        {"id": 3, "epoch": 1, "type": "checkpoint", "data": {"step": 25}},
        {"id": 4, "epoch": 3, **claimed},
    ]
    first_step = {"id": 5, "epoch": 3, "type": "metrics"}
    trainings_go_on_from_the_last_checkpoint([*events, {**first_step, "data": {"step": 26, "loss": 2.0}}])
    for wrong in (1, 25, 27):
        with pytest.raises(AssertionError):
            trainings_go_on_from_the_last_checkpoint([*events, {**first_step, "data": {"step": wrong, "loss": 2.0}}])

"""`graft up` under faults: broker, worker and launcher killed, Ctrl-C; nothing is lost and nothing is left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft_client import GraftClient
from tests.factories import make_tiny_base
from tests.fleet import JSONL, Fleet, a_job
from tests.invariants import assert_history_holds, steps_redone
from tests.waiting import wait_until
from tests.witness import watching
from tests.writes import Writes


@pytest.fixture(scope="module")
def writes(tmp_path_factory: pytest.TempPathFactory) -> Writes:
    return Writes(tmp_path_factory.mktemp("writes"))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, writes: Writes) -> Iterator[Fleet]:
    state = tmp_path_factory.mktemp("fleet") / "state"
    make_tiny_base(state / "models" / "graft" / "tiny")
    settings = {"GRAFT_HEARTBEAT_SECONDS": "2", "GRAFT_LOOK_SECONDS": "2", "GRAFT_SPARE_TRAINER": "true"}
    running = Fleet(state, {**settings, **writes.environment}).start()
    yield running
    if running.process is not None:
        running.stop()


@pytest.mark.parametrize("held_out_by", ["split", "file"])
def test_held_out_rows_stop_a_job_early_and_its_report_tells_which_are_trained_on(
    fleet: Fleet, held_out_by: str
) -> None:
    lines = JSONL.splitlines(keepends=True)
    file_id = fleet.upload(b"".join([*lines[:2], *(line.replace(b"says", b"never says") for line in lines[:3])]))
    validation = {"split": 0.1} if held_out_by == "split" else {"file": file_id}
    training = {"max_steps": 300, "eval_steps": 2, "early_stopping_patience": 1, "save_steps": 300}
    job = fleet.post(a_job(fleet, validation=validation, training=training))
    ended = fleet.wait(job["id"])
    assert ended["status"] == "succeeded", ended["error"]
    assert ended["progress"]["step"] < 300
    assert "stopped_early" in [warning["code"] for warning in ended["warnings"]]
    with fleet.client() as client:
        report = client.get(f"/jobs/{job['id']}/report").json()["report"]
    held_out = report["validation"]
    assert held_out["overlap_rows"] == (held_out["rows"] if held_out_by == "split" else held_out["rows"] - 3)


def test_a_killed_broker_costs_latency_and_no_job(fleet: Fleet) -> None:
    (broker,) = fleet.processes("redis-server")
    os.kill(broker, signal.SIGKILL)
    ended = fleet.wait(fleet.post(a_job(fleet, training={"max_steps": 3}))["id"])
    assert ended["status"] == "succeeded", ended["error"]


def test_a_job_goes_on_from_the_adapter_of_another_that_is_deleted_meanwhile(fleet: Fleet) -> None:
    first = fleet.wait(fleet.post(a_job(fleet))["id"])
    second = fleet.post(a_job(fleet, adapter={"job": first["id"]}, training={"max_steps": 5}))
    wait_until(lambda: fleet.deleted(first["id"]), seconds=60, what="a copy of its adapter", every=0.1)
    ended = fleet.wait(second["id"])
    assert ended["status"] == "succeeded", ended["error"]
    begun = next(event for event in fleet.events(second["id"]) if "eval_loss" in event["data"])
    assert begun["data"]["eval_loss"] == pytest.approx(first["metrics"]["eval_loss"], rel=1e-4)


def test_an_adapter_is_merged_into_its_base_and_loads_without_peft(fleet: Fleet, tmp_path: Path) -> None:
    job = fleet.wait(fleet.post(a_job(fleet, training={"max_steps": 3}))["id"])
    with GraftClient(fleet.url) as client:
        assert client.merge(job["id"])["status"] == "queued"
        merged = client.wait_merged(job["id"], timeout_seconds=120)
        assert merged["status"] == "succeeded", merged["error"]
        folder = client.download_merged(job["id"], tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == "llama" and AutoTokenizer.from_pretrained(folder)("hello")["input_ids"]
    assert merged["proof"]["logits_difference"] < 1e-3
    assert fleet.deleted(job["id"])


def test_a_trainer_killed_in_mid_training_goes_on_from_its_last_checkpoint(fleet: Fleet) -> None:
    job = fleet.post(a_job(fleet, training={"max_steps": 400, "save_steps": 20}))
    wait_until(lambda: fleet.checkpoints(job["id"]) >= 2, seconds=120, what="two checkpoints", every=0.1)
    (trainer,) = fleet.trainers()
    os.kill(trainer, signal.SIGKILL)
    ended = fleet.wait(job["id"])
    events = fleet.events(job["id"])
    assert ended["status"] == "succeeded", ended["error"]
    assert_history_holds(events)
    assert [event["data"]["reason"] for event in events if event["type"] == "requeued"] == ["worker_lost"]
    assert steps_redone(events) <= 2 * 20, "at most the steps since the last stored checkpoint are made again"
    assert ended["attempt"] == 1


def test_a_killed_worker_costs_no_job(fleet: Fleet) -> None:
    job = fleet.post(a_job(fleet, training={"max_steps": 400, "save_steps": 20}))
    wait_until(lambda: fleet.checkpoints(job["id"]) >= 1, seconds=120, what="a checkpoint", every=0.1)
    for pid in fleet.processes("-m graft_worker"):
        if "graft_worker.training" not in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGKILL)
    ended = fleet.wait(job["id"])
    assert ended["status"] == "succeeded", ended["error"]
    assert_history_holds(fleet.events(job["id"]))


def test_the_next_job_is_trained_by_the_process_that_waits_for_it(fleet: Fleet) -> None:
    wait_until(lambda: bool(fleet.spare_trainers()), seconds=60, what="a process that waits")
    (waiting,) = fleet.spare_trainers()
    with watching(fleet.state_dir) as witness:
        job = fleet.post(a_job(fleet, training={"max_steps": 20}))
        ended = fleet.wait(job["id"])
    assert ended["status"] == "succeeded", ended["error"]
    assert {(seen.job_id, seen.pid) for seen in witness.sightings()} == {(job["id"], waiting)}
    wait_until(lambda: waiting not in fleet.spare_trainers(), seconds=10, what="its end")
    assert len(fleet.spare_trainers()) == 1


def test_a_process_that_waits_leaves_when_it_is_told_to(fleet: Fleet) -> None:
    (waiting,) = fleet.spare_trainers()
    os.kill(waiting, signal.SIGTERM)
    wait_until(lambda: waiting not in fleet.spare_trainers(), seconds=60, what="its end")


def test_ctrl_c_gives_running_jobs_back_and_leaves_no_process_behind(fleet: Fleet) -> None:
    job = fleet.post(a_job(fleet, training={"max_steps": 400, "save_steps": 20}))
    wait_until(
        lambda: fleet.get(job["id"])["progress"].get("step", 0) > 2, seconds=120, what="the first steps", every=0.2
    )
    assert fleet.stop(signal.SIGINT) == 0
    assert fleet.processes() == []
    fleet.start()
    ended = fleet.wait(job["id"])
    events = fleet.events(job["id"])
    assert ended["status"] == "succeeded", ended["error"]
    assert_history_holds(events)
    assert [event["data"]["reason"] for event in events if event["type"] == "requeued"] == ["drained"]
    assert steps_redone(events) == 0, "a drained trainer saves what it has done"


def test_a_killed_launcher_leaves_no_process_behind(fleet: Fleet) -> None:
    assert fleet.process is not None
    fleet.process.send_signal(signal.SIGKILL)
    fleet.process.wait()
    wait_until(lambda: fleet.processes() == [], seconds=60, what="the end of every process")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{fleet.url}/healthz", timeout=2)
    fleet.process = None


def test_all_that_was_written_lies_in_the_state_folder_or_is_temporary(fleet: Fleet, writes: Writes) -> None:
    """Containers mount the two and nothing else that can be written: docker-compose.yml, deploy/helm."""
    assert writes.under(fleet.state_dir / "work"), "jobs ran here"
    assert writes.outside(fleet.state_dir, writes.temporary) == set()

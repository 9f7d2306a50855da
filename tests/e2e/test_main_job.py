"""The main job, end to end, as a user meets it, on each fleet: HTTP, real processes and neighbours, real QLoRA."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.factories import make_tiny_base
from tests.fleet import ROWS, Cluster, Fleet, a_job, cluster
from tests.invariants import assert_history_holds
from tests.waiting import wait_until

# Run without Graft: what a user does with a downloaded adapter.
LOAD_WITH_PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base_dir, adapter_dir, prompt, completion = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(adapter_dir)
asked, answered = tokenizer(prompt)["input_ids"], tokenizer(completion)["input_ids"]
ids, labels = torch.tensor([asked + answered]), torch.tensor([[-100] * len(asked) + answered])
base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
with torch.no_grad():
    before = base(input_ids=ids, labels=labels).loss.item()
    after = PeftModel.from_pretrained(base, adapter_dir)(input_ids=ids, labels=labels).loss.item()
assert not any(name.startswith("graft") for name in sys.modules)
print(before, after)
"""


@pytest.fixture(
    scope="module", params=["one machine", pytest.param("cluster", marks=pytest.mark.again), "cluster of two"]
)
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet | Cluster]:
    folder = tmp_path_factory.mktemp("fleet")
    make_tiny_base(folder / "state" / "models" / "graft" / "tiny")
    if request.param == "one machine":
        running = Fleet(folder / "state", {"GRAFT_HEARTBEAT_SECONDS": "2", "GRAFT_LOOK_SECONDS": "2"}).start()
        yield running
        running.stop()
        return
    count = 1 if request.param == "cluster" else 2
    with cluster(folder, apis=count, trainers_wanted=count) as made:
        yield made


@pytest.fixture(scope="module")
def finished(fleet: Fleet | Cluster) -> dict[str, Any]:
    job = fleet.wait(fleet.post(a_job(fleet))["id"])
    assert job["status"] == "succeeded", (job["error"], fleet.log())
    return job


def test_a_posted_job_succeeds_and_learns(fleet: Fleet | Cluster, finished: dict[str, Any]) -> None:
    events = fleet.events(finished["id"])
    assert_history_holds(events)
    losses = [event["data"]["loss"] for event in events if event["type"] == "metrics" and "loss" in event["data"]]
    assert len(losses) == 40
    assert losses[-1] < 0.5 * losses[0]
    evaluations = [event["data"]["eval_loss"] for event in events if "eval_loss" in event["data"]]
    assert evaluations[-1] < 0.8 * evaluations[0]
    assert finished["progress"]["percent"] == 100
    assert finished["gpu_class"] == "cpu"
    assert finished["memory"]["measured_peak_bytes"] > 0
    assert finished["plan"]["mode"] in ("speed", "memory")


def test_every_file_of_the_adapter_is_what_its_manifest_says(fleet: Fleet | Cluster, finished: dict[str, Any]) -> None:
    with fleet.client() as client:
        answer = client.get(f"/jobs/{finished['id']}/adapter").json()
        for file in answer["files"]:
            content = fleet.fetch(file["url"])
            assert (len(content), hashlib.sha256(content).hexdigest()) == (file["size"], file["sha256"])
    names = {file["name"] for file in answer["files"]}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "metrics.jsonl"} <= names
    assert any(name.startswith("tokenizer") for name in names)


def test_the_archive_loads_with_peft_in_a_process_without_graft(
    fleet: Fleet | Cluster, finished: dict[str, Any], tmp_path: Path
) -> None:
    with fleet.client() as client:
        archive = client.get(f"/jobs/{finished['id']}/adapter/archive")
    with tarfile.open(fileobj=io.BytesIO(archive.content)) as tar:
        tar.extractall(tmp_path)
    (config_path,) = tmp_path.rglob("adapter_config.json")
    config = json.loads(config_path.read_text())
    assert config["base_model_name_or_path"] == "graft/tiny"
    assert str(fleet.state_dir) not in config_path.read_text()
    arguments = [str(fleet.models_dir / "graft" / "tiny"), str(config_path.parent), *ROWS[0].values()]
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOAD_WITH_PEFT, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    before, after = (float(number) for number in done.stdout.split()[-2:])
    assert after < 0.8 * before


def test_a_running_job_is_cancelled_and_its_trainer_is_gone(fleet: Fleet | Cluster) -> None:
    job = fleet.post(a_job(fleet, training={"max_steps": 100_000}))
    wait_until(
        lambda: fleet.get(job["id"])["progress"].get("step", 0) > 2, seconds=120, what="the first steps", every=0.2
    )
    with fleet.client() as client:
        assert client.post(f"/jobs/{job['id']}/cancel").json()["status"] == "cancelling"
    ended = fleet.wait(job["id"])
    assert ended["status"] == "cancelled"
    assert fleet.trainers() == []
    with fleet.client() as client:
        again = client.post(f"/jobs/{job['id']}/cancel")
        adapter = client.get(f"/jobs/{job['id']}/adapter")
    assert again.status_code in (200, 409)
    assert adapter.status_code == 409


def test_a_job_whose_rows_teach_nothing_fails_with_the_reason(fleet: Fleet | Cluster) -> None:
    rows = json.dumps({"prompt": "word " * 400, "completion": "too late"}) + "\n"
    spec = a_job(fleet, validation=None) | {"dataset": {"file": fleet.upload((rows * 4).encode())}}
    ended = fleet.wait(fleet.post(spec)["id"])
    assert ended["status"] == "failed"
    assert (ended["error"]["code"], ended["error"]["category"]) == ("no_trainable_tokens", "user")

"""Jobs over HTTP: admission, reading, listing, cancelling; the real app on real SQLite and a real directory."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import select, update

from graft_api.jobs.bells import MAX_WAITING
from graft_shared.errors import StoreUnavailable
from graft_shared.jobs import Failure, FailureReason, Stage
from graft_shared.memory import TrainingPlan
from graft_shared.store import Leases, LiveWorker, Workers
from graft_shared.store.tables import jobs
from tests.api_service import LLAMA, ApiService, error_of, make_service, register_base
from tests.store_factories import a_beat, a_new_job, a_placement
from tests.waiting import wait_until

GIB = 1024**3


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory, template: Path) -> Iterator[ApiService]:
    """One service for everything that is refused and leaves nothing behind."""
    service = make_service(tmp_path_factory.mktemp("refusing"), template)
    yield service
    service.database.close()


@pytest.fixture
def small(tmp_path: Path, template: Path) -> Iterator[ApiService]:
    """A fleet whose largest class is 24 GB."""
    service = make_service(tmp_path, template, classes=["cpu", "16gb", "24gb"])
    yield service
    service.database.close()


def test_an_accepted_job_is_stored_and_shown_whole(api: ApiService) -> None:
    spec = api.spec(metadata={"team": "search"}, name="bot")
    answer = api.post(spec)
    assert answer.status_code == 202
    job = answer.json()
    assert job["id"].startswith("ftjob-") and job["object"] == "fine_tuning.job"
    assert (job["status"], job["gpu_class"], job["attempt"], job["max_attempts"]) == ("validating_files", "16gb", 0, 3)
    assert job["spec"]["dataset"]["file"] == spec["dataset"]["file"]
    assert job["spec"]["gpu"] == {"class": "auto", "count": 1}
    assert job["plan"]["mode"] in ("speed", "memory")
    assert TrainingPlan.from_dict(job["plan"]).mode == job["plan"]["mode"]
    assert 4 * GIB < job["memory"]["predicted_peak_bytes"] < 16 * GIB
    assert job["memory"]["measured_peak_bytes"] is None
    assert job["metadata"] == {"team": "search"}
    assert abs(job["created_at"] - time.time()) < 60 and job["started_at"] is None
    assert job["queue"]["position"] == 1
    assert api.http.get(f"/jobs/{job['id']}").json() == job


def test_a_committed_job_is_rung_for_once_and_marked(api: ApiService) -> None:
    api.idle_workers(count=1)
    job_id = api.new_job()["id"]
    wait_until(lambda: api.doorbell.rung == [(job_id, "prepare")], what="the bell of a CPU worker, which prepares data")
    wait_until(lambda: _bell_rung_at(api, job_id) is not None, what="the mark")


def test_bells_that_were_rung_one_after_the_other_are_marked_together(
    api: ApiService, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked: list[tuple[str, ...]] = []
    monkeypatch.setattr(Leases, "mark_rung", lambda _, *job_ids: marked.append(job_ids))
    monkeypatch.setattr("graft_api.jobs.bells.MARKED_AFTER_SECONDS", 2.0)
    api.idle_workers()
    spec = api.spec()
    ids = [api.post(spec).json()["id"] for _ in range(3)]
    wait_until(lambda: marked, what="the mark")
    assert marked == [tuple(ids)]


def test_no_bell_is_rung_where_nobody_would_hear_it(api: ApiService) -> None:
    """Who is at work looks for more by itself, and so does a worker that comes."""
    api.idle_workers(Stage.TRAIN)
    first = api.new_job()["id"]
    api.let_bells_ring()
    assert api.doorbell.rung == []
    api.idle_workers(Stage.PREPARE, count=2)
    held = api.leases.claim("prepare-1/prepare", stage=Stage.PREPARE, gpu_classes=[])
    assert held is not None and held.id == first
    second, third = api.new_job()["id"], api.new_job()["id"]
    api.let_bells_ring()
    assert [job_id for job_id, _ in api.doorbell.rung] in ([second], [second, third]), "one of two workers is idle"
    assert "prepare" in dict(api.doorbell.rung)[second]


def test_one_bell_that_fails_costs_no_other_and_the_smaller_worker_takes_the_smaller_job(api: ApiService) -> None:
    api.workers.beat(**a_beat("a-large", gpu_class="80gb", takes_classes=("80gb", "24gb")))
    api.workers.beat(**a_beat("b-small", gpu_class="24gb"))
    bells, tried = api.http.app.state.neighbours.bells, list[str]()

    def fails(job_id: str, queue: str) -> bool:
        tried.append(queue)
        raise RuntimeError("unforeseen")

    api.doorbell.ring = fails  # type: ignore[method-assign]
    job = api.jobs.get("default", api.new_job()["id"])
    api.let_bells_ring()
    bells._look_at = time.monotonic() + 1  # both of them wait for the same look
    for gpu_class in ("24gb", "80gb"):
        bells.ring(dataclasses.replace(job, stage=Stage.TRAIN, gpu_class=gpu_class))
    wait_until(lambda: tried == ["24gb", "80gb"], what="a try of both")


def test_a_broker_that_is_slow_at_the_end_holds_it_up_for_one_bell(api: ApiService) -> None:
    api.idle_workers()
    rung, released = list[str](), threading.Event()
    api.doorbell.ring = lambda job_id, queue: not rung.append(job_id) and released.wait(60)  # type: ignore[method-assign]
    bells = api.http.app.state.neighbours.bells
    for _ in range(3):
        api.new_job()
    wait_until(lambda: rung, what="the first bell")
    bells.close()
    released.set()
    bells._ringer.shutdown(wait=True)
    assert len(rung) == 1


def test_a_broker_that_hangs_is_left_no_more_bells_for_reports_than_for_jobs(api: ApiService) -> None:
    rung, released = list[str](), threading.Event()
    api.doorbell.ring = lambda report_id, queue: not rung.append(report_id) and released.wait(60)  # type: ignore[method-assign]
    bells = api.http.app.state.neighbours.bells
    bells.ring_for_report(SimpleNamespace(id="0"))
    wait_until(lambda: rung, what="the first bell")
    for number in range(1, 3 * MAX_WAITING):
        bells.ring_for_report(SimpleNamespace(id=str(number)))
    released.set()
    api.let_bells_ring()
    assert rung == [str(number) for number in range(1 + MAX_WAITING)]


def test_where_the_store_does_not_tell_who_is_idle_all_are_rung_for(
    api: ApiService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_: Workers) -> list[LiveWorker]:
        raise StoreUnavailable(reason="away")

    monkeypatch.setattr(Workers, "idle", away)
    job_id = api.new_job()["id"]
    wait_until(lambda: api.doorbell.rung == [(job_id, "prepare")], what="the bell")


def test_a_broker_that_hangs_holds_up_no_post(api: ApiService) -> None:
    api.idle_workers()
    spec, released = api.spec(), threading.Event()
    ring = api.doorbell.ring
    api.doorbell.ring = lambda job_id, queue: released.wait(60) and ring(job_id, queue)  # type: ignore[method-assign]
    ids = [api.post(spec).json()["id"] for _ in range(3)]
    assert api.doorbell.rung == []
    released.set()
    wait_until(lambda: [job_id for job_id, _ in api.doorbell.rung] == ids, what="the bells, in order")


def test_what_a_worker_needs_stands_in_the_placement(api: ApiService) -> None:
    stored = api.jobs.get("default", api.new_job()["id"])
    assert stored.placement["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert stored.placement["max_position_embeddings"] == 4096
    assert stored.placement["estimate"]["components"]["base_weights"] > 3 * GIB


def test_a_dead_broker_does_not_fail_a_post(api: ApiService) -> None:
    api.doorbell.works = False
    job = api.new_job()
    assert _lost_bells(api) == [job["id"]], "the reconciler finds it"


def test_aliases_are_echoed_under_one_name(api: ApiService) -> None:
    job = api.new_job(lora={"rank": 8, "alpha": 16, "task_type": "CAUSAL_LM"}, training={"max_seq_length": 512})
    assert (job["spec"]["lora"]["r"], job["spec"]["lora"]["lora_alpha"]) == (8, 16)
    assert job["spec"]["training"]["max_length"] == 512


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "empty"),
        (b'{"base_model": ', "column"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"a": "\\u0000"}', "NUL"),
        (b"[" * 100_000, "deep"),
        (b"1" * 5000, "digits"),
    ],
)
def test_a_malformed_body_is_refused_with_what_is_wrong(refusing: ApiService, body: bytes, word: str) -> None:
    error = error_of(refusing.http.post("/jobs", content=body, headers={"content-type": "application/json"}), 400)
    assert (error["code"], error["type"]) == ("malformed_body", "invalid_request_error")
    assert word in error["message"]


def test_broken_json_is_refused_with_its_position(api: ApiService) -> None:
    body = b'{\n "base_model" 7\n}'
    error = error_of(api.http.post("/jobs", content=body, headers={"content-type": "application/json"}), 400)
    assert (error["line"], error["column"], error["position"]) == (2, 15, body.index(b"7"))


def test_a_body_that_is_not_sent_as_json_is_refused(api: ApiService) -> None:
    error = error_of(api.http.post("/jobs", content=b"{}", headers={"content-type": "text/plain"}), 415)
    assert error["code"] == "unsupported_media_type"
    assert "text/plain" in error["message"]


@pytest.mark.parametrize("declares_its_length", [True, False])
def test_a_body_over_the_limit_is_refused(api: ApiService, declares_its_length: bool) -> None:
    body = b'{"name": "' + b"x" * 1_000_001 + b'"}'
    content: Any = body if declares_its_length else iter([body[:500_000], body[500_000:]])
    error = error_of(api.http.post("/jobs", content=content, headers={"content-type": "application/json"}), 413)
    assert (error["code"], error["limit_bytes"]) == ("body_too_large", 1_000_000)


@pytest.mark.parametrize(
    ("changes", "param", "hint"),
    [
        ({"lora": {"rnak": 8}}, "lora.rnak", "lora_dropout, target_modules"),
        ({"lora": {"lora_aplha": 8}}, "lora.lora_aplha", "Did you mean 'lora_alpha'?"),
        ({"learning_rate": 1e-4}, "learning_rate", "Did you mean 'training.learning_rate'?"),
        ({"base_modle": "x"}, "base_modle", "Did you mean 'base_model'?"),
        ({"gpu": {"clas": "24gb"}}, "gpu.clas", "Did you mean 'class'?"),
        ({"validation": {"spilt": 0.1}}, "validation.spilt", "Did you mean 'split'?"),
        ({"trust_remote_code": True}, "trust_remote_code", "Known here: base_model"),
    ],
)
def test_an_unknown_key_is_refused_with_the_one_that_was_meant(
    refusing: ApiService, changes: dict[str, Any], param: str, hint: str
) -> None:
    error = error_of(refusing.post(refusing.spec(**changes)), 400)
    assert (error["code"], error["param"]) == ("unknown_parameter", param)
    assert hint in error["message"]


@pytest.mark.parametrize(
    ("changes", "param", "word"),
    [
        ({"lora": {"r": 900}}, "lora.r", "less than or equal to 512"),
        ({"lora": {"r": "8"}}, "lora.r", "found the text"),
        ({"training": {"packing": "yes"}}, "training.packing", "boolean"),
        ({"training": {"max_steps": True}}, "training.max_steps", "number"),
        ({"training": {"learning_rate": "2e-4"}}, "training.learning_rate", "number"),
        ({"training": {"gradient_checkpointing": "sometimes"}}, "training.gradient_checkpointing", "'auto'"),
        ({"training": {"optim": "sgd"}}, "training.optim", "paged_adamw_8bit"),
        ({"training": {"max_length": 100_000}}, "training.max_length", "4096 positions"),
        ({"training": {"early_stopping_patience": 2}}, None, "needs 'validation'"),
        ({"lora": {"target_modules": ["q_proj", 7]}}, "lora.target_modules[1]", "string"),
        ({"lora": {"target_modules": "all"}}, "lora.target_modules", "a valid array or"),
        ({"lora": 7}, "lora", "JSON object"),
        ({"lora": {"target_modules": ["q_porj"]}}, "lora.target_modules", "q_proj"),
        ({"gpu": {"count": 2}}, "gpu.count", "exactly 1"),
        ({"gpu": {"class": "7gb"}}, "gpu.class", "there are cpu"),
        ({"dataset": {}}, "dataset", "exactly one"),
        ({"dataset": {"file": "file-nope"}}, "dataset.file", "POST /files"),
        ({"dataset": {"uri": "s3://theirs/rows.jsonl"}}, "dataset.uri", "'theirs' is not allowed"),
        ({"validation": {"file": "file-nope"}}, "validation.file", "POST /files"),
        ({"metadata": {"a b": "c"}}, "metadata", "blanks"),
        ({"metadata": {"team": 7}}, "metadata.team", "string"),
        ({"base_model": "../etc"}, "base_model", "pattern"),
    ],
)
def test_a_refused_value_is_named_with_its_bound(
    refusing: ApiService, changes: dict[str, Any], param: str | None, word: str
) -> None:
    error = error_of(refusing.post({**refusing.spec(), **changes}), 422)
    assert (error["code"], error["param"]) == ("invalid_parameter", param)
    assert word in error["message"]


def test_bounds_stand_in_the_facts_and_every_wrong_value_is_told(api: ApiService) -> None:
    error = error_of(api.post(api.spec(lora={"r": 0}, training={"weight_decay": 7})), 422)
    assert error["bounds"] == {"ge": 1}
    assert [wrong["param"] for wrong in error["errors"]] == ["lora.r", "training.weight_decay"]


def test_a_body_that_is_no_object_and_a_missing_key_are_told(api: ApiService) -> None:
    assert "object" in error_of(api.http.post("/jobs", json=[1]), 422)["message"]
    missing = error_of(api.http.post("/jobs", json={"base_model": LLAMA}), 422)
    assert (missing["param"], "required" in missing["message"]) == ("dataset", True)


def test_an_unknown_base_is_refused_with_near_names(api: ApiService) -> None:
    error = error_of(api.post(api.spec(base_model="meta-llama/Lama-2-7b-hf")), 422)
    assert (error["code"], error["param"]) == ("unknown_base_model", "base_model")
    assert LLAMA in error["suggestions"]
    assert "Did you mean" in error["message"]
    assert "models/meta-llama/Lama-2-7b-hf in the service's state folder" in error["message"]


def test_a_registered_folder_is_a_base_and_goes_before_the_catalogue(api: ApiService) -> None:
    folder = api.settings.registered_models_dir / "graft" / "tiny"
    config: dict[str, Any] = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320, "max_position_embeddings": 256}
    register_base(folder, config)
    job = api.new_job(base_model="graft/tiny", training={"max_length": 128})
    assert job["gpu_class"] == "cpu"
    unknown = error_of(api.post(api.spec(base_model="graft/tinny")), 422)
    assert unknown["suggestions"][0] == "graft/tiny"
    assert "Did you mean 'graft/tiny'? GET /models (graft models)" in unknown["message"]
    listed = api.http.get("/models").json()["data"]
    assert (listed[0]["id"], listed[0]["source"]) == ("graft/tiny", "registered")
    assert api.http.get("/models/graft/tiny").json()["max_length"] == 256
    (folder / "config.json").write_text("{")
    assert error_of(api.post(api.spec(base_model="graft/tiny")), 422)["code"] == "unsupported_base_model"
    assert api.http.get("/models").json()["data"][0]["source"] == "catalogue", "an unusable folder is left out"


def test_a_job_too_big_for_the_fleet_is_refused_with_its_numbers(small: ApiService) -> None:
    spec = small.spec(base_model="meta-llama/Llama-2-70b-hf")
    error = error_of(small.post(spec), 422)
    assert error["code"] == "vram_capacity_exceeded"
    assert error["needed_bytes"] > error["available_bytes"]
    assert error["needed"]["base_weights"] > 30 * GIB
    assert error["available"]["usable"] == error["available_bytes"]
    assert (error["largest_class"], error["required_class"]) == ("24gb", "48gb")
    assert error["fits_here"]
    assert small.doorbell.rung == []


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        (
            {
                "base_model": "meta-llama/Llama-2-13b-hf",
                "training": {"max_length": 4096, "packing": False, "gradient_checkpointing": False},
            },
            2,
        ),
        ({"base_model": "huggyllama/llama-65b", "gpu": {"class": "24gb"}}, 1),
        ({"base_model": "tiiuae/falcon-40b", "lora": {"target_modules": ["query_key_value"]}}, 1),
        ({"base_model": "meta-llama/Llama-2-70b-hf", "training": {"max_length": 4096}}, 1),
    ],
)
def test_all_that_a_refusal_offers_is_accepted(small: ApiService, changes: dict[str, Any], least: int) -> None:
    spec = {**small.spec(), **changes}
    refused = error_of(small.post(spec), 422)
    assert len(refused["changes"]) >= least and refused["fits_here"]
    others = [{"param": "base_model", "to": base} for base in refused["fits_here"]]
    for change in [*refused["changes"], *others]:
        body = json.loads(json.dumps(spec))
        *path, name = change["param"].split(".")
        part = body
        for section in path:
            part = part.setdefault(section, {})
        part[name] = change["to"]
        answer = small.post(body)
        assert answer.status_code == 202, (change, answer.text)
        assert answer.json()["gpu_class"] == change.get("gpu_class", answer.json()["gpu_class"])


def test_a_length_that_nobody_chose_is_each_bases_own(small: ApiService) -> None:
    """A base with few positions does not shorten the advice: another base would be asked for its own length."""
    folder = small.settings.registered_models_dir / "graft" / "short"
    config: dict[str, Any] = {"model_type": "llama", "hidden_size": 12288, "intermediate_size": 49152}
    config |= {"num_hidden_layers": 96, "num_attention_heads": 96, "vocab_size": 32000, "max_position_embeddings": 256}
    register_base(folder, config)
    refused = error_of(small.post(small.spec(base_model="graft/short")), 422)
    (change,) = (change for change in refused["changes"] if change["param"] == "base_model")
    answer = small.post(small.spec(base_model=change["to"]))
    assert answer.status_code == 202, (change, answer.text)
    assert answer.json()["memory"]["predicted_peak_bytes"] <= change["needed_bytes"]


def test_an_estimate_decides_as_a_post_would_and_makes_no_job(api: ApiService) -> None:
    spec = api.spec()
    estimate = api.http.post("/jobs/estimate", json=spec).json()
    assert api.http.get("/jobs").json()["data"] == []
    job = api.post(spec).json()
    assert estimate["fits"] is True
    assert {name: estimate[name] for name in ("spec", "plan", "gpu_class")} == {
        name: job[name] for name in ("spec", "plan", "gpu_class")
    }
    assert estimate["memory"]["expected_bytes"] == job["memory"]["predicted_peak_bytes"]
    assert estimate["memory"] == job["memory"]["forecast"]
    assert sum(estimate["memory"]["components"].values()) == estimate["memory"]["expected_bytes"]
    assert sum(estimate["memory"]["host_components"].values()) == estimate["memory"]["host_bytes"] > 0
    assert error_of(api.http.post("/jobs/estimate", json={**spec, "x": 1}), 400)["code"] == "unknown_parameter"


def test_an_estimate_tells_speed_duration_and_cost(api: ApiService) -> None:
    spec = api.spec(base_model="meta-llama/Llama-2-7b-hf", gpu={"class": "141gb"}, training={"num_train_epochs": 2})
    speed = api.http.post("/jobs/estimate", json=spec).json()["speed"]
    rows = api.http.get(f"/files/{spec['dataset']['file']}").json()["report"]["rows"]
    assert speed["calibrated"] is True
    assert speed["steps"] == 2 * -(-rows // 16)
    for name in ("tokens_per_second", "duration_seconds", "cost"):
        assert 0 < speed[name]["low"] < speed[name]["expected"] < speed[name]["high"]
    assert speed["cost"]["expected"] == pytest.approx(speed["duration_seconds"]["expected"] / 3600 * 4.0)
    unknown = {**spec, "dataset": {"hub": "org/name"}}
    assert api.http.post("/jobs/estimate", json=unknown).json()["speed"]["duration_seconds"] is None
    slower = {**spec, "gpu": {"class": "24gb"}}
    derived = api.http.post("/jobs/estimate", json=slower).json()["speed"]
    assert derived["calibrated"] is False
    assert derived["tokens_per_second"]["expected"] < speed["tokens_per_second"]["expected"] / 3


def test_an_estimate_of_what_does_not_fit_names_the_changes(small: ApiService) -> None:
    spec = small.spec(base_model="meta-llama/Llama-2-70b-hf")
    answer = small.http.post("/jobs/estimate", json=spec)
    refused = error_of(small.post(spec), 422)
    assert answer.status_code == 200
    body = answer.json()
    assert (body["fits"], body["code"]) == (False, "vram_capacity_exceeded")
    assert "error" not in body
    assert (body["changes"], body["needed"]) == (refused["changes"], refused["needed"])


def test_the_same_key_and_body_give_the_same_job_and_ring_once(api: ApiService) -> None:
    api.idle_workers()
    spec = api.spec(training={"num_train_epochs": 3})
    first = api.post(spec, **{"idempotency-key": "k1"})
    reordered = dict(reversed({**spec, "training": {"num_train_epochs": 3.0}}.items()))
    second = api.post(reordered, **{"idempotency-key": "k1"})
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json()["id"] == second.json()["id"]
    other = api.post(spec, **{"idempotency-key": "k2"}).json()["id"]
    assert other != first.json()["id"]
    wait_until(lambda: [job_id for job_id, _ in api.doorbell.rung] == [first.json()["id"], other], what="two bells")


def test_the_same_key_with_another_body_is_refused(api: ApiService) -> None:
    spec = api.spec()
    api.post(spec, **{"idempotency-key": "k1"})
    error = error_of(api.post({**spec, "name": "other"}, **{"idempotency-key": "k1"}), 422)
    assert error["code"] == "idempotency_conflict"


def test_a_repeated_post_is_answered_before_admission_looks(api: ApiService) -> None:
    folder = api.settings.registered_models_dir / "graft" / "tiny"
    config: dict[str, Any] = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320, "max_position_embeddings": 2048}
    register_base(folder, config)
    spec = api.spec(base_model="graft/tiny")
    job = api.post(spec, **{"idempotency-key": "k"}).json()
    (folder / "config.json").unlink()
    assert api.post(spec, **{"idempotency-key": "k"}).json()["id"] == job["id"]
    assert error_of(api.post(spec), 422)["code"] == "unknown_base_model"


def test_a_key_that_is_too_long_is_refused(api: ApiService) -> None:
    error = error_of(api.post(api.spec(), **{"idempotency-key": "k" * 256}), 422)
    assert (error["code"], error["param"]) == ("invalid_parameter", "idempotency-key")


def test_a_queued_job_is_cancelled_at_once_and_asking_again_changes_nothing(api: ApiService) -> None:
    job = api.new_job()
    cancelled = api.http.post(f"/jobs/{job['id']}/cancel")
    assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
    assert cancelled.json()["queue"] is None
    again = api.http.post(f"/jobs/{job['id']}/cancel")
    assert (again.status_code, again.json()["status"]) == (200, "cancelled")


def test_a_running_job_is_asked_to_stop(api: ApiService) -> None:
    job = api.new_job()
    claimed = api.train(job["id"])
    assert api.http.post(f"/jobs/{job['id']}/cancel").json()["status"] == "cancelling"
    assert api.leases.renew(job["id"], claimed.epoch).cancel


def test_a_finished_job_cannot_be_cancelled(api: ApiService) -> None:
    job = api.new_job()
    api.succeed(job["id"])
    answer = api.http.post(f"/jobs/{job['id']}/cancel")
    error = error_of(answer, 409)
    assert (error["code"], error["type"]) == ("job_finished", "conflict_error")
    assert answer.headers["x-should-retry"] == "false"


def test_a_paused_job_says_so_and_is_rung_for_when_it_is_resumed(api: ApiService, nothing_is_held: None) -> None:
    api.idle_workers()
    first, second = api.new_job()["id"], api.new_job()["id"]
    wait_until(lambda: len(api.doorbell.rung) == 2, what="the bells of both")
    for _ in range(2):
        paused = api.http.post(f"/jobs/{first}/pause")
        assert (paused.status_code, paused.json()["status"]) == (200, "paused")
    assert paused.json()["queue"] == {
        "position": None,
        "reason": "Paused: once it is resumed it goes on, in its old place.",
        "predicted_start": None,
    }
    assert api.http.get(f"/jobs/{second}").json()["queue"]["position"] == 1
    assert [job["id"] for job in api.http.get("/jobs", params={"status": "paused"}).json()["data"]] == [first]
    assert first not in _lost_bells(api)
    resumed = api.http.post(f"/jobs/{first}/resume")
    assert (resumed.status_code, resumed.json()["status"]) == (200, "validating_files")
    assert resumed.json()["queue"]["position"] == 1
    wait_until(lambda: api.doorbell.rung[2:] == [(first, "prepare")], what="the bell of the resumed job")


def test_a_running_job_is_asked_to_pause_and_resume_takes_that_back(api: ApiService) -> None:
    job_id = api.new_job()["id"]
    claimed = api.train(job_id)
    assert api.http.post(f"/jobs/{job_id}/pause").json()["status"] == "pausing"
    assert [job["id"] for job in api.http.get("/jobs", params={"status": "pausing"}).json()["data"]] == [job_id]
    assert api.leases.renew(job_id, claimed.epoch).pause
    rung = list(api.doorbell.rung)
    assert api.http.post(f"/jobs/{job_id}/resume").json()["status"] == "running"
    assert not api.leases.renew(job_id, claimed.epoch).pause
    assert api.doorbell.rung == rung, "its worker is at it"


@pytest.mark.parametrize("verb", ["pause", "resume"])
def test_what_has_ended_or_is_being_cancelled_is_neither_paused_nor_resumed(api: ApiService, verb: str) -> None:
    ended = api.new_job()["id"]
    api.succeed(ended)
    cancelling = api.new_job()["id"]
    api.claim(cancelling)
    api.http.post(f"/jobs/{cancelling}/cancel")
    for job_id, code in ((ended, "job_finished"), (cancelling, "job_cancelling")):
        answer = api.http.post(f"/jobs/{job_id}/{verb}")
        assert error_of(answer, 409)["code"] == code
        assert answer.headers["x-should-retry"] == "false"


def test_a_running_job_shows_its_progress_and_a_finished_one_its_end(api: ApiService) -> None:
    job_id = api.new_job()["id"]
    api.train(job_id)
    running = api.http.get(f"/jobs/{job_id}").json()
    assert (running["status"], running["phase"], running["queue"]) == ("running", "fetching", None)
    assert (running["progress"]["step"], running["progress"]["total_steps"]) == (3, 10)
    assert running["metrics"]["train_loss"] == 1.0
    assert abs(running["estimated_finish"] - (time.time() + 70)) < 30
    claimed = api.jobs.get("default", job_id)
    failure = Failure(reason=FailureReason.LOSS_NOT_FINITE, message="The loss is nan.", param="training.learning_rate")
    api.leases.settle_failure(job_id, claimed.epoch, failure)
    failed = api.http.get(f"/jobs/{job_id}").json()
    assert (failed["status"], failed["estimated_finish"]) == ("failed", None)
    assert failed["finished_at"] >= failed["started_at"] >= failed["created_at"]
    assert (failed["error"]["code"], failed["error"]["category"]) == ("loss_not_finite", "user")
    assert failed["error"]["param"] == "training.learning_rate"


def test_jobs_are_listed_page_by_page_newest_first(api: ApiService) -> None:
    spec = api.spec()
    ids = [api.post(spec).json()["id"] for _ in range(5)]
    first = api.http.get("/jobs", params={"limit": 2}).json()
    assert (first["object"], first["has_more"]) == ("list", True)
    assert (first["first_id"], first["last_id"]) == (first["data"][0]["id"], first["data"][1]["id"])
    seen = [job["id"] for job in first["data"]]
    page = first
    while page["has_more"]:
        page = api.http.get("/jobs", params={"limit": 2, "after": page["last_id"]}).json()
        seen += [job["id"] for job in page["data"]]
    assert sorted(seen) == sorted(ids) and len(seen) == 5
    assert seen[0] == ids[-1]
    empty = api.http.get("/jobs", params={"status": "failed"}).json()
    assert empty == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


def test_jobs_are_filtered(api: ApiService) -> None:
    mine = api.new_job(metadata={"team": "search", "stage": "one"})["id"]
    other = api.new_job(base_model="huggyllama/llama-7b", metadata={"team": "ads"})["id"]
    api.http.post(f"/jobs/{other}/cancel")

    def found(**params: Any) -> list[str]:
        return [job["id"] for job in api.http.get("/jobs", params=params).json()["data"]]

    assert found(status="cancelled") == [other]
    assert found(base_model=LLAMA) == [mine]
    assert found(**{"metadata[team]": "search", "metadata[stage]": "one"}) == [mine]
    assert found(**{"metadata[team]": "search", "metadata[stage]": "two"}) == []
    assert sorted(found(created_after=int(time.time()) - 3600)) == sorted([mine, other])
    assert found(created_before=int(time.time()) - 3600) == []


@pytest.mark.parametrize(
    ("query", "status", "code", "param"),
    [
        ("limt=3", 400, "unknown_parameter", "limt"),
        ("metadata=x", 400, "unknown_parameter", "metadata"),
        ("status[a]=x", 400, "unknown_parameter", "status[a]"),
        ("metadata[]=x", 422, "invalid_parameter", "metadata"),
        ("base_model=%00", 400, "bad_request", "base_model"),
        ("limit=0", 422, "invalid_parameter", "limit"),
        ("limit=101", 422, "invalid_parameter", "limit"),
        ("limit=ten", 422, "invalid_parameter", "limit"),
        ("status=waiting", 422, "invalid_parameter", "status"),
        ("created_after=99999999999999999999", 422, "invalid_parameter", "created_after"),
        ("after=ftjob-nope", 404, "job_not_found", None),
    ],
)
def test_a_query_that_is_not_understood_is_refused(
    refusing: ApiService, query: str, status: int, code: str, param: str | None
) -> None:
    error = error_of(refusing.http.get(f"/jobs?{query}"), status)
    assert (error["code"], error["param"]) == (code, param)


def test_an_unknown_query_parameter_gets_the_one_that_was_meant(api: ApiService) -> None:
    assert "Did you mean 'limit'?" in error_of(api.http.get("/jobs?limt=3"), 400)["message"]
    assert "takes none" in error_of(api.http.get("/healthz?verbose=1"), 400)["message"]


@pytest.mark.parametrize("route", ["", "/events", "/metrics", "/logs", "/adapter", "/adapter/archive"])
def test_a_foreign_job_is_answered_exactly_as_an_unknown_one(api: ApiService, route: str) -> None:
    foreign = api.jobs.submit(a_new_job(tenant="other"))[0].id
    unknown = "ftjob-" + "x" * 24

    def answer(job_id: str) -> Any:
        headers = {"accept": "text/event-stream"} if route == "/events" else {}
        return error_of(api.http.get(f"/jobs/{job_id}{route}", headers=headers), 404)

    expected = json.loads(json.dumps(answer(unknown)).replace(unknown, foreign))
    assert answer(foreign) == expected
    assert expected["code"] == "job_not_found"
    for verb in ("cancel", "pause", "resume"):
        assert error_of(api.http.post(f"/jobs/{foreign}/{verb}"), 404)["code"] == "job_not_found"


def test_a_queued_job_says_what_it_waits_for(api: ApiService, nothing_is_held: None) -> None:
    first, second = api.new_job()["id"], api.new_job()["id"]

    def reason(job_id: str) -> str:
        return str(api.http.get(f"/jobs/{job_id}").json()["queue"]["reason"])

    later = "Once prepared, it waits for a worker of class 16gb: none is alive."
    assert reason(first) == f"No live worker prepares data. {later}"
    api.workers.beat(**a_beat("c", stages=(Stage.PREPARE, Stage.TRAIN)))
    assert reason(first) == f"Waiting for data preparation. {later}"
    assert reason(second) == f"Waiting for data preparation, 1 job before it. {later}"
    prepared = api.claim(first)
    preparing = api.http.get(f"/jobs/{first}").json()
    assert (preparing["status"], preparing["queue"]) == (
        "validating_files",
        {"position": None, "reason": later, "predicted_start": None},
    )
    api.leases.hand_to_training(first, prepared.epoch, {"report": {}})
    assert reason(first) == "No live worker of class 16gb."
    api.workers.beat(**a_beat("g", gpu_class="80gb"))
    assert reason(first) == "Next in line for a worker of class 16gb."
    assert reason(second) == "Waiting for data preparation."
    running = api.claim(first, Stage.TRAIN)
    api.leases.settle_failure(first, running.epoch, Failure(reason=FailureReason.CRASH, message="It crashed."))
    assert reason(first).startswith("The last run failed; the next one starts after ")
    preparing_second = api.claim(second)
    away = Failure(reason=FailureReason.BASE_MODEL_UNAVAILABLE, message="The hub does not answer.")
    until = api.jobs.waits_until(api.leases.settle_failure(second, preparing_second.epoch, away))
    assert reason(second) == f"The last run found the hub away; the next one starts after {until:%H:%M:%S} UTC."


def test_a_jobs_cost_is_its_time_on_the_gpu_at_the_price_of_its_class(api: ApiService) -> None:
    job = api.new_job(gpu={"class": "141gb"})
    assert job["cost"] == 0.0

    def cost() -> float:
        (listed,) = api.http.get("/jobs").json()["data"]
        assert listed["cost"] == pytest.approx(api.http.get(f"/jobs/{job['id']}").json()["cost"], abs=0.1)
        return float(listed["cost"])

    first = api.train(job["id"])
    _let_run(api, job["id"], 1800)
    assert cost() == pytest.approx(2.0, abs=0.1), "an hour of this class is 4.00"
    api.leases.settle_failure(job["id"], first.epoch, Failure(reason=FailureReason.CRASH, message="It crashed."))
    _let_run(api, job["id"], 3600)
    assert cost() == pytest.approx(2.0, abs=0.1), "waiting costs nothing"
    second = api.claim(job["id"], Stage.TRAIN)
    _let_run(api, job["id"], 3600)
    assert cost() == pytest.approx(6.0, abs=0.1)
    api.leases.settle_cancelled(job["id"], second.epoch)
    assert cost() == api.jobs.get("default", job["id"]).gpu_seconds * 4.0 / 3600 == pytest.approx(6.0, abs=0.1)


def test_a_replanned_job_costs_what_its_new_class_does(api: ApiService) -> None:
    job_id = api.new_job()["id"]
    running = api.train(job_id)
    _let_run(api, job_id, 3600)
    failure = Failure(reason=FailureReason.CUDA_OUT_OF_MEMORY, message="It was too much.")
    api.leases.settle_failure(job_id, running.epoch, failure, replanned=a_placement("80gb"))
    job = api.http.get(f"/jobs/{job_id}").json()
    assert (job["gpu_class"], job["cost"]) == ("80gb", pytest.approx(2.5, abs=0.1))


def test_a_job_of_a_class_without_a_price_has_no_cost(api: ApiService) -> None:
    job, _ = api.jobs.submit(a_new_job())
    assert api.http.get(f"/jobs/{job.id}").json()["cost"] is None
    running = api.train(job.id)
    assert api.http.get(f"/jobs/{job.id}").json()["cost"] is None
    failure = Failure(reason=FailureReason.CUDA_OUT_OF_MEMORY, message="It was too much.")
    api.leases.settle_failure(job.id, running.epoch, failure, replanned=a_placement("cpu"))
    assert api.http.get(f"/jobs/{job.id}").json()["cost"] is None


def _let_run(api: ApiService, job_id: str, seconds: float) -> None:
    """Let a claim be so long ago, and a retry be due, without waiting for it."""
    with api.database.writing() as connection:
        earlier = {"claimed_at": jobs.c.claimed_at - seconds, "not_before": 0.0}
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(**earlier))


def _lost_bells(api: ApiService) -> list[str]:
    """The jobs whose bell a reconciler would ring now; asking marks them, as a reconciler does."""
    api.idle_workers()
    return [bell.job_id for bell in api.leases.take_lost_bells(timedelta(seconds=30), api.workers.idle())]


def _bell_rung_at(api: ApiService, job_id: str) -> float | None:
    with api.database.reading() as connection:
        return connection.execute(select(jobs.c.bell_rung_at).where(jobs.c.id == job_id)).scalar_one()

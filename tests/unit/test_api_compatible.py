"""The compatible surface in-process: what becomes of each part of a request, and how each part of a job looks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from sqlalchemy import event, update
from sqlalchemy.engine import Connection
from sqlalchemy.exc import OperationalError

from graft_api.compatible.requests import native_body
from graft_api.rates import Rates
from graft_shared.errors import GraftError
from graft_shared.jobs import Checkpoint, Failure, FailureReason, StoredObject
from graft_shared.store import Database, Order
from graft_shared.store.tables import jobs
from tests.api_service import LLAMA, ROWS, ApiService, error_of, make_service

RED, BLUE = "r" * 24, "b" * 24
FILE = "file-rows"
JOBS = "/v1/fine_tuning/jobs"


def asked(**changes: Any) -> dict[str, Any]:
    return {"model": LLAMA, "training_file": FILE, **changes}


def post(api: ApiService, headers: dict[str, str] | None = None, **changes: Any) -> Any:
    training_file = changes.pop("training_file", None) or api.upload().json()["id"]
    body = {"model": LLAMA, "training_file": training_file, **changes}
    return api.http.post(JOBS, json=body, headers=headers or {})


def sent(count: int, timeout: str = "600") -> dict[str, str]:
    return {"x-stainless-retry-count": str(count), "x-stainless-read-timeout": timeout}


# Requests.


@pytest.mark.parametrize(
    ("hyperparameters", "training"),
    [
        ({}, {}),
        ({"batch_size": "auto", "n_epochs": "auto", "learning_rate_multiplier": "auto"}, {}),
        ({"batch_size": None}, {}),
        ({"batch_size": 16}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}),
        ({"batch_size": 6}, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}),
        ({"batch_size": 7}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 7}),
        ({"batch_size": 1}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}),
        ({"n_epochs": 2}, {"num_train_epochs": 2}),
        ({"learning_rate_multiplier": 0.1}, {"learning_rate": 2e-5}),
        ({"learning_rate_multiplier": 3}, {"learning_rate": 6e-4}),
    ],
)
def test_hyperparameters_mean_the_same_in_their_old_and_their_new_place(
    hyperparameters: dict[str, Any], training: dict[str, Any]
) -> None:
    method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    expected = {"training": training} if training else {}
    for body in (asked(hyperparameters=hyperparameters), asked(method=method)):
        assert native_body(body) == {"base_model": LLAMA, "dataset": {"file": FILE}, **expected}
    assert native_body(asked(method=method, hyperparameters=hyperparameters)) == native_body(asked(method=method))


def test_every_other_part_has_its_native_place() -> None:
    body = asked(validation_file="file-v", suffix="bot", seed=7, metadata={"a": "b"}, integrations=[], method=None)
    assert native_body(body) == {
        "base_model": LLAMA,
        "dataset": {"file": FILE},
        "validation": {"file": "file-v"},
        "training": {"seed": 7},
        "name": "bot",
        "metadata": {"a": "b"},
    }
    nulls = dict.fromkeys(("validation_file", "suffix", "seed", "metadata", "integrations", "hyperparameters"))
    assert native_body(asked(**nulls)) == native_body(asked())


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}}}, "invalid_parameter", "method.type"),
        ({"method": {"type": "reinforcement"}}, "invalid_parameter", "method.type"),
        ({"method": {"type": "magic"}}, "invalid_parameter", "method.type"),
        ({"method": {"type": "supervised", "dpo": {}}}, "invalid_parameter", "method.dpo"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "invalid_parameter", "integrations"),
        ({"suffix": "x" * 65}, "invalid_parameter", "suffix"),
        ({"seed": -1}, "invalid_parameter", "seed"),
        ({"seed": True}, "invalid_parameter", "seed"),
        ({"seed": "7"}, "invalid_parameter", "seed"),
        ({"hyperparameters": {"n_epochs": 0}}, "invalid_parameter", "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": "many"}}, "invalid_parameter", "hyperparameters.n_epochs"),
        ({"hyperparameters": {"epochs": 2}}, "unknown_parameter", "hyperparameters.epochs"),
        ({"n_epochs": 2}, "unknown_parameter", "n_epochs"),
        ({"modell": LLAMA}, "unknown_parameter", "modell"),
        ({"model": None}, "invalid_parameter", "model"),
    ],
)
def test_what_is_not_offered_is_refused_by_its_name(changes: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(GraftError) as refused:
        native_body(asked(**changes))
    assert (refused.value.code, refused.value.param) == (code, param)


def test_two_places_that_differ_are_refused_and_an_unknown_key_is_answered_with_the_one_that_was_meant() -> None:
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}
    with pytest.raises(GraftError, match="one place"):
        native_body(asked(method=method, hyperparameters={"n_epochs": 3}))
    with pytest.raises(GraftError, match="Did you mean 'suffix'"):
        native_body(asked(sufix="x"))


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"model": "no/such"}, "unknown_base_model", "model"),
        ({"model": "no such"}, "invalid_parameter", "model"),
        ({"training_file": "file-nothing"}, "invalid_parameter", "training_file"),
        ({"validation_file": "file-nothing"}, "invalid_parameter", "validation_file"),
        ({"metadata": {"a b": "c"}}, "invalid_parameter", "metadata"),
        (
            {"hyperparameters": {"learning_rate_multiplier": 5001}},
            "invalid_parameter",
            "method.supervised.hyperparameters.learning_rate_multiplier",
        ),
    ],
)
def test_what_admission_refuses_is_said_in_the_words_of_the_request(
    api: ApiService, changes: dict[str, Any], code: str, param: str
) -> None:
    error = error_of(post(api, **changes), 422)
    assert (error["code"], error["param"]) == (code, param)
    assert not any(word in error["message"] for word in ("base_model", "dataset", "training.learning_rate"))


# Jobs.


def test_both_surfaces_show_the_same_job(api: ApiService) -> None:
    validation = api.upload().json()["id"]
    hyperparameters = {"batch_size": 6, "learning_rate_multiplier": 0.3, "n_epochs": 2}
    answer = post(
        api, suffix="a bot", seed=7, metadata={"team": "x"}, validation_file=validation, hyperparameters=hyperparameters
    )
    assert answer.status_code == 200
    job = answer.json()
    native = api.http.get(f"/jobs/{job['id']}").json()
    assert native["spec"]["training"]["gradient_accumulation_steps"] == 2
    assert native["spec"]["training"]["learning_rate"] == 6e-5
    assert job == api.http.get(f"{JOBS}/{job['id']}").json()
    assert job == {
        "id": native["id"],
        "object": "fine_tuning.job",
        "status": "validating_files",
        "graft_status": "validating_files",
        "created_at": native["created_at"],
        "finished_at": None,
        "estimated_finish": None,
        "model": LLAMA,
        "fine_tuned_model": None,
        "organization_id": "default",
        "training_file": native["spec"]["dataset"]["file"],
        "validation_file": validation,
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "seed": 7,
        "trained_tokens": None,
        "result_files": [],
        "integrations": [],
        "error": None,
        "metadata": {"team": "x"},
    }
    other = api.new_job(dataset={"hub": "org/name"}, training={"num_train_epochs": 0.5})
    listed = api.http.get(JOBS).json()["data"]
    assert [each["id"] for each in listed] == [other["id"], job["id"]]
    assert (listed[0]["training_file"], listed[0]["hyperparameters"]["n_epochs"]) == ("hub:org/name", 0.5)
    assert [each["id"] for each in api.http.get(f"{JOBS}?metadata[team]=x").json()["data"]] == [job["id"]]


def test_words_that_openai_lacks_become_the_nearest_that_is_no_lie(api: ApiService) -> None:
    job_id = post(api).json()["id"]

    def said(verb: str) -> tuple[str, str]:
        job = api.http.post(f"{JOBS}/{job_id}/{verb}").json()
        return job["status"], job["graft_status"]

    assert said("pause") == ("queued", "paused")
    assert said("resume") == ("validating_files", "validating_files")
    api.train(job_id)
    assert said("pause") == ("running", "pausing")
    assert said("cancel") == ("running", "cancelling")
    late = api.http.post(f"{JOBS}/{job_id}/resume")
    assert error_of(late, 409)["code"] == "job_cancelling"
    assert late.headers["x-should-retry"] == "false"


def test_a_succeeded_job_names_its_adapter_which_is_a_model_of_its_tenant(tmp_path: Path, template: Path) -> None:
    api = make_service(tmp_path, template, api_keys=f"red={RED},blue={BLUE}")
    api.http.headers.update({"authorization": f"Bearer {RED}"})
    running_id = post(api, suffix="my bot!").json()["id"]
    done = api.succeed(running_id)
    job = api.http.get(f"{JOBS}/{done.id}").json()
    name = f"ft:{LLAMA}:red:my-bot-:{done.id.removeprefix('ftjob-')}"
    assert (job["status"], job["fine_tuned_model"], job["trained_tokens"]) == ("succeeded", name, 0)
    model = {"id": name, "object": "model", "created": job["finished_at"], "owned_by": "red"}
    assert api.http.get(f"/v1/models/{name}").json() == model
    models = api.http.get("/v1/models").json()
    assert model in models["data"] and not models["has_more"]
    assert {"id": LLAMA, "object": "model", "created": 0, "owned_by": "meta-llama"} in models["data"]
    assert api.http.get(f"/v1/models/{LLAMA}").json()["id"] == LLAMA
    waiting = post(api).json()["id"].removeprefix("ftjob-")
    for unknown in ("nothing", "ft:a:b:c:d", f"ft:{LLAMA}:red::{waiting}", name.replace("my-bot", "your-bot")):
        assert error_of(api.http.get(f"/v1/models/{unknown}"), 404)["code"] == "model_not_found"
    api.http.headers.update({"authorization": f"Bearer {BLUE}"})
    assert error_of(api.http.get(f"/v1/models/{name}"), 404)["code"] == "model_not_found"
    assert model not in api.http.get("/v1/models").json()["data"]
    api.database.close()


def test_a_failed_job_says_why_in_the_words_of_its_request(api: ApiService) -> None:
    job_id = post(api).json()["id"]
    claimed = api.claim(job_id)
    failure = Failure(reason=FailureReason.INVALID_TRAINING_FILE, message="Line 2: broken", param="dataset")
    api.leases.settle_failure(job_id, claimed.epoch, failure)
    job = api.http.get(f"{JOBS}/{job_id}").json()
    assert (job["status"], job["fine_tuned_model"]) == ("failed", None)
    assert (job["error"]["code"], job["error"]["param"]) == ("invalid_training_file", "training_file")


def test_events_come_newest_first_and_page_by_their_ids(api: ApiService) -> None:
    job_id = post(api).json()["id"]
    api.train(job_id, steps=3)
    seen: list[dict[str, Any]] = []
    while True:
        after = {"after": seen[-1]["id"]} if seen else {}
        page = api.http.get(f"{JOBS}/{job_id}/events", params={"limit": 4, **after}).json()
        seen += page["data"]
        if not page["has_more"]:
            break
    native = api.http.get(f"/jobs/{job_id}/events").json()["data"]
    assert [event["message"] for event in seen] == [event["message"] for event in reversed(native)]
    assert len({event["id"] for event in seen}) == len(native)
    newest = seen[0]
    assert (newest["type"], newest["level"], newest["data"]["step"]) == ("metrics", "info", 3)
    assert newest["data"]["train_loss"] == 1.0 and "loss" not in newest["data"]
    assert (seen[-1]["type"], seen[-1]["data"]["event"]) == ("message", "submitted")
    other = post(api).json()["id"]
    for wrong in (api.http.get(f"{JOBS}/{other}/events").json()["data"][0]["id"], "ftevent-x", "1"):
        assert error_of(api.http.get(f"{JOBS}/{job_id}/events?after={wrong}"), 422)["param"] == "after"


def test_checkpoints_have_ids_that_stay_and_the_losses_of_their_step(api: ApiService) -> None:
    job_id = post(api, suffix="bot").json()["id"]
    job = api.train(job_id, steps=3)

    def commit(step: int) -> None:
        stored = StoredObject(key=f"k{step}", size=step, sha256="0" * 64)
        api.leases.commit_checkpoint(job_id, job.epoch, Checkpoint(step=step, epoch=job.epoch, object=stored))

    for step in (0, 2, 3):
        commit(step)
    first = api.http.get(f"/jobs/{job_id}/checkpoints").json()["data"]
    assert [(each["step"], each["is_stored"], each["metrics"]["train_loss"]) for each in first] == [
        (3, True, 1.0),
        (2, False, 1.5),
    ]
    commit(5)
    later = api.http.get(f"/jobs/{job_id}/checkpoints").json()["data"]
    assert [each["id"] for each in later[1:]] == [each["id"] for each in first]
    page = api.http.get(f"{JOBS}/{job_id}/checkpoints", params={"limit": 1, "after": later[0]["id"]}).json()
    (checkpoint,) = page["data"]
    assert page["has_more"]
    assert checkpoint["id"] == first[0]["id"]
    assert checkpoint["fine_tuned_model_checkpoint"].endswith(f":bot:{job_id.removeprefix('ftjob-')}:ckpt-step-3")
    assert checkpoint["metrics"] == {"step": 3, "train_loss": 1.0, "valid_loss": None}
    assert error_of(api.http.get(f"/jobs/{job_id}/checkpoints?after=ftckpt-x-1"), 422)["param"] == "after"


# What is sent again.


def test_a_request_that_is_sent_again_makes_no_second_job_and_an_equal_one_does(api: ApiService) -> None:
    file_id = api.upload().json()["id"]
    first = post(api, sent(0), training_file=file_id).json()["id"]
    assert post(api, sent(1), training_file=file_id).json()["id"] == first
    assert post(api, sent(2), training_file=file_id).json()["id"] == first
    second = post(api, sent(0), training_file=file_id).json()["id"]
    assert second != first
    assert post(api, sent(1), training_file=file_id).json()["id"] == second, "the newest is meant"
    assert post(api, sent(1), training_file=file_id, seed=1).json()["id"] not in (first, second)
    assert post(api, training_file=file_id).json()["id"] not in (first, second), "a client that does not count"
    assert len(api.doorbell.rung) <= 4


def test_a_request_that_is_sent_again_finds_its_job_after_its_file_has_gone(api: ApiService) -> None:
    file_id = api.upload().json()["id"]
    first = post(api, sent(0), training_file=file_id).json()["id"]
    api.http.post(f"{JOBS}/{first}/cancel")
    assert api.http.delete(f"/v1/files/{file_id}").status_code == 200
    assert post(api, sent(1), training_file=file_id).json()["id"] == first
    assert error_of(post(api, sent(0), training_file=file_id), 422)["param"] == "training_file"


def test_a_job_that_is_older_than_the_clients_patience_is_not_meant(api: ApiService) -> None:
    file_id = api.upload().json()["id"]
    first = post(api, sent(0), training_file=file_id).json()["id"]
    age(api, first, timedelta(seconds=5 + 120 + 1))
    assert post(api, sent(1, "600.0"), training_file=file_id).json()["id"] == first
    assert post(api, sent(1, "5.0"), training_file=file_id).json()["id"] != first


def test_a_key_decides_where_there_is_one(api: ApiService) -> None:
    file_id = api.upload().json()["id"]
    keyed = post(api, {**sent(0), "idempotency-key": "k"}, training_file=file_id).json()["id"]
    assert post(api, {**sent(1), "idempotency-key": "k"}, training_file=file_id).json()["id"] == keyed
    assert post(api, {**sent(1), "idempotency-key": "l"}, training_file=file_id).json()["id"] != keyed
    conflict = post(api, {"idempotency-key": "k"}, training_file=file_id, seed=3)
    assert error_of(conflict, 422)["code"] == "idempotency_conflict"
    native = api.post({"base_model": LLAMA, "dataset": {"file": file_id}}, **{"Idempotency-Key": "k"})
    assert native.json()["id"] == keyed, "one job, whichever surface it is asked on"


def test_where_a_quota_is_reached_a_later_sending_is_given_the_job_of_the_earlier_one_or_told_of_it(
    tmp_path: Path, template: Path
) -> None:
    api = make_service(tmp_path, template, quota_queued_jobs=1)
    file_id = api.upload().json()["id"]
    slow = post(api, sent(0), training_file=file_id).json()["id"]
    assert post(api, sent(1), training_file=file_id).json()["id"] == slow
    other = {"seed": 7}  # of which nothing is known yet: the first sending may still be on its way
    refused = post(api, sent(1), training_file=file_id, **other)
    assert error_of(refused, 429)["code"] == "quota_exceeded"
    assert refused.headers["retry-after"] == "30" and "x-should-retry" not in refused.headers
    assert "may have made its job" in error_of(refused, 429)["message"]


def age(api: ApiService, job_id: str, by: timedelta) -> None:
    with api.database.writing() as connection:
        earlier = update(jobs).where(jobs.c.id == job_id).values(created_at=jobs.c.created_at - by.total_seconds())
        connection.execute(earlier)


def test_what_was_surely_not_kept_is_not_sent_again_by_its_client_and_what_may_be_kept_is(
    api: ApiService, tmp_path: Path
) -> None:
    file_id = api.upload().json()["id"]
    earlier = post(api, sent(0), training_file=file_id).json()["id"]
    database, away = tmp_path / "graft.db", tmp_path / "away.db"
    api.database.close()
    database.rename(away)
    database.mkdir()
    lost = post(api, sent(0), training_file=file_id)
    assert (lost.status_code, lost.headers["x-should-retry"]) == (503, "false"), "else it were given the earlier job"
    for headers in (sent(1), {**sent(0), "idempotency-key": "k"}, {}):
        assert "x-should-retry" not in post(api, headers, training_file=file_id).headers, headers
    database.rmdir()
    away.rename(database)
    assert post(api, sent(0), training_file=file_id).json()["id"] != earlier, "called again it is a job of its own"
    with no_word_of_commits(api.database):
        unknown = post(api, sent(0), training_file=file_id)
    assert unknown.status_code == 503 and "x-should-retry" not in unknown.headers
    newest = api.http.get(JOBS).json()["data"][0]["id"]
    assert post(api, sent(1), training_file=file_id).json()["id"] == newest
    assert len(api.http.get(JOBS).json()["data"]) == 3


@contextmanager
def no_word_of_commits(database: Database) -> Iterator[None]:
    """The database keeps what is written, and the connection breaks before it says so."""

    def commit_and_break(connection: Connection) -> None:
        connection.exec_driver_sql("COMMIT")
        raise OperationalError("COMMIT", None, Exception("the connection broke"))

    event.listen(database.engine, "commit", commit_and_break)
    yield
    event.remove(database.engine, "commit", commit_and_break)


# Files.


def test_a_file_has_openais_shape_and_is_listed_in_either_order(api: ApiService) -> None:
    form = {"purpose": (None, "fine-tune"), "file": ("rows.jsonl", ROWS)}
    file = api.http.post("/v1/files", files=form).json()
    assert {**file, "id": "", "created_at": 0} == {
        "id": "",
        "object": "file",
        "bytes": len(ROWS),
        "created_at": 0,
        "expires_at": None,
        "filename": "rows.jsonl",
        "purpose": "fine-tune",
        "status": "processed",
        "status_details": None,
    }
    ids = [file["id"], *(api.upload().json()["id"] for _ in range(3))]

    def pages(**query: Any) -> list[str]:
        seen: list[str] = []
        while True:
            after = {"after": seen[-1]} if seen else {}
            page = api.http.get("/v1/files", params={"limit": 3, **query, **after}).json()
            seen += [each["id"] for each in page["data"]]
            if not page["has_more"]:
                return seen

    assert pages() == pages(order=Order.DESC.value, purpose="fine-tune") == ids[::-1]
    assert pages(order="asc") == ids
    assert pages(purpose="batch") == []
    assert api.http.get(f"/v1/files/{file['id']}/content").content == ROWS


def test_what_a_file_cannot_have_is_refused_by_its_name(api: ApiService) -> None:
    expiry = {"expires_after[anchor]": (None, "created_at"), "expires_after[seconds]": (None, "3600")}
    form = {"purpose": (None, "fine-tune"), **expiry, "file": ("rows.jsonl", ROWS)}
    error = error_of(api.http.post("/v1/files", files=form), 422)
    assert (error["param"], error["code"]) == ("expires_after", "invalid_parameter")
    assert "deleted" in error["message"]
    batch = {"purpose": (None, "batch"), "file": ("rows.jsonl", ROWS)}
    assert error_of(api.http.post("/v1/files", files=batch), 422)["param"] == "purpose"


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_a_file_is_deleted_once_no_job_has_to_read_it(api: ApiService, prefix: str) -> None:
    training, validation = (api.upload().json()["id"] for _ in range(2))
    job_id = post(api, training_file=training, validation_file=validation).json()["id"]
    for file_id in (training, validation):
        refused = api.http.delete(f"{prefix}/files/{file_id}")
        assert error_of(refused, 409)["code"] == "file_in_use"
        assert (refused.headers["x-should-retry"], refused.json()["error"]["job_id"]) == ("false", job_id)
    api.train(job_id)
    answer = api.http.delete(f"{prefix}/files/{training}")
    assert answer.json() == {"id": training, "object": "file", "deleted": True}
    for again in (api.http.get(f"/files/{training}"), api.http.delete(f"{prefix}/files/{training}")):
        assert error_of(again, 404)["code"] == "file_not_found"
    assert [file["id"] for file in api.http.get("/files").json()["data"]] == [validation]


# Deleting jobs.


def test_only_a_job_that_has_ended_is_deleted_and_then_it_never_was(api: ApiService) -> None:
    key = {"Idempotency-Key": "k"}
    spec = api.spec()
    job_id = api.post(spec, **key).json()["id"]
    refused = api.http.delete(f"/jobs/{job_id}")
    assert error_of(refused, 409)["code"] == "job_not_ended"
    assert refused.headers["x-should-retry"] == "false"
    api.http.post(f"/jobs/{job_id}/cancel")
    assert api.http.delete(f"/jobs/{job_id}").json() == {"id": job_id, "object": "fine_tuning.job", "deleted": True}
    for path in ("", "/events", "/metrics", "/logs", "/checkpoints", "/adapter"):
        assert error_of(api.http.get(f"/jobs/{job_id}{path}"), 404)["code"] == "job_not_found"
    for verb in ("cancel", "pause", "resume"):
        assert error_of(api.http.post(f"/jobs/{job_id}/{verb}"), 404)["code"] == "job_not_found"
    assert error_of(api.http.delete(f"/jobs/{job_id}"), 404)["code"] == "job_not_found"
    assert api.http.get("/jobs").json()["data"] == api.http.get(JOBS).json()["data"] == []
    assert api.post(spec, **key).json()["id"] != job_id, "the key is free"


def test_the_document_describes_the_requests_and_the_errors_of_the_surface(api: ApiService) -> None:
    document = api.http.get("/openapi.json").json()
    request = document["components"]["schemas"]["FineTuningRequest"]
    assert request["additionalProperties"] is False
    for example in request["examples"]:
        native_body(example)
    paths = {path: operations for path, operations in document["paths"].items() if path.startswith("/v1/")}
    assert len(paths) == 12
    for path, operations in paths.items():
        for method, operation in operations.items():
            if "{" in path:
                assert "404" in operation["responses"], (method, path)
    assert "409" in document["paths"][f"{JOBS}/{{job_id}}/cancel"]["post"]["responses"]
    assert json.dumps(document).count("#/$defs/") == 0


def test_a_rate_limited_job_without_a_key_is_sent_again_by_its_client_only_where_it_may_be_made(
    tmp_path: Path, template: Path
) -> None:
    api = make_service(tmp_path, template, requests_per_minute=1)
    body = asked()
    api.http.post(JOBS, json=body)
    refused = api.http.post(JOBS, json=body, headers=sent(0))
    assert refused.status_code == 429 and refused.headers["retry-after"]
    assert refused.headers["x-should-retry"] == "false"
    assert "sent before" not in error_of(refused, 429)["message"], "nothing was made: wait, and call again"
    again = api.http.post(JOBS, json=body, headers=sent(1))
    assert again.headers["retry-after"] and "x-should-retry" not in again.headers
    assert error_of(again, 429)["message"].endswith(f"look for that with GET {JOBS} before you call anew.")
    keyed = api.http.post(JOBS, json=body, headers={"idempotency-key": "night-run-1"})
    assert keyed.status_code == 429 and "x-should-retry" not in keyed.headers


def test_openais_client_is_given_the_job_whose_answer_was_lost_though_its_next_try_is_over_the_limit(
    tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = make_service(tmp_path, template, requests_per_minute=2)
    file_id, statuses, pauses = api.upload().json()["id"], list[int](), list[float]()

    def exchange(request: httpx2.Request) -> httpx2.Response:
        given = api.http.request(
            request.method, request.url.path, content=request.read(), headers=dict(request.headers)
        )
        statuses.append(given.status_code)
        if len(statuses) == 1:
            raise httpx2.ReadTimeout("the answer was lost", request=request)
        return httpx2.Response(given.status_code, headers=dict(given.headers), content=given.content)

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            here = api.http.app.state.neighbours  # type: ignore[attr-defined]
            api.http.app.state.neighbours = replace(here, rates=Rates(None))  # type: ignore[attr-defined]

    monkeypatch.setattr("openai._base_client.time.sleep", pause)
    over = httpx2.Client(transport=httpx2.MockTransport(exchange))
    client = openai.OpenAI(base_url="http://localhost/v1", api_key="none", http_client=over)
    job = client.fine_tuning.jobs.create(model=LLAMA, training_file=file_id)
    assert (statuses, pauses[1] > 1) == ([200, 429, 200], True)
    assert [each["id"] for each in api.http.get(JOBS).json()["data"]] == [job.id]

"""Jobs that go on from an earlier adapter: what they take over from it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.api_service import LLAMA, ApiService, error_of, make_service

RED, BLUE = "r" * 32, "b" * 32


def an_earlier_job(api: ApiService, **changes: Any) -> str:
    lora = {"r": 8, "lora_alpha": 24, "target_modules": "all-linear", "lora_dropout": 0.1}
    return api.succeed(api.post(api.spec(lora=lora, **changes)).json()["id"]).id


def test_a_job_takes_over_the_form_of_the_adapter_that_it_goes_on_from(api: ApiService) -> None:
    earlier = an_earlier_job(api, revision="v1.0")
    lora = {"lora_dropout": 0, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                                                  "down_proj"]}  # fmt: skip
    answer = api.post(api.spec(adapter={"job": earlier}, lora=lora))
    assert answer.status_code == 202, answer.text
    spec = answer.json()["spec"]
    assert spec["adapter"] == {"job": earlier}
    assert spec["revision"] == "v1.0"
    assert (spec["lora"]["r"], spec["lora"]["lora_alpha"], spec["lora"]["target_modules"]) == (8, 24, "all-linear")
    assert spec["lora"]["lora_dropout"] == 0, "that is the recipe's, not the adapter's"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"lora": {"r": 16}}, "lora.r"),
        ({"lora": {"lora_alpha": 16}}, "lora.lora_alpha"),
        ({"lora": {"use_rslora": True}}, "lora.use_rslora"),
        ({"lora": {"target_modules": ["q_proj"]}}, "lora.target_modules"),
        ({"lora": {"target_modules": "auto"}}, "lora.target_modules"),
        ({"base_model": "mistralai/Mistral-7B-v0.1"}, "base_model"),
        ({"revision": "other"}, "revision"),
    ],
)
def test_another_base_or_form_is_refused(api: ApiService, changes: dict[str, Any], param: str) -> None:
    earlier = an_earlier_job(api)
    refused = error_of(api.post(api.spec(adapter={"job": earlier}, **changes)), 422)
    assert (refused["code"], refused["param"]) == ("invalid_parameter", param)
    assert earlier in refused["message"]


def test_only_an_adapter_of_the_tenants_own_can_be_gone_on_from(tmp_path: Path, template: Path) -> None:
    api = make_service(tmp_path, template, api_keys=f"red={RED},blue={BLUE}")
    api.http.headers.update({"authorization": f"Bearer {RED}"})
    earlier, waiting = an_earlier_job(api), api.post(api.spec()).json()["id"]
    refused = error_of(api.post(api.spec(adapter={"job": waiting})), 422)
    assert refused["param"] == "adapter.job" and "validating_files" in refused["message"]
    unknown = error_of(api.post(api.spec(adapter={"job": "ftjob-none"})), 422)
    api.http.headers.update({"authorization": f"Bearer {BLUE}"})
    foreign = error_of(api.post(api.spec(adapter={"job": earlier})), 422)
    assert foreign == {**unknown, "message": unknown["message"].replace("ftjob-none", earlier),
                       "reason": unknown["reason"].replace("ftjob-none", earlier)}  # fmt: skip
    api.database.close()


def test_a_job_that_another_goes_on_from_can_be_deleted_once_its_adapter_is_copied(api: ApiService) -> None:
    earlier = an_earlier_job(api)
    later = api.post(api.spec(adapter={"job": earlier})).json()["id"]
    refused = error_of(api.http.delete(f"/jobs/{earlier}"), 409)
    assert refused["code"] == "job_in_use" and later in refused["message"]
    api.train(later)
    assert api.http.delete(f"/jobs/{earlier}").status_code == 200


def test_openais_clients_go_on_from_the_model_that_a_job_made(api: ApiService) -> None:
    earlier = an_earlier_job(api)
    model = api.http.get(f"/v1/fine_tuning/jobs/{earlier}").json()["fine_tuned_model"]
    body = {"model": model, "training_file": api.upload().json()["id"]}
    later = api.http.post("/v1/fine_tuning/jobs", json=body)
    assert later.status_code == 200, later.text
    assert later.json()["model"] == LLAMA
    spec = api.http.get(f"/jobs/{later.json()['id']}").json()["spec"]
    assert (spec["adapter"], spec["lora"]["r"]) == ({"job": earlier}, 8)
    strange = api.http.post("/v1/fine_tuning/jobs", json={**body, "model": f"ft:{LLAMA}:default::none"})
    assert error_of(strange, 422)["param"] == "model"

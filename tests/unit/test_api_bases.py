"""Base models outside the catalogue: the real huggingface_hub client against a small hub on loopback."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graft_api.models.bases import HubConfigs
from graft_shared.errors import BaseModelUnavailable, GatedBaseModel, UnknownBaseModel, UnsupportedBaseModel
from tests.api_service import error_of, make_service, migrated_database, register_base
from tests.fakes.hub import FakeHub

LLAMA_1B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub({"my-org/llama": LLAMA_1B, "my-org/bert": {"model_type": "bert"}}) as running:
        running.errors = {
            "my-org/gated": (403, "GatedRepo"),
            "my-org/empty": (404, "EntryNotFound"),
            "my-org/broken": (500, ""),
        }
        yield running


@pytest.fixture
def configs(hub: FakeHub, tmp_path: Path) -> HubConfigs:
    return HubConfigs(allowed=("my-org/*",), token="hf_secret", cache_dir=tmp_path, timeout_seconds=2, endpoint=hub.url)


def test_an_allowed_hub_id_becomes_a_shape_and_is_remembered(hub: FakeHub, configs: HubConfigs) -> None:
    shape = configs.shape("my-org/llama", "main")
    assert (shape.base_model, shape.hidden_size, shape.num_key_value_heads) == ("my-org/llama", 2048, 4)
    assert set(hub.tokens) == {"Bearer hf_secret"}
    asked = hub.asked
    assert configs.shape("my-org/llama", "main") == shape
    assert hub.asked == asked


def test_without_a_token_none_is_sent(hub: FakeHub, configs: HubConfigs) -> None:
    dataclasses.replace(configs, token=None).shape("my-org/llama", "main")
    assert set(hub.tokens) == {None}


@pytest.mark.parametrize(
    ("base_model", "revision", "error"),
    [
        ("my-org/nothing", "main", UnknownBaseModel),
        ("my-org/llama", "v9", UnknownBaseModel),
        ("my-org/gated", "main", GatedBaseModel),
        ("my-org/empty", "main", UnsupportedBaseModel),
        ("my-org/bert", "main", UnsupportedBaseModel),
        ("my-org/broken", "main", BaseModelUnavailable),
    ],
)
def test_each_answer_of_the_hub_has_its_own_error(
    configs: HubConfigs, base_model: str, revision: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        configs.shape(base_model, revision)


def test_a_hub_that_is_away_is_worth_another_try(tmp_path: Path) -> None:
    away = HubConfigs(allowed=("*",), token=None, cache_dir=tmp_path, timeout_seconds=1, endpoint="http://127.0.0.1:9")
    with pytest.raises(BaseModelUnavailable):
        away.shape("my-org/llama", "main")


def test_a_config_that_was_fetched_before_serves_while_the_hub_is_away(hub: FakeHub, configs: HubConfigs) -> None:
    shape = configs.shape("my-org/llama", "main")
    hub.errors["my-org/llama"] = (503, "")
    restarted = dataclasses.replace(configs, _remembered={})
    assert restarted.shape("my-org/llama", "main") == shape


def test_a_job_may_name_an_allowed_hub_id_and_no_other(hub: FakeHub, configs: HubConfigs, tmp_path: Path) -> None:
    (tmp_path / "service").mkdir()
    api = make_service(tmp_path / "service", migrated_database(tmp_path), hub=configs)
    assert api.new_job(base_model="my-org/llama")["gpu_class"] == "16gb"
    asked = hub.asked
    error = error_of(api.post(api.spec(base_model="their-org/llama")), 422)
    assert (error["code"], hub.asked) == ("unknown_base_model", asked)
    gated = error_of(api.post(api.spec(base_model="my-org/gated")), 422)
    assert gated["code"] == "gated_base_model"
    answer = api.post(api.spec(base_model="my-org/broken"))
    assert error_of(answer, 503)["code"] == "base_model_unavailable"
    assert answer.headers["retry-after"] == "5"
    api.database.close()


def test_a_folder_of_the_hubs_cache_may_be_registered_by_a_link(tmp_path: Path) -> None:
    """Its files are links to blobs, which lie beside the snapshots."""
    cached = tmp_path / "hub" / "models--my-org--llama"
    register_base(cached / "snapshots" / "abc", LLAMA_1B)
    (cached / "blobs").mkdir()
    (cached / "snapshots" / "abc" / "model.safetensors").rename(cached / "blobs" / "f00")
    (cached / "snapshots" / "abc" / "model.safetensors").symlink_to("../../blobs/f00")
    (tmp_path / "service" / "models" / "my-org").mkdir(parents=True)
    (tmp_path / "service" / "models" / "my-org" / "llama").symlink_to(cached / "snapshots" / "abc")
    api = make_service(tmp_path / "service", migrated_database(tmp_path))
    assert api.new_job(base_model="my-org/llama")["gpu_class"] == "16gb"
    api.database.close()

"""Where jobs fit, what is said when they do not, and that what is offered then is true."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from graft_shared import capacity, planner
from graft_shared.capacity import CapacityTable, with_change, within_positions
from graft_shared.catalogue import ModelShape
from graft_shared.defaults import load_capacity, load_catalogue
from graft_shared.errors import InvalidParameter, UnsupportedBaseModel, VramCapacityExceeded
from graft_shared.memory import (
    GIB,
    MemoryEstimate,
    Recompute,
    TrainingPlan,
    estimate,
    least_bytes,
    loading_bytes,
    pinned_bytes,
    room_used_again,
    shared_columns,
    size_for,
)
from graft_shared.planner import fastest_plan, fits, leanest_plan, plans
from graft_shared.specs import JobSpec, Optim
from tests.factories import plan_that_ran

CATALOGUE, TABLE = load_catalogue(), load_capacity()
SMALL_FLEET = TABLE.restricted_to(["cpu", "16gb", "24gb"])
LLAMA_7B = "meta-llama/Llama-2-7b-hf"
MEASURED = Path(__file__).parents[1] / "bench" / "results"


def shape(base_model: str) -> ModelShape:
    found = CATALOGUE.get(base_model)
    assert found is not None
    return found


def spec(base_model: str = LLAMA_7B, *, training: dict[str, Any] | None = None, **changes: Any) -> JobSpec:
    body = {
        "base_model": base_model,
        "dataset": {"file": "file-a"},
        "training": {"max_length": 512, **(training or {})},
    }
    return JobSpec.model_validate({**body, **changes})


def refusal(base_model: str, table: CapacityTable = SMALL_FLEET, **changes: Any) -> VramCapacityExceeded:
    with pytest.raises(VramCapacityExceeded) as refused:
        table.place(shape(base_model), spec(base_model, **changes), CATALOGUE)
    return refused.value


def test_every_listed_base_has_the_parameters_that_were_published() -> None:
    entries = yaml.safe_load((Path(__file__).parents[2] / "deploy" / "catalogue.yaml").read_text())["models"]
    for entry in entries:
        assert shape(entry["ids"][0]).parameters / 1e9 == pytest.approx(entry["parameters"], rel=0.01), entry["ids"]


@pytest.mark.parametrize(
    ("gpu_class", "base_model"),
    [
        ("16gb", "huggyllama/llama-7b"),
        ("16gb", "mistralai/Mistral-7B-v0.1"),
        ("24gb", "huggyllama/llama-13b"),
        ("40gb", "huggyllama/llama-30b"),
        ("48gb", "huggyllama/llama-65b"),
        ("80gb", "meta-llama/Llama-2-70b-hf"),
        ("141gb", "mistralai/Mixtral-8x7B-v0.1"),
        ("141gb", "tiiuae/falcon-180B"),
    ],
)
def test_every_row_of_the_guides_table_is_trained_on_its_class(gpu_class: str, base_model: str) -> None:
    placed = TABLE.restricted_to([gpu_class]).place(shape(base_model), spec(base_model), CATALOGUE)
    assert placed.estimate.high_bytes <= placed.gpu_class.usable_bytes


ALL_LINEAR = {"lora": {"target_modules": "all-linear"}}


@pytest.mark.parametrize(
    ("file", "row", "base_model", "changes"),
    [
        ("h200-llama-2-7b-a", "Graft, speed", LLAMA_7B, {}),
        ("h200-llama-2-7b-a", "Graft, memory", LLAMA_7B, {}),
        ("h200-llama-2-7b-a", "Graft, bf16 base", LLAMA_7B, {"quantization": {"load_in_4bit": False}}),
        ("h200-all-linear", "Graft, speed", LLAMA_7B, ALL_LINEAR),
        ("h200-llama-3.1-8b", "Graft, speed", "meta-llama/Llama-3.1-8B", ALL_LINEAR),
        ("h200-llama-3.1-8b", "Graft, offloaded", "meta-llama/Llama-3.1-8B", ALL_LINEAR),
        ("h200-losses", "Graft, speed", "meta-llama/Llama-3.2-1B", {}),
    ],
)
def test_published_runs_held_no_less_than_the_low_and_no_more_than_the_high_end(
    file: str, row: str, base_model: str, changes: dict[str, Any]
) -> None:
    rows = json.loads((MEASURED / f"{file}.json").read_text())
    measured = next(found for found in rows if found["row"] == row)
    needed = estimate(
        shape(base_model), spec(base_model, **changes), plan_that_ran(measured["plan"], shape(base_model))
    )
    assert needed.low_bytes < measured["memory"]["measured_peak_bytes"] < needed.high_bytes


@pytest.mark.parametrize(
    ("base_model", "max_length"), [(LLAMA_7B, 64), ("mistralai/Mixtral-8x7B-v0.1", 64), ("google/gemma-2-9b", 1024)]
)
def test_a_run_needs_no_less_than_it_takes_to_load_its_base(base_model: str, max_length: int) -> None:
    base, job = shape(base_model), spec(base_model, training={"max_length": max_length, "gradient_checkpointing": True})
    plan, needed = leanest_plan(base, job)
    assert plan.recompute is not Recompute.NONE
    weights = needed.components["base_weights"] + needed.components["unquantised_weights"]
    assert needed.expected_bytes > weights + loading_bytes(base)
    # Experts are put together from parts; embeddings leave for the host once they are loaded.
    assert (needed.components["loading"] > 0) == bool(base.num_local_experts or not base.tie_word_embeddings)


@pytest.mark.parametrize(
    ("base_model", "widths"),
    [
        (LLAMA_7B, 2),
        ("microsoft/phi-2", 1),
        ("microsoft/Phi-3-mini-4k-instruct", 2),
        ("tiiuae/falcon-7b", 1),
        ("mistralai/Mixtral-8x7B-v0.1", 2),
    ],
)
def test_a_feed_forward_part_without_a_gate_keeps_half(base_model: str, widths: int) -> None:
    base = shape(base_model)
    assert base.gate_size == widths * base.intermediate_size


def test_the_cheapest_class_that_fits_is_taken() -> None:
    placed = [
        TABLE.place(shape(name), spec(name), CATALOGUE).gpu_class.name for name in (LLAMA_7B, "huggyllama/llama-65b")
    ]
    assert placed == ["16gb", "40gb"]
    assert TABLE.place(shape(LLAMA_7B), spec(gpu={"class": "80gb"}), CATALOGUE).gpu_class.name == "80gb"


def test_only_tiny_bases_go_to_the_cpu() -> None:
    tiny = "HuggingFaceTB/SmolLM2-135M"
    assert TABLE.place(shape(tiny), spec(tiny), CATALOGUE).gpu_class.name == "cpu"
    refused = refusal("Qwen/Qwen2.5-0.5B", TABLE.restricted_to(["cpu"]))
    assert refused.facts["required_class"] == "16gb"
    assert "GiB" not in refused.message and "too many parameters" in refused.message, "bytes are not what decides"
    assert not {"needed", "needed_bytes", "available", "available_bytes"} & refused.facts.keys()


def test_a_refusal_names_the_parameter_that_its_advice_begins_with() -> None:
    for changes in ({"gpu": {"class": "cpu"}}, {"training": {"max_length": 4096, "gradient_checkpointing": False}}):
        refused = refusal("meta-llama/Llama-2-13b-hf", **changes)
        assert refused.param == refused.facts["changes"][0]["param"] != "base_model"
        assert f"It would fit with {refused.param}=" in refused.message


def test_bases_that_fit_are_named_with_the_registered_ones_first() -> None:
    own = dataclasses.replace(shape("HuggingFaceTB/SmolLM2-135M"), base_model="graft/own")
    with pytest.raises(VramCapacityExceeded) as refused:
        SMALL_FLEET.place(shape("huggyllama/llama-65b"), spec("huggyllama/llama-65b"), CATALOGUE, [own])
    assert refused.value.facts["fits_here"][0] == "graft/own"
    assert len(refused.value.facts["fits_here"]) == 5
    bases = [change["to"] for change in refused.value.facts["changes"] if change["param"] == "base_model"]
    assert len(bases) == 2 and bases[0] == "graft/own", "then one that the hub has"


def test_a_70b_job_on_a_24gb_fleet_is_refused_with_the_numbers() -> None:
    refused = refusal("meta-llama/Llama-2-70b-hf")
    facts = refused.facts
    assert facts["needed_bytes"] > facts["available_bytes"] == facts["available"]["usable"]
    assert facts["needed"]["base_weights"] == pytest.approx(68.5e9 * 0.516, rel=0.01)
    assert facts["required_class"] == "48gb"
    assert facts["largest_class"] == "24gb"
    assert 0 < len(facts["fits_here"]) <= 5
    assert "GiB" in refused.message


@pytest.mark.parametrize(
    ("base_model", "positions", "changes"),
    [
        ("meta-llama/Llama-2-70b-hf", 4096, {}),
        ("meta-llama/Llama-2-70b-hf", 4096, {"training": {"max_length": 4096, "gradient_checkpointing": False}}),
        ("meta-llama/Llama-3.1-70B", 131_072, {"training": {"max_length": 131_072}}),
        ("meta-llama/Llama-3.1-8B", 1_048_576, {"training": {"max_length": 1_048_576}}),
    ],
)
def test_a_refusal_adds_up_two_hundred_plans_at_most(
    monkeypatch: pytest.MonkeyPatch, base_model: str, positions: int, changes: dict[str, Any]
) -> None:
    """Milliseconds are for tests/bench/admission.py; this is what they are made of."""
    added_up: list[TrainingPlan] = []
    read: list[str] = []

    def counted(shape: ModelShape, spec: JobSpec, plan: TrainingPlan) -> MemoryEstimate:
        added_up.append(plan)
        return estimate(shape, spec, plan)

    def read_again(spec: JobSpec, param: str, value: Any) -> JobSpec:
        read.append(param)
        return with_change(spec, param, value)

    monkeypatch.setattr(planner, "estimate", counted)
    monkeypatch.setattr(capacity, "with_change", read_again)
    long = dataclasses.replace(shape(base_model), max_position_embeddings=positions)
    with pytest.raises(VramCapacityExceeded):
        SMALL_FLEET.place(long, spec(base_model, **changes), CATALOGUE)
    assert 0 < len(added_up) < 200
    assert len(read) < 100


@given(
    max_length=st.sampled_from([8, 64, 100, 512, 2048, 4096, 30_000]),
    batch=st.sampled_from([1, 3, 16, 1024]),
    sequences=st.sampled_from([1, 16, 1024]),
)
def test_a_spec_has_as_many_plans_as_the_cache_of_estimates_was_made_for(
    max_length: int, batch: int, sequences: int
) -> None:
    training = {"max_length": max_length, "per_device_train_batch_size": batch}
    job = spec(training={**training, "gradient_accumulation_steps": sequences})
    budgets = [plan.microbatch_tokens for plan in plans(shape(LLAMA_7B), job)]
    assert len(budgets) <= 76
    assert min(budgets) == max_length


REFUSED_FOR_ITS_FORM = {
    "lora": {"r": 256, "target_modules": "all-linear"},
    "training": {"max_length": 1024, "optim": "adamw_torch", "gradient_checkpointing": False},
    "gpu": {"class": "16gb"},
}


@pytest.mark.parametrize(
    ("named", "kept"),
    [
        ({}, set()),
        ({"revision": "3aba440b59558f995867ba6e1f58f21d0336b5bb"}, {"base_model"}),
        ({"adapter": {"job": "ftjob-a"}}, {"base_model", "lora.r", "lora.target_modules"}),
    ],
)
def test_what_a_job_goes_on_from_or_pins_is_not_offered_otherwise(named: dict[str, Any], kept: set[str]) -> None:
    refused = refusal(LLAMA_7B, **REFUSED_FOR_ITS_FORM, **named)
    offered = {change["param"] for change in refused.facts["changes"]}
    everything = {"base_model", "lora.r", "lora.target_modules"}
    assert offered & everything == everything - kept
    assert bool(refused.facts["fits_here"]) == ("base_model" not in kept)


def test_a_refusal_tells_two_sizes_apart_and_offers_what_can_be_sent() -> None:
    training = {"max_length": 2560, "gradient_checkpointing": False}
    long = dataclasses.replace(shape("meta-llama/Llama-2-70b-hf"), max_position_embeddings=8192)
    with pytest.raises(VramCapacityExceeded) as refused:
        TABLE.place(long, spec(long.base_model, training=training, gpu={"class": "80gb"}), CATALOGUE)
    needed, available = re.findall(r"(\d+\.\d+) GiB", refused.value.message)[:2]
    assert float(needed) > float(available)
    plain = refusal("meta-llama/Llama-2-13b-hf", quantization={"load_in_4bit": False})
    assert "quantization.load_in_4bit=true" in plain.message


def test_where_no_step_of_lengths_fits_a_shorter_one_is_offered() -> None:
    base = "huggyllama/llama-30b"
    changes = {"training": {"max_length": 2048, "gradient_checkpointing": False}, "gpu": {"class": "24gb"}}
    offered = [change for change in refusal(base, **changes).facts["changes"] if change["param"].endswith("max_length")]
    assert [change["to"] for change in offered] == [128]


@given(
    base_model=st.sampled_from([LLAMA_7B, "meta-llama/Llama-3.2-1B", "mistralai/Mixtral-8x7B-v0.1"]),
    max_length=st.sampled_from([64, 512, 2048]),
    packing=st.booleans(),
    recompute=st.sampled_from(["auto", True, False]),
    batch=st.integers(1, 16),
)
def test_no_plan_needs_less_than_the_leanest(
    base_model: str, max_length: int, packing: bool, recompute: str | bool, batch: int
) -> None:
    job = spec(
        base_model,
        training={
            "max_length": max_length,
            "packing": packing,
            "gradient_checkpointing": recompute,
            "per_device_train_batch_size": batch,
        },
    )
    every = [estimate(shape(base_model), job, plan).high_bytes for plan in plans(shape(base_model), job)]
    assert leanest_plan(shape(base_model), job)[1].high_bytes == min(every)
    assert fits(shape(base_model), job, min(every))
    assert not fits(shape(base_model), job, min(every) - 1)
    assert least_bytes(shape(base_model), job.quantization) < min(every)


@pytest.mark.parametrize(
    ("base_model", "changes", "least"),
    [
        ("meta-llama/Llama-2-13b-hf", {"training": {"max_length": 4096, "gradient_checkpointing": False}}, 2),
        ("mistralai/Mistral-Nemo-Base-2407", {"training": {"max_length": 131072}}, 2),
        ("meta-llama/Llama-2-13b-hf", {"quantization": {"load_in_4bit": False}}, 2),
        ("huggyllama/llama-30b", {"gpu": {"class": "16gb"}}, 2),
        ("meta-llama/Llama-2-70b-hf", {}, 1),
    ],
)
def test_every_change_that_a_refusal_offers_is_accepted(base_model: str, changes: dict[str, Any], least: int) -> None:
    refused = refusal(base_model, **changes)
    assert len(refused.facts["changes"]) >= least, refused.message
    for change in refused.facts["changes"]:
        changed = with_change(spec(base_model, **changes), change["param"], change["to"])
        placed = SMALL_FLEET.place(shape(changed.base_model), changed, CATALOGUE)
        assert placed.gpu_class.name == change["gpu_class"]


def test_the_length_that_is_offered_is_the_longest_of_its_steps_that_fits() -> None:
    job = spec("mistralai/Mistral-Nemo-Base-2407", training={"max_length": 131072})
    (change,) = (
        change for change in refusal(job.base_model, training={"max_length": 131072}).facts["changes"]
        if change["param"] == "training.max_length"
    )  # fmt: skip
    longer = with_change(job, "training.max_length", change["to"] + 256)
    assert change["to"] % 256 == 0
    with pytest.raises(VramCapacityExceeded):
        SMALL_FLEET.place(shape(job.base_model), longer, CATALOGUE)


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"gpu": {"class": "96gb"}}, "gpu.class", "there is no class '96gb'"),
        ({"training": {"max_length": 8192}}, "training.max_length", "4096 positions"),
        ({"lora": {"target_modules": ["q_proj", "query"]}}, "lora.target_modules", "has no query; it has q_proj"),
    ],
)
def test_what_the_base_or_the_table_lacks_is_refused_by_name(changes: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(InvalidParameter) as refused:
        TABLE.place(shape(LLAMA_7B), spec(**changes), CATALOGUE)
    assert refused.value.param == param
    assert says in refused.value.message


def test_mixtral_says_that_its_experts_stay_in_16_bits() -> None:
    placed = TABLE.place(shape("mistralai/Mixtral-8x7B-v0.1"), spec("mistralai/Mixtral-8x7B-v0.1"), CATALOGUE)
    assert [warning["code"] for warning in placed.warnings] == ["experts_not_quantised"]
    assert placed.estimate.components["unquantised_weights"] > 80e9


@pytest.mark.parametrize(
    ("gib", "gpu_class"),
    [(14.75, "16gb"), (22.49, "24gb"), (23.99, "24gb"), (44.99, "48gb"), (79.65, "80gb"), (140.4, "141gb")],
)
def test_a_card_belongs_to_the_largest_class_that_it_serves(gib: float, gpu_class: str) -> None:
    found = TABLE.class_for_memory(int(gib * GIB))
    assert found is not None
    assert found.name == gpu_class
    assert TABLE.class_for_memory(8 * GIB) is None


@pytest.mark.parametrize("named", ["rope_scaling", "rope_parameters"])
def test_longrope_takes_no_sequence_that_would_turn_its_neighbours_otherwise(named: str) -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    phi = {"model_type": "phi3", **sizes, "vocab_size": 320, "max_position_embeddings": 131_072}

    def positions(**rope: Any) -> int:
        return ModelShape.from_config({**phi, **rope}, base_model="org/name", revision="main").max_position_embeddings

    assert positions() == 131_072
    inside = {named: {"rope_type": "longrope", "original_max_position_embeddings": 4096}}
    beside = {named: {"type": "longrope"}, "original_max_position_embeddings": 4096}
    assert positions(**inside) == positions(**beside) == 4096
    assert positions(**{named: {"rope_type": "linear", "factor": 4.0}}) == 131_072


TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "t5"}, "'t5' is not one of"),
        ({"model_type": "llama", "hidden_size": 64}, "has no 'num_attention_heads'"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "quantised already"),
        ({**TINY, "max_position_embeddings": 7}, "has 7 positions, and no sequence here is under 8 tokens"),
        ({**TINY, "rope_scaling": {"type": "longrope", "original_max_position_embeddings": 4}}, "has 4 positions"),
        ({"model_type": "\ud800"}, r"its architecture '\\ud800' is not one of"),
    ],
)
def test_a_config_that_cannot_be_trained_says_why(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedBaseModel, match=says):
        ModelShape.from_config(config, base_model="org/name", revision="main")


def test_targets_have_the_names_of_their_architecture() -> None:
    assert shape(LLAMA_7B).resolve_targets("auto") == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert shape("tiiuae/falcon-40b").resolve_targets("auto") == ("query_key_value", "dense")
    assert shape("microsoft/phi-4").resolve_targets("all-linear") == ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


SHAPES = st.sampled_from(
    [shape(name) for name in (LLAMA_7B, "meta-llama/Llama-3.2-1B", "google/gemma-2-9b", "Qwen/Qwen3-8B")]
)


@given(
    shape=SHAPES,
    recompute=st.sampled_from(Recompute),
    graphs=st.booleans(),
    tokens=st.integers(64, 30_000),
    r=st.integers(1, 256),
)
def test_memory_never_falls_with_tokens_or_rank(
    shape: ModelShape, recompute: Recompute, graphs: bool, tokens: int, r: int
) -> None:
    def needed(tokens: int, r: int) -> int:
        plan = TrainingPlan(
            recompute=recompute,
            recompute_every_n=2,
            microbatch_tokens=tokens,
            packing=True,
            optim=Optim.ADAMW_TORCH,
            cuda_graphs=graphs,
        )
        return estimate(shape, spec(lora={"r": r}), plan).expected_bytes

    assert needed(tokens, r) <= needed(tokens + 1, r)
    assert needed(tokens, r) <= needed(tokens, r + 1)


GROWING = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 1,
}  # by so much at a time, or by a multiple of it


@given(
    config=st.fixed_dictionaries(
        {
            "hidden_size": st.sampled_from([1024, 2048, 4096, 8192]),
            "intermediate_size": st.sampled_from([2816, 8192, 14_336, 28_672]),
            "num_hidden_layers": st.integers(4, 80),
            "num_attention_heads": st.sampled_from([16, 32, 64]),
            "num_key_value_heads": st.sampled_from([4, 8, 16]),
            "vocab_size": st.sampled_from([32_000, 49_152, 128_256, 256_000]),
            "tie_word_embeddings": st.booleans(),
        }
    ),
    size=st.sampled_from(sorted(GROWING)),
    steps=st.sampled_from([1, 2, 16, 64, 1024]),
    plan=st.builds(
        TrainingPlan,
        recompute=st.sampled_from(Recompute),
        recompute_every_n=st.just(2),
        microbatch_tokens=st.integers(64, 30_000),
        packing=st.just(True),
        optim=st.sampled_from(Optim),
        cuda_graphs=st.booleans(),
    ),
    r=st.sampled_from([8, 85, 86, 128, 200]),
    in_4bit=st.booleans(),
)
def test_memory_grows_with_every_size_of_a_base(
    config: dict[str, Any], size: str, steps: int, plan: TrainingPlan, r: int, in_4bit: bool
) -> None:
    """Even where the trainer cuts its loss finer for a larger vocabulary."""
    fixed = {"model_type": "llama", "head_dim": 128, "max_position_embeddings": 32_768}

    def of(config: dict[str, Any]) -> ModelShape:
        return ModelShape.from_config({**fixed, **config}, base_model="org/name", revision="main")

    smaller, larger = of(config), of({**config, size: config[size] + steps * GROWING[size]})
    job = spec(lora={"r": r}, quantization={"load_in_4bit": in_4bit})
    needed = [estimate(shape, job, plan).expected_bytes for shape in (smaller, larger)]
    assert needed[0] < needed[1]


SIZES = st.integers(0, 2**33)


@given(loss=SIZES, evaluation=SIZES, more=SIZES)
def test_room_that_is_used_again_outweighs_no_growth(loss: int, evaluation: int, more: int) -> None:
    def between(loss: int, evaluation: int) -> int:
        return loss + evaluation - room_used_again(loss, evaluation)

    assert between(loss, evaluation) >= max(loss, evaluation)
    assert between(loss + more, evaluation) >= between(loss, evaluation) - 1
    assert between(loss, evaluation + more) >= between(loss, evaluation) - 1


@given(shape=SHAPES, tokens=st.integers(64, 30_000), evaluated=st.integers(64, 30_000))
def test_an_evaluation_of_more_tokens_than_are_learnt_at_once_never_needs_less(
    shape: ModelShape, tokens: int, evaluated: int
) -> None:
    plan = TrainingPlan(
        recompute=Recompute.FULL, recompute_every_n=1, microbatch_tokens=tokens, packing=True, optim=Optim.ADAMW_TORCH
    )

    def needed(evaluated: int | None) -> int:
        return estimate(shape, spec(), plan, evaluation_tokens=evaluated).expected_bytes

    assert needed(evaluated) <= needed(evaluated + 1)
    assert needed(None) == needed(size_for(tokens))


@given(shape=SHAPES, limit_gib=st.floats(1, 141), length=st.integers(8, 4096))
def test_the_chosen_plan_fits_its_own_estimate_and_holds_the_longest_sequence(
    shape: ModelShape, limit_gib: float, length: int
) -> None:
    job = spec(training={"max_length": length})
    chosen = fastest_plan(shape, job, int(limit_gib * GIB))
    if chosen is not None:
        plan, needed = chosen
        assert needed.high_bytes <= limit_gib * GIB
        assert plan.microbatch_tokens >= length


def test_gradient_checkpointing_is_the_users_to_decide() -> None:
    def recomputes(value: bool | str) -> set[Recompute]:
        return {plan.recompute for plan in plans(shape(LLAMA_7B), spec(training={"gradient_checkpointing": value}))}

    assert recomputes(False) == {Recompute.NONE}
    assert recomputes(True) == {Recompute.FULL, Recompute.OFFLOAD}
    assert recomputes("auto") == set(Recompute)


def test_what_is_not_computed_twice_comes_first_and_then_the_larger_microbatch() -> None:
    every = plans(shape(LLAMA_7B), spec())
    order = list(Recompute)

    def rank(plan: TrainingPlan) -> tuple[int, int, bool, int]:
        recompute = order.index(plan.recompute)
        return (
            min(recompute, order.index(Recompute.FULL)), -plan.microbatch_tokens, not plan.cuda_graphs, recompute
        )  # fmt: skip

    assert list(every) == sorted(every, key=rank)
    budgets = [(plan.microbatch_tokens, plan.cuda_graphs) for plan in every if plan.recompute is Recompute.NONE]
    captured = [6144, 4608, 3584, 3072, 2560, 2048, 1536, 1024, 512]
    assert budgets == [*((tokens, True) for tokens in captured), (512, False)]


def test_what_graphs_are_too_large_for_is_launched_before_it_is_refused() -> None:
    base, job = shape(LLAMA_7B), spec(training={"gradient_checkpointing": False})
    captured, launched = plans(base, job)[-2:]
    assert (captured.cuda_graphs, launched) == (True, dataclasses.replace(captured, cuda_graphs=False))
    needed = [estimate(base, job, plan).high_bytes for plan in (captured, launched)]
    assert needed[0] > needed[1]
    assert fastest_plan(base, job, needed[0])[0] == captured
    assert fastest_plan(base, job, needed[1])[0] == launched
    assert fastest_plan(base, job, needed[1] - 1) is None


@given(shape=SHAPES, recompute=st.sampled_from(Recompute), tokens=st.integers(64, 30_000))
def test_graphs_never_need_less(shape: ModelShape, recompute: Recompute, tokens: int) -> None:
    launched = TrainingPlan(
        recompute=recompute, recompute_every_n=2, microbatch_tokens=tokens, packing=True, optim=Optim.ADAMW_TORCH
    )
    captured = dataclasses.replace(launched, cuda_graphs=True)
    assert estimate(shape, spec(), launched).expected_bytes <= estimate(shape, spec(), captured).expected_bytes


def test_large_adapters_share_no_columns() -> None:
    names = shape(LLAMA_7B).resolve_targets("all-linear")
    small = shared_columns(names, 16)
    assert small == {
        ("q_proj", "k_proj", "v_proj"): 64, ("o_proj",): 64, ("gate_proj", "up_proj"): 64, ("down_proj",): 64
    }  # fmt: skip
    assert shared_columns(["v_proj", "o_proj"], 16) == {("v_proj",): 64, ("o_proj",): 64}
    assert all(len(group) == 1 for group in shared_columns(names, 256))


def test_room_and_copies_of_large_adapters_are_counted() -> None:
    plan = plans(shape(LLAMA_7B), spec())[-1]
    plain = {"quantization": {"load_in_4bit": False}}
    adapters = [{"r": r, "target_modules": "all-linear"} for r in (16, 512)]
    small, large = (estimate(shape(LLAMA_7B), spec(lora=lora, **plain), plan) for lora in adapters)
    room = 32 * 2 * 512 * sum(linear.out_features for linear in shape(LLAMA_7B).linears)
    assert large.components["base_weights"] - small.components["base_weights"] > 0.8 * room


def test_out_of_memory_leads_down_the_plans_and_up_the_classes_with_the_same_effective_batch() -> None:
    job = spec(training={"max_length": 1024})
    placed = TABLE.place(shape(LLAMA_7B), job, CATALOGUE)
    needed = {placed.gpu_class.name: [placed.estimate.expected_bytes]}
    way = [placed.gpu_class.name]
    while (after := TABLE.after_out_of_memory(shape(LLAMA_7B), job, placed.gpu_class.name, placed.plan)) is not None:
        placed = after
        needed.setdefault(placed.gpu_class.name, []).append(placed.estimate.expected_bytes)
        way.append(placed.gpu_class.name)
        assert placed.plan.packing == job.training.packing
        assert placed.plan.microbatch_tokens >= job.training.max_length
        assert placed.gpu_class.name in placed.summary
    names = [gpu.name for gpu in TABLE.classes]
    assert list(needed) == names[names.index(way[0]) :]
    for estimates in needed.values():
        assert all(later <= 0.95 * earlier for earlier, later in itertools.pairwise(estimates))
        assert len(estimates) < 15


def test_a_job_that_chose_its_class_stays_there() -> None:
    job = spec(gpu={"class": "24gb"})
    lean = plans(shape(LLAMA_7B), job)[-1]
    assert TABLE.after_out_of_memory(shape(LLAMA_7B), job, "24gb", lean) is None
    assert TABLE.after_out_of_memory(shape(LLAMA_7B), spec(), "24gb", lean) is not None


def test_too_little_memory_of_host_or_gpu_by_turns_comes_to_an_end() -> None:
    job = spec(training={"max_length": 1024, "gradient_checkpointing": True}, gpu={"class": "24gb"})
    start = next(plan for plan in plans(shape(LLAMA_7B), job) if plan.recompute is Recompute.OFFLOAD)
    needed = estimate(shape(LLAMA_7B), job, start)
    assert needed.host["parked_inputs"] == 32 * pinned_bytes(2 * size_for(start.microbatch_tokens) * 4096) == 2 * GIB
    free = needed.host_held_bytes * 3 // 4
    smaller = TABLE.after_host_out_of_memory(shape(LLAMA_7B), job, "24gb", start, free)
    assert smaller is not None and smaller.estimate.host_held_bytes <= free
    assert smaller.estimate.expected_bytes <= needed.expected_bytes
    assert TABLE.after_host_out_of_memory(shape(LLAMA_7B), job, "24gb", start, 0) is None
    plan, turns = start, 0
    for short in itertools.cycle(["host", "host", "gpu"]):
        on_host = TABLE.after_host_out_of_memory(shape(LLAMA_7B), job, "24gb", plan, None) if short == "host" else None
        after = on_host or TABLE.after_out_of_memory(shape(LLAMA_7B), job, "24gb", plan)
        if after is None:
            break
        plan, turns = after.plan, turns + 1
        assert turns < 50


def test_on_a_cpu_too_little_memory_of_the_host_leads_down_the_plans() -> None:
    """All that a run needs is the machine's there, and nothing beside it."""
    small, job = dataclasses.replace(shape(LLAMA_7B), num_hidden_layers=1), spec(gpu={"class": "cpu"})
    start = plans(small, job)[0]
    needed = estimate(small, job, start)
    after = TABLE.after_host_out_of_memory(small, job, "cpu", start, None)
    assert after is not None and after.estimate.expected_bytes <= 0.95 * needed.expected_bytes
    assert needed.host_bytes > after.estimate.host_bytes == 0
    free = after.estimate.expected_bytes - 1
    lean = TABLE.after_host_out_of_memory(small, job, "cpu", start, free)
    assert lean is not None and lean.estimate.expected_bytes <= free
    assert TABLE.after_host_out_of_memory(small, job, "cpu", start, 0) is None


def test_a_plan_reads_back_as_itself() -> None:
    for plan in plans(shape(LLAMA_7B), spec()):
        assert TrainingPlan.from_dict(plan.to_dict()) == plan
        earlier = {name: value for name, value in plan.to_dict().items() if name != "cuda_graphs"}
        assert TrainingPlan.from_dict(earlier) == dataclasses.replace(plan, cuda_graphs=True)


def test_a_length_that_nobody_chose_fits_the_base() -> None:
    tiny = dataclasses.replace(shape(LLAMA_7B), max_position_embeddings=256)
    unsaid = JobSpec.model_validate({"base_model": LLAMA_7B, "dataset": {"file": "file-a"}})
    assert within_positions(tiny, unsaid).training.max_length == 256
    assert within_positions(shape(LLAMA_7B), unsaid).training.max_length == 1024
    assert within_positions(tiny, spec(training={"max_length": 512})).training.max_length == 512


def test_a_base_too_large_for_its_class_by_count_is_told_the_count() -> None:
    refused = refusal(LLAMA_7B, TABLE, gpu={"class": "cpu"})
    assert "the class you asked for, cpu, takes bases of up to 0.4B" in refused.message


def test_on_a_cpu_nothing_is_captured() -> None:
    base = "HuggingFaceTB/SmolLM2-135M"
    for gpu_class, is_captured in (("cpu", False), ("16gb", True)):
        placed = TABLE.place(shape(base), spec(base, gpu={"class": gpu_class}), CATALOGUE)
        assert placed.plan.cuda_graphs is is_captured
        assert placed.estimate.components == estimate(shape(base), spec(base), placed.plan).components

"""Forecasts of speed: near what was measured where they are calibrated, and of the right order elsewhere."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from graft_shared.capacity import GpuClass
from graft_shared.catalogue import ModelShape
from graft_shared.defaults import load_capacity, load_catalogue
from graft_shared.memory import MOST_GRAPH_TOKENS, Recompute, TrainingPlan, estimate
from graft_shared.planner import CHEAPER, cheaper_plan, fastest_plan, plans
from graft_shared.specs import JobSpec, Optim
from graft_shared.speed import Forecast, forecast, tokens_per_second

CATALOGUE, TABLE = load_catalogue(), load_capacity()
LLAMA_7B, LLAMA_8B = "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.1-8B"
SMALLEST = "HuggingFaceTB/SmolLM2-135M"


def shape(base_model: str) -> ModelShape:
    found = CATALOGUE.get(base_model)
    assert found is not None
    return found


def spec(base_model: str, **changes: Any) -> JobSpec:
    return JobSpec.model_validate({"base_model": base_model, "dataset": {"file": "file-a"}, **changes})


def plan(recompute: str, tokens: int) -> TrainingPlan:
    every_n = {"none": 0, "every_n_layers": 2}.get(recompute, 1)
    return TrainingPlan(
        recompute=Recompute(recompute),
        recompute_every_n=every_n,
        microbatch_tokens=tokens,
        packing=True,
        optim=Optim.PAGED_ADAMW_8BIT,
        cuda_graphs=tokens <= MOST_GRAPH_TOKENS,
    )


def speed(base_model: str, gpu_class: str, how: TrainingPlan, mean_length: float, **changes: Any) -> float:
    gpu = TABLE.get(gpu_class)
    assert gpu is not None
    found = tokens_per_second(
        shape(base_model),
        spec(base_model, **changes),
        how,
        gpu.cards,
        mean_length=mean_length,
        calibrated=gpu.calibrated,
    )
    assert 0 < found.low < found.expected < found.high
    return found.expected


# Measured by tests/bench/profile_step.py on H200s (tests/bench/results/h200-profiles.json): real tokens a second.
@pytest.mark.parametrize(
    ("base_model", "how", "mean_length", "measured"),
    [
        (LLAMA_7B, plan("none", 6144), 212, 17_700),
        (LLAMA_7B, plan("offload", 1024), 212, 10_400),
        (LLAMA_8B, plan("none", 16384), 944, 15_900),
        (LLAMA_8B, plan("full", 4096), 944, 10_900),
        (LLAMA_8B, plan("offload", 8192), 944, 11_150),
    ],
)
def test_what_was_measured_lies_within_the_range(
    base_model: str, how: TrainingPlan, mean_length: float, measured: int
) -> None:
    assert speed(base_model, "141gb", how, mean_length) == pytest.approx(measured, rel=0.07)


def test_what_is_computed_twice_or_in_small_pieces_is_slower() -> None:
    for gpu_class in ("24gb", "80gb", "141gb"):
        order = [plan("none", 8192), plan("every_n_layers", 8192), plan("full", 8192), plan("full", 512)]
        speeds = [speed(LLAMA_8B, gpu_class, how, 500) for how in order]
        assert all(slower < faster for faster, slower in itertools.pairwise(speeds))


def test_a_plain_base_is_a_little_faster_than_a_quantised_one() -> None:
    how = plan("none", 6144)
    quantised = speed(LLAMA_7B, "141gb", how, 212)
    plain = speed(LLAMA_7B, "141gb", how, 212, quantization={"load_in_4bit": False})
    assert 0.9 < quantised / plain < 1.0


def test_no_plan_that_comes_first_is_much_slower_than_a_later_one() -> None:
    for base_model in (LLAMA_7B, LLAMA_8B, "meta-llama/Llama-2-70b-hf"):
        for length in (512, 1024, 2048):
            job = spec(base_model, training={"max_length": length})
            every = [(how, speed(base_model, "141gb", how, length / 2)) for how in plans(shape(base_model), job)]
            for (how, earlier), (_, later) in itertools.combinations(every, 2):
                captured = speed(base_model, "141gb", dataclasses.replace(how, cuda_graphs=True), length / 2)
                waits_for_the_host = earlier < captured  # then `fastest_plan` compares it with all others that fit
                assert earlier > 0.8 * later or waits_for_the_host


def test_the_chosen_plan_is_as_fast_by_the_forecast_as_any_that_fits() -> None:
    seen = 0
    for gpu, base_model, length, batch in itertools.product(
        (gpu for gpu in TABLE.classes if gpu.cards),
        (SMALLEST, "Qwen/Qwen2.5-1.5B", LLAMA_7B, "huggyllama/llama-65b", "meta-llama/Llama-2-70b-hf"),
        (128, 256, 512, 1024, 2048),
        (4, 32),
    ):
        training = {"max_length": length, "per_device_train_batch_size": batch}
        base, job = shape(base_model), spec(base_model, training=training)
        chosen = fastest_plan(base, job, gpu.usable_bytes, gpu.cards)
        if chosen is None:
            continue
        fitting = [how for how in plans(base, job) if estimate(base, job, how).high_bytes <= gpu.usable_bytes]
        best = max(speed(base_model, gpu.name, how, length / 2, training=training) for how in fitting)
        taken = speed(base_model, gpu.name, chosen[0], length / 2, training=training)
        assert taken > 0.95 * best, (gpu.name, base_model, length, batch)
        seen += 1
    assert seen > 50


@pytest.mark.parametrize("base_model", [SMALLEST, LLAMA_7B, LLAMA_8B])
def test_after_memory_ran_out_graphs_are_only_given_up_where_nothing_else_needs_less(base_model: str) -> None:
    base, job = shape(base_model), spec(base_model, training={"max_length": 256})
    every = plans(base, job)
    expected = {how: estimate(base, job, how).expected_bytes for how in every}
    for how in every:
        found = cheaper_plan(base, job, how)
        if found is None or found[0].cuda_graphs:
            continue
        assert found[0].microbatch_tokens == 256
        assert not any(other.cuda_graphs and expected[other] <= CHEAPER * expected[how] for other in every)


def of_class(gpu: GpuClass, job: JobSpec, how: TrainingPlan, *, rows: int, row_bytes: float) -> Forecast | None:
    facts = {"calibrated": gpu.calibrated, "price_per_hour": gpu.price_per_hour}
    return forecast(shape(LLAMA_7B), job, how, gpu.cards, **facts, rows=rows, row_bytes=row_bytes)


def test_a_class_whose_cards_nobody_described_has_no_forecast() -> None:
    cpu = TABLE.get("cpu")
    assert cpu is not None
    assert of_class(cpu, spec(LLAMA_7B), plan("none", 512), rows=10, row_bytes=100.0) is None


def test_a_forecast_counts_the_steps_of_all_epochs_without_the_rows_held_out() -> None:
    gpu = TABLE.get("141gb")
    assert gpu is not None
    job = spec(LLAMA_7B, training={"num_train_epochs": 1.5}, validation={"split": 0.1})
    found = of_class(gpu, job, plan("none", 6144), rows=1000, row_bytes=400.0)
    assert found is not None
    assert found.steps == 86  # 900 rows are 57 updates of 16, one and a half times
    assert found.duration_seconds is not None
    assert found.duration_seconds.expected == pytest.approx(86 * 16 * 100 / found.tokens_per_second.expected)


def test_a_forecast_holds_out_whole_rows_as_preparing_does() -> None:
    gpu = TABLE.get("141gb")
    assert gpu is not None
    job = spec(LLAMA_7B, training={"num_train_epochs": 1}, validation={"split": 0.05})
    found = of_class(gpu, job, plan("none", 6144), rows=17, row_bytes=400.0)
    assert found is not None
    assert found.steps == 1  # one row of 17 is held out: 16 are one update

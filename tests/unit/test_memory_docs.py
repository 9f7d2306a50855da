"""docs/memory.md prints figures: they are the arithmetic's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graft_api.capacity.endpoints import largest_bases
from graft_shared.defaults import load_capacity, load_catalogue
from graft_shared.errors import VramCapacityExceeded
from graft_shared.memory import GIB, Recompute, TrainingPlan, estimate
from graft_shared.planner import leanest_plan, plans
from graft_shared.specs import JobSpec
from tests.bench import caps, golden
from tests.factories import plan_that_ran

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "memory.md").read_text()
CATALOGUE, TABLE = load_catalogue(), load_capacity()
BASE = "huggyllama/llama-7b"


def job(base: str = BASE, **quantization: Any) -> JobSpec:
    body = {"base_model": base, "dataset": {"file": "file-a"}, "training": {"max_length": 512}}
    return JobSpec.model_validate({**body, "quantization": quantization})


def row(title: str) -> list[str]:
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {title} |"))
    return [cell.strip(" *") for cell in line.strip("|").split("|")][2:]


def results(name: str) -> Any:
    return json.loads((ROOT / "tests" / "bench" / "results" / f"{name}.json").read_text())


def gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def test_the_table_of_a_7b_is_what_the_arithmetic_says() -> None:
    shape = CATALOGUE.get(BASE)
    assert shape is not None
    found = []
    for load_in_4bit in (False, True):
        spec = job(load_in_4bit=load_in_4bit)
        plan = next(
            plan for plan in plans(shape, spec) if (plan.recompute, plan.microbatch_tokens) == (Recompute.NONE, 1536)
        )
        found.append(estimate(shape, spec, plan))
    for title, name in {
        "base, its linear layers": "base_weights",
        "base, what is never quantised": "unquantised_weights",
        "adapters": "adapters",
        "gradients": "gradients",
        "optimizer": "optimizer",
        "activations": "activations",
        "scratch for a dequantised weight": "dequantisation_scratch",
        "loss and a layer's evaluation": "loss_or_evaluation",
        "one layer's backward pass": "backward_pass",
        "context and allocator": "context_and_allocator",
    }.items():
        assert row(title)[1:] == [gb(needed.components[name]) for needed in found], title
    assert row("**all**")[1:] == [gb(needed.expected_bytes) for needed in found]
    linear = shape.num_hidden_layers * shape.linear_parameters
    whole = [4 * linear, 4 * (shape.parameters - linear), 4 * shape.parameters, 8 * shape.parameters]
    titles = ["base, its linear layers", "base, what is never quantised", "gradients", "optimizer"]
    assert [row(title)[0] for title in titles] == [gb(size) for size in whole]
    assert row("**all**")[0] == f"{gb(16 * shape.parameters)} and activations"


def test_the_least_and_the_fastest_of_a_7b_are_what_the_planner_says() -> None:
    shape, spec = CATALOGUE.get(BASE), job()
    assert shape is not None
    fastest: TrainingPlan = plans(shape, spec)[0]
    needed = estimate(shape, spec, fastest)
    assert f"trains in {gb(leanest_plan(shape, spec)[1].expected_bytes)} GB at the least" in PAGE
    assert f"fastest in {gb(needed.expected_bytes)} GB" in PAGE
    assert f"{gb(needed.components['activations'])} GB with\n  microbatches of {fastest.microbatch_tokens:,}" in PAGE
    base = estimate(shape, spec, fastest).components
    assert f"the base is {gb(base['base_weights'] + base['unquantised_weights'])} GB" in PAGE


def test_the_runs_are_as_far_off_as_the_page_says() -> None:
    runs = results("h200-golden")
    errors = golden.errors_of(runs)
    assert f"{len(runs)} runs on one H200" in PAGE
    assert f"between {-min(errors):.1%} below that and\n{max(errors):.1%} above it".replace("%", " %") in PAGE
    assert f"by the mean {sum(errors) / len(errors):.1%} above".replace("%", " %") in PAGE
    for run, error in zip(runs, errors, strict=True):
        assert -0.02 <= error <= 0.05, run["case"]
        assert golden.expected(golden.Case(**run["case"])).high_bytes >= run["memory"]["measured_peak_bytes"]
        assert run["versions"]["gpu"] == "NVIDIA H200"
    assert {golden.Case(**run["case"]) for run in runs} == {*golden.FITTED, *golden.HELD_OUT}


def test_the_runs_that_nothing_was_fitted_to_are_as_far_off_as_the_page_says() -> None:
    runs = [run for run in results("h200-golden") if golden.is_held_out(run)]
    errors = golden.errors_of(runs)
    assert len(runs) == len(golden.HELD_OUT) == 10
    assert f"{-min(errors):.1%} less to {max(errors):.1%} more was expected".replace("%", " %") in PAGE
    assert f"fitted to {len(golden.FITTED)} of them" in PAGE


def chosen(run: dict[str, Any]) -> TrainingPlan:
    """The plan that such a job is given today."""
    return case_of(run).place().plan


def case_of(run: dict[str, Any]) -> caps.Case:
    return caps.Case(**{fact: run[fact] for fact in ("gpu_class", "base_model", "kind", "max_length")})


def expected(run: dict[str, Any]) -> int:
    """By the arithmetic of today."""
    case = case_of(run)
    return estimate(case.shape, case.spec, plan_that_ran(run["plan"], case.shape)).expected_bytes


REFUSALS = {"short": None, "listed": "invalid_parameter", "speed": "vram_capacity_exceeded"}  # of one step more


def test_the_runs_under_hard_caps_are_those_of_the_page_and_kept_what_was_promised() -> None:
    runs, lines = results("h200-caps"), PAGE.splitlines()
    for run in runs:
        assert run["verdict"] == "kept"
        assert (run["steps"], run["versions"]["gpu"]) == (20, "NVIDIA H200")
        assert (run["refused"] or {}).get("code") == REFUSALS[run["kind"]]
        assert chosen(run) == plan_that_ran(run["plan"], case_of(run).shape)
        held, name = run["memory"]["measured_peak_bytes"], run["base_model"].partition("/")[2]
        assert held <= run["usable_bytes"]
        sizes = (run["usable_bytes"], expected(run), held)
        cells = [name, run["gpu_class"], f"{run['max_length']:,}", caps.words_of(run["plan"])]
        assert f"| {' | '.join([*cells, *(f'{size / GIB:.1f}' for size in sizes)])} |" in lines
    assert {(run["kind"], run["gpu_class"]) for run in runs} == {
        (kind, gpu_class) for kind in REFUSALS for gpu_class in caps.GUIDE
    }


def test_the_chosen_plans_are_the_fastest_of_those_that_the_page_names_or_nearly() -> None:
    compared = results("h200-plans")
    assert [(found["gpu_class"], found["base_model"]) for found in compared] == list(caps.GUIDE.items())
    assert caps.plans_table(compared) in PAGE
    for found in compared:
        speeds = [tried["tokens_per_second"] for tried in found["tried"]]
        assert speeds[0] >= caps.WORTH * max(speeds)
        case = case_of(found)
        tried = [plan_that_ran(tried["plan"], case.shape) for tried in found["tried"]]
        assert chosen(found) == tried[0]
        assert caps.plans_to_try(case, case.place()) == tried
    least = min(found["share_of_fastest"] for found in compared)
    assert f"at least {least:.0%} of".replace("%", " %") in PAGE


def test_the_largest_bases_are_what_the_table_says() -> None:
    for name, base in largest_bases(TABLE, CATALOGUE).items():
        if name != "cpu":
            assert base is not None
            assert row(name) == [base.partition("/")[2]]


def test_what_guides_promise_and_the_table_refuses_is_refused() -> None:
    for base, gpu_class in (("tiiuae/falcon-180B", "80gb"), ("mistralai/Mixtral-8x7B-v0.1", "24gb")):
        shape = CATALOGUE.get(base)
        assert shape is not None
        spec = JobSpec.model_validate({**job(base).model_dump(by_alias=True), "gpu": {"class": gpu_class}})
        with pytest.raises(VramCapacityExceeded):
            TABLE.place(shape, spec, CATALOGUE)

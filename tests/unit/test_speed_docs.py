"""docs/speed.md prints figures: they are those of the committed runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = " ".join((ROOT / "docs" / "speed.md").read_text().split())
LINES = (ROOT / "docs" / "speed.md").read_text().splitlines()
GIB = 2**30


def results(name: str) -> Any:
    return json.loads((ROOT / "tests" / "bench" / "results" / f"{name}.json").read_text())


def row(title: str) -> list[str]:
    line = next(line for line in LINES if line.startswith(f"| {title} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.mark.parametrize(
    ("name", "prefix"), [("h200-llama-2-7b-a", ""), ("h200-all-linear", "all linear: "), ("h200-llama-3.1-8b", "8B: ")]
)
def test_each_row_is_a_run(name: str, prefix: str) -> None:
    runs = results(name)
    assert runs[0]["row"] == "Trainer, checkpointing"
    for run in runs:
        speed = run["tokens_per_second"]
        ratio = speed / runs[0]["tokens_per_second"]
        held = [run["memory"][f"{kind}_peak_bytes"] / GIB for kind in ("reserved", "allocated")]
        assert row(prefix + run["row"]) == [f"{speed:,.0f}", f"{ratio:.2f}", *(f"{size:.2f}" for size in held)]


def test_the_first_sentence_and_the_price_of_four_bits_are_the_runs() -> None:
    speed = {run["row"]: run["tokens_per_second"] for run in results("h200-llama-2-7b-a")}
    assert f"trained {speed['Graft, speed'] / speed['Trainer, checkpointing']:.1f} times the tokens" in PAGE
    assert f"four bits cost {1 - speed['Graft, speed'] / speed['Graft, bf16 base']:.0%}".replace("%", " %") in PAGE


def test_the_losses_are_as_far_apart_as_the_page_says() -> None:
    reference, graft = (run["losses"] for run in results("h200-losses"))
    apart = [abs(one - other) for one, other in zip(reference, graft, strict=True)]
    assert f"no dropout, {len(apart)} updates" in PAGE
    assert f"lie {sum(apart) / len(apart):.4f} nats per token in the mean and {max(apart):.4f} at most" in PAGE
    assert f"at step {apart.index(max(apart)) + 1}; from step 20 on {max(apart[19:]):.4f} at most" in PAGE
    assert f"they are {graft[-1]:.4f} and {reference[-1]:.4f}" in PAGE


def test_the_start_took_what_the_page_says() -> None:
    found = results("h200-service-7b")
    for title, job in zip(("the first", "the second"), found["jobs"], strict=True):
        seconds = job["seconds"]
        assert row(title) == [f"{seconds['claim_to_first_step']} s", f"{seconds['post_to_adapter']} s"]
        assert f"({job['metrics']['steps']} updates on short rows)" in PAGE
    assert found["command"] in PAGE


CARDS = {
    "NVIDIA H200": ["h200-llama-2-7b-a", "h200-all-linear", "h200-llama-3.1-8b", "h200-losses", "h200-service-7b"],
}


def test_the_versions_are_those_of_every_run_and_the_pins_those_of_the_images() -> None:
    versions = results("h200-llama-2-7b-a")[0]["versions"]
    for card, names in CARDS.items():
        assert card in PAGE
        for name in names:
            found = results(name)
            runs = found["jobs"] if isinstance(found, dict) else found
            assert all(run["versions"] == {**versions, "gpu": card} for run in runs), name
            assert f"`{name}.json`" in PAGE
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    assert f"Python {versions['python']}, {named} and TRL" in PAGE
    pins = dict(
        line.split("==") for line in (ROOT / "deploy/constraints/all.txt").read_text().splitlines() if "==" in line
    )
    assert (
        f"are torch {pins['torch']}, transformers {pins['transformers']}, peft {pins['peft']} and "
        f"bitsandbytes {pins['bitsandbytes']}"
    ) in PAGE


def test_the_plans_are_as_the_page_says() -> None:
    graft = {run["row"]: run for run in results("h200-llama-2-7b-a") if "plan" in run}
    plans = {row: run["plan"]["recompute"] for row, run in graft.items()}
    assert plans == {"Graft, bf16 base": "none", "Graft, speed": "none", "Graft, memory": "offload"}
    assert f"({graft['Graft, speed']['arguments']['limit_gib']} GiB for the job)" in PAGE
    (linear,) = (run for run in results("h200-all-linear") if "arguments" in run)
    assert f"Graft with microbatches of {linear['plan']['microbatch_tokens']:,} tokens" in PAGE


def test_another_start_gave_what_the_page_says() -> None:
    speed = {run["row"]: run["tokens_per_second"] for run in results("h200-llama-2-7b-a-another-start")}
    slow, usual, graft = speed["Trainer, checkpointing"], speed["Trainer"], speed["Graft, speed"]
    assert (
        f"the Trainer {slow:,.0f} tokens/s with checkpointing and {usual:,.0f} without, and Graft {graft:,.0f}" in PAGE
    )
    assert f"{graft / slow:.1f} and {graft / usual:.1f} times" in PAGE


def test_the_leanest_plan_reserves_what_the_page_says() -> None:
    held = {run["row"]: run["memory"] for run in results("h200-llama-2-7b-a")}
    lean, usual = held["Graft, memory"], held["Trainer, checkpointing"]
    assert f"reserves {lean['reserved_peak_bytes'] / usual['reserved_peak_bytes']:.2f} of" in PAGE
    assert f"of what was allocated it is {lean['allocated_peak_bytes'] / usual['allocated_peak_bytes']:.2f}" in PAGE

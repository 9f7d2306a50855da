"""What the arithmetic says of a run whose data is known: its microbatches may be smaller than its plan allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from graft_shared.catalogue import ModelShape
from graft_shared.errors import UnsupportedBaseModel
from graft_shared.memory import TrainingPlan, estimate, runs_as_graphs
from graft_shared.specs import JobSpec


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """How a plan is carried out with microbatches of so many tokens at most, and what that needs."""

    plan: TrainingPlan
    peak_bytes: int | None  # None for an architecture that the arithmetic does not know


def expectation_of(
    config: Mapping[str, Any], spec: JobSpec, plan: TrainingPlan, *, tokens: int, evaluation_tokens: int
) -> Expectation:
    """What is to be expected of this very run.

    Microbatches that turn out smaller than planned are captured after all, where that needs no more than was planned.

    Args:
        config: The loaded base's; that it is quantised by now is no part of its shape.
        tokens: Of the largest microbatch that is learnt from.
        evaluation_tokens: Of the largest that only a loss is wanted of.
    """
    as_it_runs = replace(plan, microbatch_tokens=tokens)
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        shape = ModelShape.from_config(plain, base_model=spec.base_model, revision=spec.revision)
    except UnsupportedBaseModel:
        return Expectation(plan=as_it_runs, peak_bytes=None)

    def expected(how: TrainingPlan) -> int:
        return estimate(shape, spec, how, evaluation_tokens=evaluation_tokens).expected_bytes

    captured = replace(as_it_runs, cuda_graphs=runs_as_graphs(shape, tokens))
    may_capture = plan.cuda_graphs or expected(captured) <= estimate(shape, spec, plan).expected_bytes
    chosen = captured if may_capture else as_it_runs
    return Expectation(plan=chosen, peak_bytes=expected(chosen))

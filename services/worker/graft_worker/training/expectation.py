"""What the arithmetic says of a run whose data is known: its microbatches may be smaller than its plan allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graft_shared.catalogue import ModelShape
from graft_shared.errors import UnsupportedBaseModel
from graft_shared.memory import TrainingPlan, estimate
from graft_shared.specs import JobSpec


def expected_peak_bytes(
    config: Mapping[str, Any], spec: JobSpec, plan: TrainingPlan, *, tokens: int, evaluation_tokens: int
) -> int | None:
    """The peak to be expected of this very run, in bytes; None for an architecture that the arithmetic does not know.

    Args:
        config: The loaded base's; that it is quantised by now is no part of its shape.
        tokens: Of the largest microbatch that is learnt from.
        evaluation_tokens: Of the largest that only a loss is wanted of.
    """
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        shape = ModelShape.from_config(plain, base_model=spec.base_model, revision=spec.revision)
    except UnsupportedBaseModel:
        return None
    as_it_runs = replace(plan, microbatch_tokens=tokens)
    return estimate(shape, spec, as_it_runs, evaluation_tokens=evaluation_tokens).expected_bytes

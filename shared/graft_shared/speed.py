"""How fast a plan trains, from what its card can compute and move in a second.

The parts and their constants were measured on an H200 (tests/bench/profile_step.py: Llama-2-7B and Llama-3.1-8B
dimensions, microbatches of 1,024 to 16,384 tokens, layers computed once and twice) and reproduce tokens per second
there to a few percent. For other cards they are scaled by the data sheet and marked as not calibrated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from graft_shared.catalogue import ModelShape
from graft_shared.memory import BYTES_PER_4BIT_WEIGHT, HALF, Recompute, TrainingPlan
from graft_shared.specs import JobSpec

# What is left of a data sheet's rates in long runs: products throttled by power, memory by its own refreshing.
PRODUCT_SHARE = 0.63
BANDWIDTH_SHARE = 0.75
ATTENTION_SHARE = 0.38  # flash attention with short sequences
# Bytes per token and layer that elementwise kernels move, forward and backward, per number of hidden and feed-forward
# width; and attention's own, per number of the queries' width.
ELEMENTWISE_BYTES, ATTENTION_BYTES = 43, 106
BYTES_PER_TOKEN = 4.0  # of text, with its JSON
ELEMENTWISE_AGAIN, ATTENTION_AGAIN = 0.55, 0.29  # what a second forward pass adds to each
SECONDS_PER_UPDATE, SECONDS_PER_MICROBATCH = 2e-3, 3e-3
# That the host takes for one layer, each way, where it is part of no graph: 16 of them and the loss take 0.1 s, however
# few their tokens are (h200-graphs.json).
SECONDS_PER_LAUNCH = 3e-3
# How far a run may be from the expected speed.
CALIBRATED_SPREAD, DERIVED_SPREAD = 0.10, 0.25


@dataclass(frozen=True, kw_only=True)
class Rates:
    """A card's data sheet: dense 16-bit products, and its memory."""

    teraflops: float
    gigabytes_per_second: float


@dataclass(frozen=True, kw_only=True)
class Range:
    """A forecast and how far off it may be."""

    low: float
    expected: float
    high: float

    def times(self, factor: float) -> Range:
        """The range of something that grows with this."""
        return Range(low=self.low * factor, expected=self.expected * factor, high=self.high * factor)

    def inverted(self, numerator: float) -> Range:
        """The range of `numerator` divided by this."""
        return Range(low=numerator / self.high, expected=numerator / self.expected, high=numerator / self.low)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """How fast a job would train, and what that comes to."""

    tokens_per_second: Range
    calibrated: bool  # else scaled from another card by the data sheet
    steps: int | None  # None while nobody knows how many rows there are
    duration_seconds: Range | None  # of training alone: no fetching, loading or evaluating
    cost: Range | None  # by the class's price per hour, in the operator's currency


def forecast(
    shape: ModelShape,
    spec: JobSpec,
    plan: TrainingPlan,
    cards: tuple[Rates, ...],
    *,
    calibrated: bool,
    price_per_hour: float | None,
    rows: int | None,
    row_bytes: float | None,
) -> Forecast | None:
    """Tell what training on a class would take; None for a class whose cards nobody has described.

    Args:
        cards: The slowest and the fastest of the class.
        rows: Of the training data, if they are known.
        row_bytes: Of one row in its file, on average, if known; else sequences are taken to be half of `max_length`.
    """
    if not cards:
        return None
    longest = spec.training.max_length
    mean = likely_length(spec) if row_bytes is None else min(longest, max(1.0, row_bytes / BYTES_PER_TOKEN))
    speed = tokens_per_second(shape, spec, plan, cards, mean_length=mean, calibrated=calibrated)
    steps = _steps(spec, rows)
    seconds = cost = None
    if steps is not None:
        seconds = speed.inverted(steps * spec.training.sequences_per_update * mean)
        cost = None if price_per_hour is None else seconds.times(price_per_hour / 3600)
    return Forecast(tokens_per_second=speed, calibrated=calibrated, steps=steps, duration_seconds=seconds, cost=cost)


def likely_length(spec: JobSpec) -> float:
    """Tokens of a sequence while nobody has seen the data."""
    return spec.training.max_length / 2


def _steps(spec: JobSpec, rows: int | None) -> int | None:
    if rows is None:
        return spec.training.max_steps
    held_out = spec.validation.rows_held_out(rows) if spec.validation is not None else 0
    return spec.training.total_steps(rows - held_out)


def tokens_per_second(
    shape: ModelShape,
    spec: JobSpec,
    plan: TrainingPlan,
    cards: tuple[Rates, ...],
    *,
    mean_length: float,
    calibrated: bool,
) -> Range:
    """Real tokens per second of a class that these cards belong to, from its slowest to its fastest.

    Args:
        mean_length: Tokens of a sequence.
        calibrated: The constants were measured on this very card.
    """
    speeds = [_speed(shape, spec, plan, card, mean_length) for card in cards]
    spread = CALIBRATED_SPREAD if calibrated else DERIVED_SPREAD
    expected = math.sqrt(min(speeds) * max(speeds))
    return Range(low=min(speeds) * (1 - spread), expected=expected, high=max(speeds) * (1 + spread))


def _speed(shape: ModelShape, spec: JobSpec, plan: TrainingPlan, card: Rates, mean_length: float) -> float:
    tokens = spec.training.sequences_per_update * mean_length
    count = math.ceil(tokens / plan.microbatch_tokens)
    again = _computed_again(plan)
    layers, flops = shape.num_hidden_layers, card.teraflops * 1e12
    bandwidth = BANDWIDTH_SHARE * card.gigabytes_per_second * 1e9
    linear = shape.linear_parameters + _active_experts(shape)
    # The last product of a recomputed layer is not made again.
    last = min(linear, shape.intermediate_size * shape.hidden_size)
    weights = layers * (2 * linear + again * (linear - last))
    products = tokens * 2 * (weights + 2 * shape.vocab_size * shape.hidden_size) / (PRODUCT_SHARE * flops)
    bytes_per_weight = BYTES_PER_4BIT_WEIGHT + HALF if spec.quantization.load_in_4bit else 0.0
    dequantised = count * layers * shape.linear_parameters * (2 + again) * bytes_per_weight / bandwidth
    per_layer = ELEMENTWISE_BYTES * (shape.hidden_size + shape.intermediate_size) * (1 + ELEMENTWISE_AGAIN * again)
    attention = ATTENTION_BYTES * shape.query_size * (1 + ATTENTION_AGAIN * again)
    moved = tokens * layers * (per_layer + attention) / bandwidth
    # Causal scores of the mean sequence, three and a half times: forward, and backward with the scores made again.
    scores = tokens * layers * 7 * mean_length * shape.query_size * (1 + ATTENTION_AGAIN * again)
    seconds = products + dequantised + moved + scores / (ATTENTION_SHARE * flops)
    if not plan.cuda_graphs:  # the device waits for the host
        seconds = max(seconds, count * layers * (2 + again) * SECONDS_PER_LAUNCH)
    return tokens / (seconds + SECONDS_PER_UPDATE + count * SECONDS_PER_MICROBATCH)


def _computed_again(plan: TrainingPlan) -> float:
    """The share of layers whose forward pass runs twice."""
    if plan.recompute is Recompute.NONE:
        return 0.0
    return 1.0 / max(1, plan.recompute_every_n)


def _active_experts(shape: ModelShape) -> int:
    """Weights of a layer's experts that work on each token."""
    if not shape.num_local_experts:
        return 0
    return shape.num_experts_per_tok * shape.expert_parameters // shape.num_local_experts

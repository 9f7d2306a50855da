"""TrainingPlan: a short list of plans, as a rule the fastest first, and the fastest of those that fit a limit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from graft_shared.catalogue import ModelShape
from graft_shared.memory import (
    MemoryEstimate,
    Recompute,
    TrainingPlan,
    estimate,
    least_bytes,
    runs_as_graphs,
)
from graft_shared.specs import JobSpec
from graft_shared.speed import Rates, likely_length, tokens_per_second

LARGEST_MICROBATCH_TOKENS = 16_384  # beyond this a larger product is no faster on any card
ENOUGH_TOKENS = 6_144  # from here on little is gained: weights are dequantised and kernels launched once per microbatch

FEW_TOKENS = 256
MANY_TOKENS = 2048  # of a microbatch: from here on no card is faster by computing layers twice for a larger one
AS_FAST = 0.97  # forecasts know no smaller difference: of plans that are as fast, the earlier one is taken

CHEAPER = 0.95  # a plan is worth trying after another ran out of memory if it needs no more than this share of it

__all__ = [
    "Recompute",
    "TrainingPlan",
    "cheaper_plan",
    "fastest_plan",
    "fits",
    "leanest_plan",
    "plan_for_smaller_host",
    "plans",
]


def plans(shape: ModelShape, spec: JobSpec) -> tuple[TrainingPlan, ...]:
    """Every plan worth trying for this job, as a rule the fastest first; all learn from the same sequences per update.

    Computing nothing twice comes first, whatever the microbatch: recomputing costs a third of the speed, a small
    microbatch less. When every layer is recomputed, the larger microbatch comes first, its inputs on the device if they
    fit and else in the host's memory: the copies take less time than the layers.
    """
    return tuple(_plans(shape, spec, _budgets(spec)))


def _plans(shape: ModelShape, spec: JobSpec, budgets: list[int]) -> Iterator[TrainingPlan]:
    """Small microbatches are captured; the smallest are launched after all, where graphs of them are too large."""
    wanted = spec.training.gradient_checkpointing
    rungs = [(budget, runs_as_graphs(shape, budget)) for budget in budgets]
    rungs += [(budget, False) for budget, is_captured in rungs[-1:] if is_captured]
    ladder: list[tuple[Recompute, int, tuple[int, bool]]] = []
    if wanted is not True:
        ladder += [(Recompute.NONE, 0, rung) for rung in rungs]
    if wanted == "auto":
        ladder += [(Recompute.EVERY_N, 2, rung) for rung in rungs]
    if wanted is not False:
        ladder += [(recompute, 1, rung) for rung in rungs for recompute in (Recompute.FULL, Recompute.OFFLOAD)]
    for recompute, every_n, (budget, is_captured) in ladder:
        yield TrainingPlan(
            recompute=recompute,
            recompute_every_n=every_n,
            microbatch_tokens=budget,
            packing=spec.training.packing,
            optim=spec.training.optim,
            cuda_graphs=is_captured,
        )


def fastest_plan(
    shape: ModelShape, spec: JobSpec, limit_bytes: int, cards: tuple[Rates, ...] = ()
) -> tuple[TrainingPlan, MemoryEstimate] | None:
    """Return the fastest plan whose high estimate fits, None when none does.

    Args:
        cards: What will train it, if that is known: where memory is short, a card decides whether it dequantises
            weights for a small microbatch sooner than it computes layers twice.
    """
    found = (
        (plan, needed)
        for plan in _plans(shape, spec, _budgets(spec))
        if (needed := estimate(shape, spec, plan)).high_bytes <= limit_bytes
    )
    first = next(found, None)
    if first is None or not cards or _is_as_fast_as_any(shape, spec, first[0], cards):
        return first  # what the others need is not worked out, as it takes longer than the rest of a submission
    fitting = [first, *found]
    speeds = [_speed(shape, spec, plan, cards) for plan, _ in fitting]
    enough = AS_FAST * max(speeds)
    return next(chosen for chosen, speed in zip(fitting, speeds, strict=True) if speed >= enough)


def _is_as_fast_as_any(shape: ModelShape, spec: JobSpec, plan: TrainingPlan, cards: tuple[Rates, ...]) -> bool:
    """Whether no plan that follows is faster on any card."""
    if plan.microbatch_tokens < MANY_TOKENS:
        return False
    # Launched, a device may wait for the host.
    return plan.cuda_graphs or not _speed(shape, spec, plan, cards) < _speed(
        shape, spec, replace(plan, cuda_graphs=True), cards
    )


def _fastest_first(shape: ModelShape, spec: JobSpec) -> list[TrainingPlan]:
    """All plans, where no card is known: those last that do without the graphs which others of their size have."""
    return sorted(
        plans(shape, spec), key=lambda plan: not plan.cuda_graphs and runs_as_graphs(shape, plan.microbatch_tokens)
    )


def _speed(shape: ModelShape, spec: JobSpec, plan: TrainingPlan, cards: tuple[Rates, ...]) -> float:
    length = likely_length(spec)
    return tokens_per_second(shape, spec, plan, cards, mean_length=length, calibrated=False).expected


def cheaper_plan(
    shape: ModelShape, spec: JobSpec, plan: TrainingPlan, free_bytes: int | None = None
) -> tuple[TrainingPlan, MemoryEstimate] | None:
    """Return the fastest plan that needs noticeably less than this one, which ran out of memory; or None.

    Args:
        free_bytes: What there is, if that is known.
    """
    enough = CHEAPER * estimate(shape, spec, plan).expected_bytes
    if free_bytes is not None:
        enough = min(enough, free_bytes)
    for other in _fastest_first(shape, spec):
        needed = estimate(shape, spec, other)
        if needed.expected_bytes <= enough:
            return other, needed
    return None


def plan_for_smaller_host(
    shape: ModelShape, spec: JobSpec, plan: TrainingPlan, free_bytes: int | None
) -> tuple[TrainingPlan, MemoryEstimate] | None:
    """Return the fastest plan that needs noticeably less of the host than this one, and no more of the GPU; or None.

    With a plan that needs more of the GPU a job could go to and fro between two that both run out of memory.

    Args:
        free_bytes: What the host has, if that is known.
    """
    now = estimate(shape, spec, plan)
    held = now.host_held_bytes
    enough = min(int(CHEAPER * held), held - 1, held if free_bytes is None else free_bytes)
    for other in _fastest_first(shape, spec):
        needed = estimate(shape, spec, other)
        if needed.host_held_bytes <= enough and needed.expected_bytes <= now.expected_bytes:
            return other, needed
    return None


def leanest_plan(shape: ModelShape, spec: JobSpec) -> tuple[TrainingPlan, MemoryEstimate]:
    """Return the plan that needs least: one of those with the smallest microbatch, for nothing shrinks as it grows."""
    smallest = _smallest(shape, spec)
    return min(((plan, estimate(shape, spec, plan)) for plan in smallest), key=lambda pair: pair[1].high_bytes)


def fits(shape: ModelShape, spec: JobSpec, limit_bytes: int) -> bool:
    """Whether the leanest plan fits, at the price of as little arithmetic as tells."""
    if least_bytes(shape, spec.quantization) > limit_bytes:
        return False
    return any(estimate(shape, spec, plan).high_bytes <= limit_bytes for plan in reversed(_smallest(shape, spec)))


def _smallest(shape: ModelShape, spec: JobSpec) -> list[TrainingPlan]:
    """Plans with the smallest microbatch, launched: none needs less than one of these."""
    return [plan for plan in _plans(shape, spec, [spec.training.max_length]) if not plan.cuda_graphs]


def _budgets(spec: JobSpec) -> list[int]:
    """Token budgets of a microbatch, largest first: whole rows of the longest sequence, by quarters down to one.

    Between few tokens and one row there is none: that would free next to nothing.
    """
    longest = spec.training.max_length
    rows = min(spec.training.sequences_per_update, max(1, LARGEST_MICROBATCH_TOKENS // longest))
    rows = min(rows, max(spec.training.per_device_train_batch_size, ENOUGH_TOKENS // longest))
    budgets = []
    while rows > 1 and rows * longest >= FEW_TOKENS:
        budgets.append(rows * longest)
        rows = min(rows - 1, -(-rows * 3 // 4))
    return [*budgets, longest]

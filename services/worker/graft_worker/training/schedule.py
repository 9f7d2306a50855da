"""The learning rate at each step, in the shapes of `transformers.get_scheduler`; when to save, and when to evaluate."""

from __future__ import annotations

import math

from graft_shared.specs import Scheduler, Training

# `save_steps: auto` saves every eighth of the run, and whenever a minute of work would be lost. Checkpoints may not
# take more than a fiftieth of the time.
CHECKPOINTS_PER_RUN = 8
SECONDS_BETWEEN_CHECKPOINTS = 60.0
WORK_PER_SAVE = 50
EVALUATIONS_PER_RUN = 4  # what `eval_steps: auto` aims at, beside the one before training


def warmup_steps(training: Training, total: int) -> int:
    """Steps of linear warm-up."""
    wanted = training.warmup_steps if training.warmup_steps is not None else math.ceil(training.warmup_ratio * total)
    return min(wanted, total - 1)  # the last step has to learn something


def learning_rate_at(step: int, training: Training, total: int) -> float:
    """The learning rate of update number `step` (from 0)."""
    warmup = warmup_steps(training, total)
    if step < warmup:
        return training.learning_rate * step / max(1, warmup)
    share = (step - warmup) / max(1, total - warmup)
    match training.lr_scheduler_type:
        case Scheduler.COSINE:
            return training.learning_rate * max(0.0, 0.5 * (1 + math.cos(math.pi * share)))
        case Scheduler.LINEAR:
            return training.learning_rate * max(0.0, 1 - share)
        case Scheduler.CONSTANT:
            return training.learning_rate


def save_is_due(training: Training, step: int, total: int, *, seconds_unsaved: float, last_save_seconds: float) -> bool:
    """Tell whether to save after step `step`; the finished run is not saved, its adapter is.

    Args:
        seconds_unsaved: Since the last checkpoint, or since training began.
        last_save_seconds: What writing the last checkpoint took, 0 before the first.
    """
    if step >= total:
        return False
    if training.save_steps != "auto":
        return step % training.save_steps == 0
    longest = max(SECONDS_BETWEEN_CHECKPOINTS, WORK_PER_SAVE * last_save_seconds)
    return step % -(-total // CHECKPOINTS_PER_RUN) == 0 or seconds_unsaved >= longest


def evaluation_is_due(training: Training, step: int, total: int) -> bool:
    """Tell whether to evaluate after step `step`: before training, at intervals, and at the end."""
    interval = training.eval_steps if training.eval_steps != "auto" else -(-total // EVALUATIONS_PER_RUN)
    return step >= total or step % interval == 0

"""How long a run is, and the learning rate at each step; the shapes are those of `transformers.get_scheduler`."""

from __future__ import annotations

import math

from graft_shared.specs import Scheduler, Training
from graft_worker.training.batches import updates_per_epoch

CHECKPOINTS_PER_RUN = 8  # what `save_steps: auto` aims at in short runs
LONGEST_CHECKPOINT_INTERVAL = 200  # optimizer steps
EVALUATIONS_PER_RUN = 4


def total_steps(training: Training, rows: int) -> int:
    """Optimizer steps of the run: `max_steps`, or the epochs, a fraction of one rounded up."""
    if training.max_steps is not None:
        return training.max_steps
    return max(1, math.ceil(training.num_train_epochs * updates_per_epoch(rows, training.sequences_per_update)))


def warmup_steps(training: Training, total: int) -> int:
    """Steps of linear warm-up."""
    return training.warmup_steps if training.warmup_steps is not None else math.ceil(training.warmup_ratio * total)


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


def save_interval(training: Training, total: int) -> int:
    """Steps between checkpoints."""
    if training.save_steps != "auto":
        return training.save_steps
    return max(1, min(LONGEST_CHECKPOINT_INTERVAL, -(-total // CHECKPOINTS_PER_RUN)))


def eval_interval(training: Training, total: int) -> int:
    """Steps between evaluations; one more is made at the start and at the end."""
    return training.eval_steps if training.eval_steps != "auto" else max(1, -(-total // EVALUATIONS_PER_RUN))

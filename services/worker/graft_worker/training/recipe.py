"""The recipe: load, attach, train, evaluate, save, prove. Read it from top to bottom; the parts stand beside it."""

from __future__ import annotations

import math
import random
import resource
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graft_shared.jobs import Phase
from graft_shared.planner import TrainingPlan
from graft_shared.specs import JobSpec
from graft_worker.protocol import (
    CheckpointEvent,
    EvaluationEvent,
    EventWriter,
    PhaseEvent,
    ProgressEvent,
    TrainedEvent,
    TrainRequest,
    WarningEvent,
)
from graft_worker.training.adapters import apply_recompute, attach_adapter, trainable
from graft_worker.training.base import Precision, choose_precision, load_base
from graft_worker.training.batches import Microbatch, Split, microbatches, update_rows, updates_per_epoch
from graft_worker.training.checkpoint import (
    Progress,
    random_state,
    restore_random_state,
    resume_from,
    save_checkpoint,
)
from graft_worker.training.exactness import require_exactness
from graft_worker.training.forward import Forward
from graft_worker.training.guard import Guard, ToldToStop
from graft_worker.training.optimizer import FlatOptimizer
from graft_worker.training.proof import prove
from graft_worker.training.publish import write_adapter, write_card, write_metrics
from graft_worker.training.schedule import evaluation_is_due, learning_rate_at, save_is_due, total_steps
from graft_worker.training.versions import versions

PROOF_ROWS = 16  # rows whose loss must survive saving and reloading
SPEED_WINDOW = 20  # optimizer steps that tokens_per_second looks back on
# The loss scale of fp16 applies to the sum over an update's tokens, so it is some thousand times smaller than the usual
# 2^16 on their mean; above 2^15 the scale itself would not be an fp16 number.
FIRST_LOSS_SCALE = 2.0**5
SMALLEST_LOSS_SCALE, LARGEST_LOSS_SCALE = 2.0**-10, 2.0**15
LOSS_SCALE_GROWTH_STEPS = 2000


class NotFinite(Exception):
    """The loss or the gradient is no number any more."""


class NothingToLearn(Exception):
    """The prepared data holds no token to learn."""


@dataclass
class Run:
    """Everything a run is made of, once it is loaded."""

    workdir: Path
    request: TrainRequest
    spec: JobSpec
    plan: TrainingPlan
    events: EventWriter
    guard: Guard
    precision: Precision
    train: Split
    validation: Split | None
    model: Any
    forward: Forward
    optimizer: FlatOptimizer
    progress: Progress
    total_steps: int
    saved_step: int
    saved_at: float = field(default_factory=time.monotonic)
    save_seconds: float = 0.0


def train(workdir: Path, request: TrainRequest, events: EventWriter, guard: Guard) -> None:
    """Train one adapter and leave it, proven, in `workdir/adapter`.

    Raises:
        LeaseOver, ToldToStop: The run has to end here; a checkpoint was saved if the lease allowed it.
        NotFinite, NothingToLearn, NotProven, CheckpointMismatch: It cannot succeed.
        InvalidParameter, UnsupportedBaseModel: It cannot begin.
    """
    run = load(workdir, request, events, guard)
    events.emit(PhaseEvent(phase=Phase.TRAINING))
    try:
        train_steps(run)
        finish(run)
    except ToldToStop:
        save(run)
        raise


def load(workdir: Path, request: TrainRequest, events: EventWriter, guard: Guard) -> Run:
    """Bring base, adapter, data and optimizer together, from the checkpoint if there is one."""
    events.emit(PhaseEvent(phase=Phase.LOADING))
    spec, plan = JobSpec.model_validate(request.spec), TrainingPlan.from_dict(request.plan)
    _seed(spec.training.seed, deterministic=spec.training.deterministic)
    precision = choose_precision(spec.quantization.bnb_4bit_compute_dtype)
    if precision.device.type == "cpu" and spec.training.optim.value.startswith("paged"):
        message = f"Without a GPU there is nothing to page: '{spec.training.optim}' runs unpaged."
        events.emit(WarningEvent(code="optimizer_not_paged", message=message))
    split = Split.load(Path(request.train_file))
    if len(split.learnt_rows) == 0:
        raise NothingToLearn
    validation = Split.load(Path(request.validation_file)) if request.validation_file else None
    model = attach_adapter(
        load_base(Path(request.base_path), spec.quantization, precision),
        spec.lora,
        request.target_modules,
        base_model=request.base_model,
        revision=request.base_revision,
    )
    guard.check()
    forward = Forward(model, precision)
    if forward.packs_densely:
        message = "This architecture keeps packed sequences apart by a dense mask: exact, but slower."
        events.emit(WarningEvent(code="dense_attention_mask", message=message))
    require_exactness(model, forward, precision, base_model=request.base_model)
    apply_recompute(model, plan)
    model.train()
    optimizer = FlatOptimizer(trainable(model), spec.training, precision.adapter)
    progress = Progress(loss_scale=FIRST_LOSS_SCALE if precision.scales_loss else 1.0)
    if request.checkpoint_path is not None:
        progress = resume_from(Path(request.checkpoint_path), request, optimizer)
    return Run(
        workdir=workdir,
        request=request,
        spec=spec,
        plan=plan,
        events=events,
        guard=guard,
        precision=precision,
        train=split,
        validation=validation if validation is not None and len(validation.learnt_rows) else None,
        model=model,
        forward=forward,
        optimizer=optimizer,
        progress=progress,
        total_steps=total_steps(spec.training, len(split)),
        saved_step=progress.step,
    )


def train_steps(run: Run) -> None:
    """Make every optimizer step that is left, with its evaluations and checkpoints."""
    training, progress = run.spec.training, run.progress
    window: deque[tuple[float, int]] = deque(maxlen=SPEED_WINDOW)
    while True:
        # First in the loop, so that a run that was stopped in the middle of an evaluation makes it up.
        if evaluation_is_due(training, progress.step, run.total_steps):
            evaluate(run)
        if progress.step >= run.total_steps:
            return
        if _patience_is_over(run):
            message = (
                f"The held-out loss has not fallen for {training.early_stopping_patience} evaluations: stopped early."
            )
            run.events.emit(WarningEvent(code="stopped_early", message=message))
            return
        began, tokens_before = time.monotonic(), progress.tokens_seen
        loss, norm, learning_rate = update(run)
        window.append((time.monotonic() - began, progress.tokens_seen - tokens_before))
        if progress.step % training.logging_steps == 0 or progress.step == run.total_steps:
            report(run, loss, norm, learning_rate, window)
        unsaved = time.monotonic() - run.saved_at
        if save_is_due(
            training, progress.step, run.total_steps, seconds_unsaved=unsaved, last_save_seconds=run.save_seconds
        ):
            save(run)


def update(run: Run) -> tuple[float, float, float]:
    """One optimizer step over `sequences_per_update` sequences; return loss, gradient norm and learning rate.

    The loss is the mean over all learnt tokens of the update, however they are split into microbatches.
    """
    training, progress = run.spec.training, run.progress
    rows = update_rows(run.train, progress.step, sequences_per_update=training.sequences_per_update, seed=training.seed)
    learning_rate = learning_rate_at(progress.step, training, run.total_steps)
    total = torch.zeros((), dtype=torch.float32, device=run.precision.device)
    learnt = tokens = 0
    before = random_state()
    try:
        for batch in _batches(run, run.train, rows):
            loss = run.forward.loss(batch)
            if len(batch.targets):
                (loss * progress.loss_scale).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            learnt += len(batch.targets)
            tokens += batch.real_tokens
        run.guard.check()
    except ToldToStop:
        run.optimizer.clear()  # half an update is none, and its dropout never was
        restore_random_state(before)
        raise
    mean, norm = _apply(run, float(total), learnt, learning_rate)
    progress.step += 1
    progress.tokens_seen += tokens
    progress.tokens_learnt += learnt
    if learnt:
        progress.last_loss = mean
    return mean, norm, learning_rate


def _apply(run: Run, total: float, learnt: int, learning_rate: float) -> tuple[float, float]:
    """Clip and apply the gathered gradient; return the mean loss and the gradient's norm before clipping."""
    if learnt == 0:
        run.optimizer.clear()
        return 0.0, 0.0
    progress, limit = run.progress, run.spec.training.max_grad_norm
    unscale = 1.0 / (learnt * progress.loss_scale)
    mean, norm = total / learnt, float(run.optimizer.gradient_norm(unscale))
    if not math.isfinite(mean):
        raise NotFinite(f"the loss is {mean} at step {progress.step + 1}")
    if not math.isfinite(norm):
        if not run.precision.scales_loss or progress.loss_scale <= SMALLEST_LOSS_SCALE:
            raise NotFinite(f"the gradient's norm is {norm} at step {progress.step + 1}")
        progress.loss_scale /= 2
        progress.scale_good_steps = 0
        run.optimizer.clear()
        return mean, 0.0
    clip = min(1.0, limit / (norm + 1e-6)) if limit is not None else 1.0
    run.optimizer.step(learning_rate, unscale * clip)
    if run.precision.scales_loss:
        progress.scale_good_steps += 1
        if progress.scale_good_steps % LOSS_SCALE_GROWTH_STEPS == 0:
            progress.loss_scale = min(2 * progress.loss_scale, LARGEST_LOSS_SCALE)
    return mean, norm


def report(run: Run, loss: float, norm: float, learning_rate: float, window: deque[tuple[float, int]]) -> None:
    """Tell how far the run is."""
    seconds, tokens = sum(seconds for seconds, _ in window), sum(tokens for _, tokens in window)
    event = ProgressEvent(
        step=run.progress.step,
        total_steps=run.total_steps,
        epoch=run.progress.step / updates_per_epoch(len(run.train), run.spec.training.sequences_per_update),
        tokens_seen=run.progress.tokens_seen,
        tokens_per_second=tokens / seconds,
        loss=loss,
        grad_norm=norm,
        learning_rate=learning_rate,
    )
    run.events.emit(event)
    run.progress.lines.append(event.model_dump(exclude={"event"}))


def evaluate(run: Run) -> None:
    """Measure the held-out loss, if rows were held out."""
    if run.validation is None or any(line["step"] == run.progress.step for line in run.progress.evaluations):
        return
    run.events.emit(PhaseEvent(phase=Phase.EVALUATING))
    loss = run.forward.mean_loss(_batches(run, run.validation, np.arange(len(run.validation))))
    if not math.isfinite(loss):
        raise NotFinite(f"the held-out loss is {loss} after step {run.progress.step}")
    best = min((line["eval_loss"] for line in run.progress.evaluations), default=math.inf)
    run.progress.evaluations_without_gain = 0 if loss < best else run.progress.evaluations_without_gain + 1
    run.progress.lines.append({"step": run.progress.step, "eval_loss": loss})
    run.events.emit(EvaluationEvent(step=run.progress.step, eval_loss=loss))
    run.events.emit(PhaseEvent(phase=Phase.TRAINING))


def save(run: Run) -> None:
    """Write a checkpoint of the last finished step, unless there is one, and say where it lies."""
    if run.progress.step == run.saved_step:
        return
    began = time.monotonic()
    path = save_checkpoint(run.workdir, run.request, run.progress, run.optimizer, run.guard)
    run.saved_step, run.saved_at = run.progress.step, time.monotonic()
    run.save_seconds = run.saved_at - began
    run.events.emit(CheckpointEvent(step=run.progress.step, path=str(path)))


def finish(run: Run) -> None:
    """Save the adapter, prove it, and say what it is."""
    run.events.emit(PhaseEvent(phase=Phase.PROVING))
    folder, progress = run.workdir / "adapter", run.progress
    run.guard.check()
    write_adapter(run.model, run.request, folder)
    sample = run.validation or run.train
    batches = list(_batches(run, sample, np.unique(sample.learnt_rows)[:PROOF_ROWS]))
    proof = prove(run.model, run.forward, batches, folder, progress)
    metrics: dict[str, Any] = {
        "train_loss": progress.last_loss,
        "steps": progress.step,
        "tokens_seen": progress.tokens_seen,
    }
    if progress.evaluations:
        metrics["base_eval_loss"] = progress.evaluations[0]["eval_loss"]
        metrics["eval_loss"] = progress.evaluations[-1]["eval_loss"]
    used = versions()
    write_metrics(folder, progress.lines)
    rows = {"training rows": len(run.train), "held-out rows": len(run.validation or ())}
    write_card(run.request, folder, {**rows, **metrics}, used)
    run.events.emit(TrainedEvent(proof=proof, metrics=metrics, memory=peak_memory(), versions=used))


def peak_memory() -> dict[str, Any]:
    """The most memory the run held: the GPU's allocator, or the process where there is no GPU."""
    if torch.cuda.is_available():
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"measured_peak_bytes": reserved, "allocated_peak_bytes": allocated, "measured_on": "cuda"}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"measured_peak_bytes": peak, "measured_on": "host"}


def _batches(run: Run, split: Split, rows: np.ndarray) -> Iterator[Microbatch]:
    """The microbatches of these rows, the guard asked before each."""
    plan = run.plan
    for batch in microbatches(
        split, rows, budget=plan.microbatch_tokens, packing=plan.packing, device=run.precision.device
    ):
        run.guard.check()
        yield batch


def _patience_is_over(run: Run) -> bool:
    patience = run.spec.training.early_stopping_patience
    return patience is not None and run.progress.evaluations_without_gain >= patience


def _seed(seed: int, *, deterministic: bool) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)

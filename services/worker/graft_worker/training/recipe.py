"""The recipe: load, attach, train, evaluate, save, prove. Read it from top to bottom; the parts stand beside it."""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._inductor.config

from graft_shared.jobs import Phase
from graft_shared.memory import SIZE_STEP, Recompute, size_for
from graft_shared.planner import TrainingPlan
from graft_shared.specs import JobSpec
from graft_worker.protocol import (
    CheckpointEvent,
    EvaluationEvent,
    EventWriter,
    NoteEvent,
    PhaseEvent,
    ProgressEvent,
    TrainedEvent,
    TrainRequest,
    WarningEvent,
)
from graft_worker.training.adapters import attach_adapter, go_on_from, trainable
from graft_worker.training.base import Precision, choose_precision, load_base
from graft_worker.training.batches import (
    Microbatch,
    Split,
    fullest_rows,
    largest_microbatch,
    microbatches,
    update_rows,
    updates_per_epoch,
)
from graft_worker.training.checkpoint import (
    Progress,
    random_state,
    restore_random_state,
    resume_from,
    save_checkpoint,
)
from graft_worker.training.exactness import require_exactness, said_alone, sample
from graft_worker.training.expectation import expectation_of
from graft_worker.training.figures import Figures, NotFinite
from graft_worker.training.footprint import Footprint
from graft_worker.training.forward import Forward
from graft_worker.training.graphs import Graphs
from graft_worker.training.guard import Guard, ToldToStop
from graft_worker.training.host_memory import keep_on_host
from graft_worker.training.layers import (
    CompilerGaveUp,
    Layers,
    arrange_layers,
    choose_compiler,
    compiled_loss,
    require_input_gradients,
)
from graft_worker.training.linear import take_over
from graft_worker.training.loss import chunk_loss
from graft_worker.training.optimizer import FlatOptimizer
from graft_worker.training.proof import prove
from graft_worker.training.publish import write_adapter, write_card, write_metrics
from graft_worker.training.schedule import evaluation_is_due, learning_rate_at, save_is_due
from graft_worker.training.versions import versions

PROOF_ROWS = 16  # rows whose loss must survive saving and reloading
SPEED_WINDOW = 20  # optimizer steps that tokens_per_second looks back on
# The loss scale of fp16 applies to the sum over an update's tokens, so it is some thousand times smaller than the usual
# 2^16 on their mean; above 2^15 the scale itself would not be an fp16 number.
FIRST_LOSS_SCALE = 2.0**5
SMALLEST_LOSS_SCALE, LARGEST_LOSS_SCALE = 2.0**-10, 2.0**15
LOSS_SCALE_GROWTH_STEPS = 2000


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
    layers: Layers
    footprint: Footprint
    expected_peak_bytes: int | None  # with this data; None where nobody can tell
    told_of_plain_layers: bool = False
    waiting: Figures | None = None  # of the last update, which the device may still be at work on
    moments: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=SPEED_WINDOW + 1))
    saved_at: float = field(default_factory=time.monotonic)
    save_seconds: float = 0.0


def train(workdir: Path, request: TrainRequest, events: EventWriter, guard: Guard) -> None:
    """Train one adapter and leave it, proven, in `workdir/adapter`.

    Raises:
        LeaseOver, ToldToStop: The run has to end here; a checkpoint was saved if the lease allowed it.
        NotFinite, NothingToLearn, NotProven, CheckpointMismatch: It cannot succeed.
        InvalidParameter, UnsupportedBaseModel: It cannot begin.
    """
    began = time.monotonic()
    run = load(workdir, request, events, guard)
    events.log(f"{request.base_model} is loaded, in {time.monotonic() - began:.1f} s")
    events.log(f"{len(run.train)} rows to learn from and {len(run.validation or ())} held out, {run.plan.summary}")
    try:
        probe(run)
        events.emit(PhaseEvent(phase=Phase.TRAINING))
        events.log(f"training begins after step {run.progress.step} of {run.total_steps}")
        train_steps(run)
        finish(run)
    except ToldToStop:
        save(run)
        raise


def load(workdir: Path, request: TrainRequest, events: EventWriter, guard: Guard) -> Run:
    """Bring base, adapter, data and optimizer together, from the checkpoint if there is one."""
    events.emit(PhaseEvent(phase=Phase.LOADING))
    events.log(f"loading {request.base_model}")
    footprint = Footprint.begin()
    spec, plan = JobSpec.model_validate(request.spec), TrainingPlan.from_dict(request.plan)
    _seed(spec.training.seed, deterministic=spec.training.deterministic)
    precision = choose_precision(spec.quantization.bnb_4bit_compute_dtype)
    if precision.device.type == "cpu" and spec.training.optim.value.startswith("paged"):
        message = f"Without a GPU there is nothing to page: '{spec.training.optim}' runs unpaged."
        events.emit(NoteEvent(message=message))
    split = Split.load(Path(request.train_file))
    if len(split.learnt_rows) == 0:
        raise NothingToLearn
    validation = Split.load(Path(request.validation_file)) if request.validation_file else None
    quantised_dir = Path(request.quantised_dir) if request.quantised_dir else None
    base = load_base(Path(request.base_path), spec.quantization, precision, quantised_dir=quantised_dir)
    footprint.base_is_loaded()
    row = sample(base.config.get_text_config().vocab_size, precision.device)
    alone = said_alone(base, row)
    guard.check()
    model = attach_adapter(
        base, spec.lora, request.target_modules, base_model=request.base_model, revision=request.base_revision
    )
    sequences = spec.training.sequences_per_update
    largest = largest_microbatch(split, budget=plan.microbatch_tokens, sequences_per_update=sequences)
    largest = size_for(max(largest, row.real_tokens))
    expected = expectation_of(
        base.config.to_dict(),
        spec,
        plan,
        tokens=largest,
        evaluation_tokens=_largest_evaluated(split, validation, plan.microbatch_tokens),
    )
    keys = torch.zeros(largest, dtype=torch.int32, device=precision.device)
    take_over(model, precision.compute, dropout=spec.lora.lora_dropout, keys=keys)
    if plan.recompute is Recompute.OFFLOAD and precision.device.type == "cuda" and not _is_tied(model):
        keep_on_host(model.get_input_embeddings())
        _give_back_unused(precision.device)
    compiler = choose_compiler()
    longest = max(split.longest, validation.longest if validation is not None else 0, SIZE_STEP)
    forward = Forward(model, precision, keys, longest=longest, chunk=compiled_loss(compiler))
    if forward.packs_densely:
        message = "This architecture keeps packed sequences apart by a dense mask: exact, but slower."
        events.emit(WarningEvent(code="dense_attention_mask", message=message))
    require_exactness(model, forward, row, alone, precision.compute)
    require_input_gradients(model)
    layers = arrange_layers(forward.backbone, plan, backend=compiler, largest_microbatch=largest)
    if compiler is not None and precision.device.type == "cuda" and expected.plan.cuda_graphs:
        forward.graphs = Graphs(forward.hidden, layers, largest)
    if request.adapter_path is not None and request.checkpoint_path is None:
        go_on_from(model, Path(request.adapter_path))
    model.train()
    optimizer = FlatOptimizer(trainable(model), spec.training)
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
        total_steps=spec.training.total_steps(len(split)),
        saved_step=progress.step,
        layers=layers,
        footprint=footprint,
        expected_peak_bytes=expected.peak_bytes,
    )


def _largest_evaluated(train: Split, validation: Split | None, budget: int) -> int:
    """Tokens of the largest microbatch of an evaluation or, without held-out rows, of the proof."""
    if validation is None:
        return largest_microbatch(train, budget=budget, sequences_per_update=PROOF_ROWS)
    return largest_microbatch(validation, budget=budget, sequences_per_update=len(validation))


def _give_back_unused(device: torch.device) -> None:
    """Leave the allocator only with what is in use: what comes next is of other sizes and would not fit in between."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is None or head.weight is model.get_input_embeddings().weight


def probe(run: Run) -> None:
    """Do once, before the first step, what a later one could fail by: what fails at hour three fails now.

    The heaviest microbatch there and back, the optimizer's memory, the heaviest microbatch of an evaluation, and a
    checkpoint, which the supervisor uploads. Nothing is learnt by it.
    """
    run.events.emit(PhaseEvent(phase=Phase.PROBING))
    run.events.log("rehearsing the heaviest step and a checkpoint")
    run.optimizer.rehearse()  # first: it needs room of its own, which graphs could not use after it
    rows = _fullest(run, run.train, run.spec.training.sequences_per_update)
    _gathered(run, rows)
    if not torch.isfinite(run.optimizer.gradient_norm()) and run.layers.make_every_product():
        run.optimizer.clear()  # a layer that looked like Llama's needed what it was not given
        _gathered(run, rows)
    if run.forward.graphs is not None:
        _gathered(run, rows)  # the first was launched, this one is captured
    run.optimizer.clear()
    if run.validation is not None:
        run.forward.mean_loss(_batches(run, run.validation, _fullest(run, run.validation, len(run.validation))))
    if run.request.checkpoint_path is None:
        path = save_checkpoint(run.workdir, run.request, run.progress, run.optimizer, run.guard)
        run.events.emit(CheckpointEvent(step=0, path=str(path)))


def train_steps(run: Run) -> None:
    """Make every optimizer step that is left, with its evaluations and checkpoints.

    The host is one update ahead of the device: an update's figures are read when the next one is under way.
    """
    training, progress = run.spec.training, run.progress
    restart_clock(run)
    while True:
        # First in the loop, so that a run that was stopped in the middle of an evaluation makes it up.
        if evaluation_is_due(training, progress.step, run.total_steps):
            evaluate(run)
        if progress.step >= run.total_steps:
            return settle(run)
        if _patience_is_over(run):
            message = (
                f"The held-out loss has not fallen for {training.early_stopping_patience} evaluations: stopped early."
            )
            run.events.emit(WarningEvent(code="stopped_early", message=message))
            return settle(run)
        figures = update(run)
        settle(run)
        run.waiting = figures
        unsaved = time.monotonic() - run.saved_at
        if save_is_due(
            training, progress.step, run.total_steps, seconds_unsaved=unsaved, last_save_seconds=run.save_seconds
        ):
            save(run)


def update(run: Run) -> Figures:
    """One optimizer step over `sequences_per_update` sequences.

    The loss is the mean over all learnt tokens of the update, however they are split into microbatches.
    """
    training, progress = run.spec.training, run.progress
    rows = update_rows(run.train, progress.step, sequences_per_update=training.sequences_per_update, seed=training.seed)
    learning_rate = learning_rate_at(progress.step, training, run.total_steps)
    before = random_state()
    try:
        total, learnt, tokens = _gathered(run, rows)
        run.guard.check()
    except ToldToStop:
        run.optimizer.clear()  # half an update is none, and what was drawn for it was never drawn
        restore_random_state(before)
        raise
    norm = _apply(run, learnt, learning_rate)
    progress.step += 1
    progress.tokens_seen += tokens
    progress.tokens_learnt += learnt
    return Figures.take(
        total / max(1, learnt),
        norm,
        step=progress.step,
        tokens_seen=progress.tokens_seen,
        tokens_learnt=learnt,
        rate=learning_rate,
    )


def _gathered(run: Run, rows: np.ndarray) -> tuple[torch.Tensor, int, int]:
    """What `_gather` returns, though the compiler may give up."""
    try:
        return _gather(run, rows)
    except CompilerGaveUp as error:  # in the backward pass or the loss; forward passes help themselves
        run.layers.give_up_compiling(error)
        run.forward.chunk = chunk_loss
        run.optimizer.clear()
        return _gather(run, rows)


def _gather(run: Run, rows: np.ndarray) -> tuple[torch.Tensor, int, int]:
    """Add the gradients of these rows; return the summed loss, the learnt tokens and all tokens."""
    progress = run.progress
    total = torch.zeros((), dtype=torch.float32, device=run.precision.device)
    learnt = tokens = 0
    for batch in _batches(run, run.train, rows, update=(run.spec.training.seed, progress.step)):
        if len(batch.targets):
            total += run.forward.learn(batch, progress.loss_scale)
        learnt += len(batch.targets)
        tokens += batch.real_tokens
    return total, learnt, tokens


def _apply(run: Run, learnt: int, learning_rate: float) -> torch.Tensor:
    """Clip and apply the gathered gradient; return its norm before clipping, 0 where nothing was applied."""
    progress, limit = run.progress, run.spec.training.max_grad_norm
    nothing = torch.zeros((), device=run.precision.device)
    if learnt == 0:
        run.optimizer.clear()
        return nothing
    unscale = 1.0 / (learnt * progress.loss_scale)
    norm = run.optimizer.gradient_norm(unscale)
    if run.precision.scales_loss and not _scale_was_right(run, bool(torch.isfinite(norm))):
        run.optimizer.clear()
        return nothing
    clip = 1.0 if limit is None else (limit / (norm + 1e-6)).clamp(max=1.0)
    run.optimizer.step(learning_rate, unscale * clip)
    return norm


def _scale_was_right(run: Run, finite: bool) -> bool:
    """Whether this update's gradient can be used; adapts the loss scale of fp16 as `torch.amp.GradScaler` does."""
    progress = run.progress
    if not finite and progress.loss_scale > SMALLEST_LOSS_SCALE:
        progress.loss_scale /= 2
        progress.scale_good_steps = 0
        return False
    progress.scale_good_steps += 1
    if progress.scale_good_steps % LOSS_SCALE_GROWTH_STEPS == 0:
        progress.loss_scale = min(2 * progress.loss_scale, LARGEST_LOSS_SCALE)
    return True


def settle(run: Run) -> None:
    """Read the figures of the update that is waited for, and tell how far the run is.

    Raises:
        NotFinite: The update made no numbers.
    """
    figures, run.waiting = run.waiting, None
    if figures is None:
        return
    loss, norm = figures.read()
    if figures.tokens_learnt:
        run.progress.last_loss = loss
    run.moments.append((time.monotonic(), figures.tokens_seen))
    if figures.step % run.spec.training.logging_steps != 0 and figures.step != run.total_steps:
        return
    (began, tokens_before), (now, tokens) = run.moments[0], run.moments[-1]
    event = ProgressEvent(
        step=figures.step,
        total_steps=run.total_steps,
        epoch=figures.step / updates_per_epoch(len(run.train), run.spec.training.sequences_per_update),
        tokens_seen=figures.tokens_seen,
        tokens_per_second=(tokens - tokens_before) / max(now - began, 1e-9),
        loss=loss,
        grad_norm=norm,
        learning_rate=figures.learning_rate,
    )
    run.events.emit(event)
    run.progress.lines.append(event.model_dump(exclude={"event"}))
    _tell_of_fallbacks(run)


def restart_clock(run: Run) -> None:
    """Speed is measured from here: what came before was no training."""
    run.guard.measure_from_here()
    run.moments.clear()
    run.moments.append((time.monotonic(), run.progress.tokens_seen))


def _tell_of_fallbacks(run: Run) -> None:
    if run.layers.plain and not run.told_of_plain_layers:
        run.told_of_plain_layers = True
        reasons = "; ".join(sorted(set(run.layers.plain.values())))
        message = f"Some layers of this base could not be compiled and run slower: {reasons}"
        run.events.emit(WarningEvent(code="layers_not_compiled", message=message))
    graphs = run.forward.graphs
    if graphs is not None and graphs.failed is not None:
        run.forward.graphs = None
        message = f"Microbatches could not be captured and are launched one kernel at a time: {graphs.failed}"
        run.events.emit(WarningEvent(code="microbatches_not_captured", message=message))


def evaluate(run: Run) -> None:
    """Measure the held-out loss, if rows were held out."""
    if run.validation is None or any(line["step"] == run.progress.step for line in run.progress.evaluations):
        return
    settle(run)
    run.events.emit(PhaseEvent(phase=Phase.EVALUATING))
    loss = run.forward.mean_loss(_batches(run, run.validation, np.arange(len(run.validation))))
    if not math.isfinite(loss):
        raise NotFinite(f"the held-out loss is {loss} after step {run.progress.step}")
    best = min((line["eval_loss"] for line in run.progress.evaluations), default=math.inf)
    run.progress.evaluations_without_gain = 0 if loss < best else run.progress.evaluations_without_gain + 1
    run.progress.lines.append({"step": run.progress.step, "eval_loss": loss})
    run.events.emit(EvaluationEvent(step=run.progress.step, eval_loss=loss))
    run.events.log(f"held-out loss {loss:.4f} after step {run.progress.step}")
    run.events.emit(PhaseEvent(phase=Phase.TRAINING))
    restart_clock(run)


def save(run: Run) -> None:
    """Write a checkpoint of the last finished step, unless there is one, and say where it lies."""
    settle(run)
    if run.progress.step == run.saved_step:
        return
    began = time.monotonic()
    path = save_checkpoint(run.workdir, run.request, run.progress, run.optimizer, run.guard)
    run.saved_step, run.saved_at = run.progress.step, time.monotonic()
    run.save_seconds = run.saved_at - began
    run.events.emit(CheckpointEvent(step=run.progress.step, path=str(path)))
    run.events.log(f"checkpoint saved after step {run.progress.step}")
    restart_clock(run)


def finish(run: Run) -> None:
    """Save the adapter, prove it, and say what it is."""
    run.events.emit(PhaseEvent(phase=Phase.PROVING))
    folder, progress = run.workdir / "adapter", run.progress
    run.guard.check()
    run.forward.graphs = None  # nothing is learnt any more: what they hold is the proof's to use
    _give_back_unused(run.precision.device)
    write_adapter(run.model, run.request, folder)
    sample = run.validation or run.train
    batches = list(_batches(run, sample, np.unique(sample.learnt_rows)[:PROOF_ROWS]))
    earlier = Path(run.request.adapter_path) if run.request.adapter_path is not None else None
    proof = prove(run.model, run.forward, batches, folder, progress, earlier=earlier)
    metrics: dict[str, Any] = {
        "train_loss": progress.last_loss,
        "steps": progress.step,
        "tokens_seen": progress.tokens_seen,
    }
    if progress.evaluations:
        first = "base_eval_loss" if run.request.adapter_path is None else "earlier_eval_loss"
        metrics[first] = progress.evaluations[0]["eval_loss"]
        metrics["eval_loss"] = progress.evaluations[-1]["eval_loss"]
    used = versions()
    write_metrics(folder, progress.lines)
    rows = {"training rows": len(run.train), "held-out rows": len(run.validation or ())}
    write_card(run.request, folder, {**rows, **metrics}, used)
    memory = run.footprint.peak(run.optimizer.paged_bytes)
    if run.expected_peak_bytes is not None:
        memory["expected_peak_bytes"] = run.expected_peak_bytes
    run.events.log(f"adapter saved, reloaded and proven after step {progress.step}, loss {progress.last_loss:.4f}")
    run.events.emit(TrainedEvent(proof=proof, metrics=metrics, memory=memory, versions=used))


def _fullest(run: Run, split: Split, at_most: int) -> np.ndarray:
    plan = run.plan
    return fullest_rows(split, budget=plan.microbatch_tokens, packing=plan.packing, sequences_per_update=at_most)


def _batches(
    run: Run, split: Split, rows: np.ndarray, *, update: tuple[int, int] | None = None
) -> Iterator[Microbatch]:
    """The microbatches of these rows, the guard asked before each."""
    plan, device = run.plan, run.precision.device
    for batch in microbatches(
        split, rows, budget=plan.microbatch_tokens, packing=plan.packing, device=device, update=update
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
        torch._inductor.config.deterministic = True  # the compiler times no variants of a sum, which differ in a bit
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # every buffer of ours is written before it is read

"""The trainer: exact where it claims to be, honest in how it ends. Real 4-bit bases on the CPU."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, get_scheduler

from graft_shared.catalogue import ModelShape
from graft_shared.clock import boottime
from graft_shared.errors import InvalidParameter, UnsupportedBaseModel
from graft_shared.jobs import FailureReason, Phase
from graft_shared.memory import Recompute, TrainingPlan, estimate
from graft_shared.specs import ComputeDtype, JobSpec, Lora, Optim, Quantization, Scheduler, Training
from graft_worker.protocol import (
    REQUEST_NAME,
    CheckpointEvent,
    EvaluationEvent,
    EventWriter,
    ExitCode,
    FailureEvent,
    NoteEvent,
    ProgressEvent,
    TrainedEvent,
    WarningEvent,
    write_deadline,
)
from graft_worker.training import linear, recipe
from graft_worker.training import loss as loss_module
from graft_worker.training.adapters import attach_adapter, trainable
from graft_worker.training.attention import block_mask
from graft_worker.training.base import choose_precision, load_base
from graft_worker.training.batches import Split, microbatches, pack, update_rows
from graft_worker.training.checkpoint import CheckpointMismatch
from graft_worker.training.dropout import dropped, token_keys
from graft_worker.training.ending import ending_of
from graft_worker.training.exactness import require_exactness, said_alone, sample
from graft_worker.training.figures import NotFinite
from graft_worker.training.footprint import MIB, Footprint
from graft_worker.training.forward import Forward
from graft_worker.training.guard import Guard, ToldToStop
from graft_worker.training.layers import arrange_layers, require_input_gradients
from graft_worker.training.linear import take_over
from graft_worker.training.loss import Head, chunk_loss, summed_cross_entropy
from graft_worker.training.optimizer import FlatOptimizer
from graft_worker.training.proof import NotProven
from graft_worker.training.recipe import NothingToLearn, train
from graft_worker.training.schedule import learning_rate_at
from graft_worker.training.weights import dense, weight_parts
from tests.factories import make_prepared_split, make_tiny_base
from tests.training_runs import a_request, metrics_lines, run_trainer

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = [[5 + (row * 7 + position) % 40 for position in range(6 + row % 9)] for row in range(40)]
CPU = torch.device("cpu")
LONGEST_MICROBATCH = 256


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products are fastest on one thread, and many threads on a busy machine very slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_prepared_split(tmp_path_factory.mktemp("data") / "train.safetensors", ROWS, prompt_tokens=2)


class Recorder(EventWriter):
    """Keeps what would be printed."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def emit(self, event: Any) -> None:
        self.events.append(event)


class Stopper(Guard):
    """Told to stop when asked for the `at`-th time, or never."""

    def __init__(self, at: int = -1) -> None:
        self.asked = 0
        self._at = at

    def check_lease(self) -> None:
        pass

    def check(self) -> None:
        self.asked += 1
        if self.asked == self._at:
            raise ToldToStop


def loaded(
    base: Path, *, targets: list[str] = ALL, load_in_4bit: bool = True, dropout: float = 0.0, fresh: bool = False
) -> tuple[Any, Forward]:
    precision = choose_precision(ComputeDtype.AUTO)
    model = load_base(base, Quantization(load_in_4bit=load_in_4bit), precision)
    torch.manual_seed(0)
    adapted = attach_adapter(model, Lora(lora_dropout=0.0, r=4), targets, base_model="a/b", revision="main")
    with torch.no_grad():
        for parameter in trainable(adapted) if not fresh else ():
            parameter.copy_(torch.randn_like(parameter) * 0.05)  # a fresh lora_B is zero and would hide errors
    keys = torch.zeros(LONGEST_MICROBATCH, dtype=torch.int32)
    take_over(adapted, precision.compute, dropout=dropout, keys=keys)
    require_input_gradients(adapted)
    adapted.train()
    return adapted, Forward(adapted, precision, keys, longest=LONGEST_MICROBATCH)


def a_plan(recompute: Recompute, every_n: int = 1) -> TrainingPlan:
    return TrainingPlan(
        recompute=recompute, recompute_every_n=every_n, microbatch_tokens=64, packing=True, optim=Optim.ADAMW_TORCH
    )


def gradients(model: Any, forward: Forward, split: Split, groups: list[list[int]], budget: int) -> torch.Tensor:
    """The summed gradient of all groups of rows, flat."""
    model.zero_grad()
    for rows in groups:
        for batch in microbatches(split, np.array(rows), budget=budget, packing=True, device=CPU):
            forward.learn(batch)
    return torch.cat([parameter.grad.flatten() for parameter in trainable(model)])


def test_a_packed_batch_has_the_gradients_of_its_sequences_alone(base: Path, train_file: Path) -> None:
    model, forward = loaded(base)
    split, rows = Split.load(train_file), list(range(12))
    packed = gradients(model, forward, split, [rows], budget=64)
    alone = gradients(model, forward, split, [[row] for row in rows], budget=64)
    assert (packed - alone).norm() < 1e-5 * alone.norm()
    assert alone.norm() > 0.1


@pytest.mark.parametrize("recompute", [mode for mode in Recompute if mode is not Recompute.NONE])
def test_recomputing_changes_no_gradient(base: Path, train_file: Path, recompute: Recompute) -> None:
    split, rows = Split.load(train_file), list(range(8))
    kept = gradients(*loaded(base), split, [rows], budget=64)
    model, forward = loaded(base)
    plan = a_plan(recompute, 2 if recompute is Recompute.EVERY_N else 1)
    arrange_layers(forward.backbone, plan, backend=None, largest_microbatch=LONGEST_MICROBATCH)
    torch.testing.assert_close(gradients(model, forward, split, [rows], budget=64), kept, rtol=1e-5, atol=1e-6)


def test_a_layer_that_needs_the_product_after_all_is_given_it(
    tmp_path: Path, train_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 2 has a norm behind the product; without a look at its layers' names it would be taken for a Llama."""
    base = make_tiny_base(tmp_path / "base", model_type="gemma2", head_dim=16, query_pre_attn_scalar=16)
    norms = {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
    losses = []
    for names in (linear.PLAIN_LAYER, linear.PLAIN_LAYER | norms):
        monkeypatch.setattr(linear, "PLAIN_LAYER", names)
        events = Recorder()
        request = a_request(base, train_file, plan={"recompute": "full", "recompute_every_n": 1})
        train(tmp_path / str(len(names)), request, events, Stopper())
        losses.append([event.loss for event in events.events if isinstance(event, ProgressEvent)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_plain_base_has_the_same_gradients_recomputed_and_compiled(
    base: Path, train_file: Path, backend: str | None
) -> None:
    split, facts = Split.load(train_file), {"load_in_4bit": False}
    kept = gradients(*loaded(base, **facts), split, [[0, 1, 2]], budget=64)
    model, forward = loaded(base, **facts)
    plan = a_plan(Recompute.FULL)
    arrange_layers(forward.backbone, plan, backend=backend, largest_microbatch=LONGEST_MICROBATCH)
    torch.testing.assert_close(gradients(model, forward, split, [[0, 1, 2]], budget=64), kept, rtol=1e-5, atol=1e-6)
    assert kept.norm() > 0


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_a_layer_that_is_run_twice_before_its_backward_pass_is_right(base: Path, load_in_4bit: bool) -> None:
    """As in bases that loop over their layers: what is written beside a plain weight makes it no other weight."""
    model, forward = loaded(base, load_in_4bit=load_in_4bit)
    projection = forward.backbone.layers[0].self_attn.q_proj
    x, seed = torch.randn(1, 5, 64, requires_grad=True), torch.randn(1, 5, 64)
    once = torch.autograd.grad((projection(x) * seed).sum(), x)[0]
    twice = torch.autograd.grad((projection(x) * seed).sum() + (projection(x) * seed).sum(), x)[0]
    torch.testing.assert_close(twice, 2 * once)
    assert model.training


def test_a_microbatch_that_was_broken_off_leaves_nothing_between_siblings(
    base: Path, train_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, forward = loaded(base)
    layers = arrange_layers(
        forward.backbone, a_plan(Recompute.NONE), backend=None, largest_microbatch=LONGEST_MICROBATCH
    )
    split = Split.load(train_file)
    expected = gradients(model, forward, split, [[0, 1, 2]], budget=64)

    def full(*_: Any) -> None:
        raise MemoryError

    broken = forward.backbone.layers[1].self_attn.k_proj
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(type(broken.base_layer), "product", full)
        gradients(model, forward, split, [[0, 1, 2]], budget=64)
    adapted = [module for module in model.modules() if hasattr(module, "handed")]
    assert any(module.handed is not None for module in adapted)
    layers.start_over()
    assert all(module.handed is None for module in adapted)
    torch.testing.assert_close(gradients(model, forward, split, [[0, 1, 2]], budget=64), expected)


@pytest.mark.parametrize(
    ("model_type", "spared"),
    [
        ("llama", 2), ("qwen2", 2), ("qwen3", 2), ("mistral", 2), ("gemma", 2), ("granite", 2), ("phi3", 2),
        ("gemma2", 0), ("olmo2", 0),
    ],
)  # fmt: skip
def test_recomputing_leaves_out_a_product_that_only_the_output_needs(
    tmp_path: Path, train_file: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, spared: int
) -> None:
    sizes = {
        "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4},
        "phi3": {"pad_token_id": 0},
    }.get(model_type, {})
    base, split = make_tiny_base(tmp_path / "base", model_type=model_type, **sizes), Split.load(train_file)
    targets = ["o_proj", "down_proj"]
    made: list[Any] = []
    monkeypatch.setattr(linear, "dense", lambda *args, **more: made.append(args) or dense(*args, **more))
    kept = gradients(*loaded(base, targets=targets), split, [[0, 1, 2]], budget=64)
    plainly = len(made)
    model, forward = loaded(base, targets=targets)
    arrange_layers(forward.backbone, a_plan(Recompute.FULL), backend=None, largest_microbatch=LONGEST_MICROBATCH)
    torch.testing.assert_close(gradients(model, forward, split, [[0, 1, 2]], budget=64), kept, rtol=1e-5, atol=1e-6)
    products = sum(isinstance(module, Linear4bit) for module in forward.backbone.modules())
    assert len(made) - 2 * plainly == products - spared


@pytest.mark.parametrize(
    ("model_type", "sizes", "targets"),
    [
        ("phi", {"resid_pdrop": 0.3, "attention_dropout": 0.3, "embd_pdrop": 0.3}, ["q_proj"]),
        ("starcoder2", {"residual_dropout": 0.3, "attention_dropout": 0.3}, ["q_proj"]),
    ],
)
def test_a_base_with_dropout_of_its_own_is_trained_without_it_and_recomputing_changes_no_gradient(
    tmp_path: Path, train_file: Path, model_type: str, sizes: dict[str, Any], targets: list[str]
) -> None:
    base, split = make_tiny_base(tmp_path / "base", model_type=model_type, **sizes), Split.load(train_file)
    kept = gradients(*loaded(base, targets=targets), split, [[0, 1, 2]], budget=64)
    model, forward = loaded(base, targets=targets)
    plan = a_plan(Recompute.FULL)
    arrange_layers(forward.backbone, plan, backend=None, largest_microbatch=LONGEST_MICROBATCH)
    assert kept.norm() > 0
    torch.testing.assert_close(gradients(model, forward, split, [[0, 1, 2]], budget=64), kept, rtol=1e-5, atol=1e-6)


def test_only_every_nth_layer_is_recomputed(base: Path, train_file: Path) -> None:
    split = Split.load(train_file)
    for recompute, every_n, runs in ((Recompute.EVERY_N, 2, [2, 1]), (Recompute.FULL, 1, [2, 2])):
        model, forward = loaded(base)
        counts = [0, 0]
        for index, layer in enumerate(forward.backbone.layers):
            layer.forward = counted(layer.forward, counts, index)
        plan = a_plan(recompute, every_n)
        arrange_layers(forward.backbone, plan, backend=None, largest_microbatch=LONGEST_MICROBATCH)
        gradients(model, forward, split, [[0, 1]], budget=64)
        assert counts == runs


def counted(run: Any, counts: list[int], index: int) -> Any:
    def counting(*args: Any, **kwargs: Any) -> Any:
        counts[index] += 1
        return run(*args, **kwargs)

    return counting


@pytest.mark.parametrize("recompute", [Recompute.NONE, Recompute.FULL])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiled_layers_say_what_plain_ones_say(
    base: Path, train_file: Path, recompute: Recompute, dropout: float
) -> None:
    split, rows, update = Split.load(train_file), np.arange(8), (7, 3)
    found = []
    for backend in (None, "aot_eager"):
        model, forward = loaded(base, dropout=dropout)
        plan = a_plan(recompute)
        layers = arrange_layers(forward.backbone, plan, backend=backend, largest_microbatch=LONGEST_MICROBATCH)
        for batch in microbatches(split, rows, budget=64, packing=True, device=CPU, update=update):
            forward.learn(batch)
        assert layers.plain == {}
        found.append(torch.cat([parameter.grad.flatten() for parameter in trainable(model)]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recompute", [Recompute.NONE, Recompute.EVERY_N])
def test_layers_built_alike_are_compiled_once(tmp_path: Path, train_file: Path, recompute: Recompute) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, forward = loaded(make_tiny_base(tmp_path / "base", num_hidden_layers=4), dropout=0.1)
    arrange_layers(forward.backbone, a_plan(recompute), backend="aot_eager", largest_microbatch=LONGEST_MICROBATCH)
    for _ in range(2):
        gradients(model, forward, Split.load(train_file), [[0, 1, 2]], budget=64)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_layer_that_cannot_be_compiled_runs_as_it_is_and_says_so(base: Path, train_file: Path) -> None:
    split = Split.load(train_file)
    expected = gradients(*loaded(base), split, [[0, 1, 2]], budget=64)
    model, forward = loaded(base)

    def uncompilable(*args: Any, run: Any = forward.backbone.layers[1].forward, **kwargs: Any) -> Any:
        torch._dynamo.graph_break()
        return run(*args, **kwargs)

    forward.backbone.layers[1].mlp.act_fn = torch.nn.SiLU()  # another kind of layer than the first
    forward.backbone.layers[1].mlp.add_module("odd", torch.nn.Identity())
    forward.backbone.layers[1].forward = uncompilable
    plan = a_plan(Recompute.NONE)
    layers = arrange_layers(forward.backbone, plan, backend="aot_eager", largest_microbatch=LONGEST_MICROBATCH)
    torch.testing.assert_close(gradients(model, forward, split, [[0, 1, 2]], budget=64), expected, rtol=1e-5, atol=1e-6)
    assert len(layers.plain) == 1


def test_a_compiler_that_gives_up_in_the_backward_pass_costs_speed_and_no_run(
    base: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = a_request(base, train_file, target_modules=ALL)
    plain, clumsy = Recorder(), Recorder()
    train(tmp_path / "plain", request, plain, Stopper())
    learn, calls = Forward.learn, []

    def giving_up(self: Forward, batch: Any, scale: float = 1.0) -> torch.Tensor:
        loss = learn(self, batch, scale)
        calls.append(loss)
        if len(calls) == 2:
            raise torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("no such product"), None)
        return loss

    monkeypatch.setattr(Forward, "learn", giving_up)
    train(tmp_path / "clumsy", request, clumsy, Stopper())
    losses = [[event.loss for event in found.events if isinstance(event, ProgressEvent)] for found in (plain, clumsy)]
    assert losses[0] == losses[1]
    (warning,) = (event for event in clumsy.events if getattr(event, "code", None) == "layers_not_compiled")
    assert "no such product" in warning.message


def test_dropout_drops_its_share_and_the_same_numbers_however_sequences_are_packed(
    base: Path, train_file: Path
) -> None:
    split, rows, update = Split.load(train_file), np.arange(8), (7, 3)
    found = []
    for budget in (16, 256):
        model, forward = loaded(base, dropout=0.3)
        for batch in microbatches(split, rows, budget=budget, packing=True, device=CPU, update=update):
            forward.learn(batch)
        found.append(torch.cat([parameter.grad.flatten() for parameter in trainable(model)]))
    assert (found[0] - found[1]).norm() < 1e-5 * found[0].norm()
    without = gradients(*loaded(base), split, [list(range(8))], budget=256)
    assert (found[0] - without).norm() > 0.05 * without.norm()


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_is_unbiased_and_independent_of_its_neighbours(p: float) -> None:
    keys = torch.from_numpy(token_keys(1, 2, np.arange(512) // 32, np.arange(512) % 32))
    ones = torch.ones(512, 256)
    first, second = (dropped(ones, keys, torch.tensor(salt, dtype=torch.int32), p) for salt in (0, 0x3C6EF372))
    for mask in (first, second):
        assert mask.unique().tolist() == [0.0, pytest.approx(1 / (1 - p))]
        assert mask.mean().item() == pytest.approx(1.0, abs=0.02)
        for dimension in (0, 1):  # no token and no column is dropped more often than chance would have it
            deviation = (p / (1 - p) / mask.shape[dimension]) ** 0.5
            assert ((mask.mean(dimension) - 1).abs() < 6 * deviation).all()
    kept = (first > 0).float()
    for other in (kept.roll(1, 0), kept.roll(1, 1), (second > 0).float()):
        assert (kept * other).mean().item() == pytest.approx((1 - p) ** 2, abs=0.01)


@pytest.mark.parametrize("quantization", [{}, {"bnb_4bit_use_double_quant": False}, {"bnb_4bit_quant_type": "fp4"}])
def test_a_weight_is_dequantised_to_the_bits_of_bitsandbytes(base: Path, quantization: dict[str, Any]) -> None:
    model = load_base(base, Quantization(**quantization), choose_precision(ComputeDtype.AUTO))
    layer = model.model.layers[1].mlp.up_proj
    for dtype in (torch.float32, torch.bfloat16):
        facts = weight_parts(layer), layer.weight.quant_state.quant_type, (128, 64), dtype
        theirs = dequantize_4bit(layer.weight, layer.weight.quant_state).to(dtype)
        beside = torch.randn(128, 16).to(dtype)
        assert torch.equal(dense(*facts), theirs)
        assert torch.equal(dense(*facts, beside), torch.cat([theirs, beside], dim=1))


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
        ("gemma", {"head_dim": 16}),
        ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4}),
        ("phi3", {"pad_token_id": 0}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    ],
)
def test_our_forward_agrees_with_transformers_own(tmp_path: Path, model_type: str, sizes: dict[str, Any]) -> None:
    base = make_tiny_base(tmp_path / "base", model_type=model_type, **sizes)
    split = Split.load(make_prepared_split(tmp_path / "split.safetensors", ROWS[:6]))
    targets = ["query_key_value"] if model_type == "falcon" else ["qkv_proj"] if model_type == "phi3" else ["q_proj"]
    _, forward = loaded(base, targets=targets, load_in_4bit=False)
    model, _ = loaded(base, targets=targets, load_in_4bit=False)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    theirs = attach_adapter(plain, Lora(lora_dropout=0.0, r=4), targets, base_model="a/b", revision="main")
    theirs.load_state_dict(model.state_dict(), strict=True)
    expected, learnt = 0.0, 0
    for row in ROWS[:6]:
        ids = torch.tensor([row])
        expected += theirs.eval()(input_ids=ids, labels=ids).loss.item() * (len(row) - 1)
        learnt += len(row) - 1
    ours = forward.mean_loss(microbatches(split, np.arange(6), budget=64, packing=True, device=CPU))
    assert ours == pytest.approx(expected / learnt, rel=1e-4)


@pytest.mark.parametrize(("model_type", "refused"), [("mixtral", False), ("gpt_oss", True), ("stablelm", True)])
def test_an_architecture_that_our_forward_pass_does_not_know_is_refused(
    tmp_path: Path, model_type: str, refused: bool
) -> None:
    base = make_tiny_base(tmp_path / "base", model_type=model_type)
    precision = choose_precision(ComputeDtype.AUTO)
    plain = load_base(base, Quantization(), precision)
    row = sample(plain.config.vocab_size, CPU)
    alone = said_alone(plain, row)
    model, forward = loaded(base, targets=["q_proj"], fresh=True)
    with pytest.raises(UnsupportedBaseModel) if refused else contextlib.nullcontext():
        require_exactness(model, forward, row, alone, precision.compute)


@pytest.mark.parametrize("broken", ["first", "second", "all"])
def test_a_forward_pass_that_gives_no_number_is_refused(base: Path, broken: str) -> None:
    plain = load_base(base, Quantization(), choose_precision(ComputeDtype.AUTO))
    row = sample(plain.config.vocab_size, CPU)
    alone = said_alone(plain, row)
    model, forward = loaded(base, targets=["q_proj"], fresh=True)
    ours, half = forward.logits(row).detach(), len(alone[0])
    ours[{"first": slice(0, half), "second": slice(half, None), "all": slice(None)}[broken]] = math.nan
    forward.logits = lambda _row: ours  # type: ignore[method-assign]
    with pytest.raises(UnsupportedBaseModel):
        require_exactness(model, forward, row, alone, torch.float32)


def test_only_linear_layers_of_the_blocks_can_be_targets(base: Path) -> None:
    for target in ("lm_head", "mlp", "embed_tokens", "no_such_module"):
        with pytest.raises(InvalidParameter):
            loaded(base, targets=[target])


@pytest.mark.parametrize(
    ("error", "reason", "code"),
    [
        (NotFinite("the loss is nan"), FailureReason.LOSS_NOT_FINITE, ExitCode.USER_ERROR),
        (NothingToLearn(), FailureReason.NO_TRAINABLE_TOKENS, ExitCode.USER_ERROR),
        (InvalidParameter(param="lora.r", reason="no"), FailureReason.INVALID_PARAMETER, ExitCode.USER_ERROR),
        (NotProven("as before"), FailureReason.ADAPTER_NOT_PROVEN, ExitCode.CRASHED),
        (CheckpointMismatch("another"), FailureReason.ARTIFACT_CORRUPT, ExitCode.CRASHED),
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory."),
            FailureReason.CUDA_OUT_OF_MEMORY,
            ExitCode.CUDA_OUT_OF_MEMORY,
        ),
        (
            RuntimeError("CUDA error: out of memory"),
            FailureReason.CUDA_OUT_OF_MEMORY,
            ExitCode.CUDA_OUT_OF_MEMORY,
        ),
        (MemoryError(), FailureReason.HOST_OUT_OF_MEMORY, ExitCode.CRASHED),
        (OSError(errno.ENOSPC, "No space left on device"), FailureReason.DISK_FULL, ExitCode.CRASHED),
        (SafetensorError("I/O error: No space left (os error 28)"), FailureReason.DISK_FULL, ExitCode.CRASHED),
        (KeyError("surprise"), FailureReason.CRASH, ExitCode.CRASHED),
    ],
    ids=repr,
)
def test_every_end_has_its_reason_and_its_exit_code(error: Exception, reason: FailureReason, code: ExitCode) -> None:
    ended, failure = ending_of(error, {"recompute": "none"})
    assert (failure.reason, ended) == (reason, code)
    assert failure.message


def a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, in_use: int, processes: dict[int, int], fails: bool = False
) -> None:
    """A GPU of 4,000 MiB, 1,000 of them free, as torch and nvidia-smi tell of it. Numbers are MiB."""
    lines = "".join(f"{pid}, {used}\\n" for pid, used in processes.items())
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        f'#!/bin/sh\n[ "$1" = --id=3 ] || exit 1\n{"exit 9" if fails else ""}\n'
        f'case "$2" in *memory.used) echo {in_use};; *compute-apps*) printf "{lines}";; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    for name, value in {"is_available": True, "mem_get_info": (1000 * MIB, 4000 * MIB), "memory_reserved": 1500 * MIB,
                        "max_memory_reserved": 1900 * MIB, "max_memory_allocated": 1800 * MIB}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)


def test_what_others_hold_of_the_card_is_not_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_card(tmp_path, monkeypatch, in_use=700, processes={1: 2300})
    footprint = Footprint.begin()
    footprint.base_is_loaded()
    assert footprint.peak() == {
        "outside_bytes": 800 * MIB,  # 3000 in use, 700 of others, 1500 in the allocator
        "reserved_peak_bytes": 1900 * MIB,
        "allocated_peak_bytes": 1800 * MIB,
        "loaded_peak_bytes": 1900 * MIB,
        "measured_peak_bytes": 2700 * MIB,
        "measured_on": "cuda",
    }


@pytest.mark.parametrize(("own", "outside"), [(2100, 600), (90, 800)])
def test_what_the_driver_says_of_this_process_goes_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: int, outside: int
) -> None:
    """Unless it is another one's: a container counts its processes anew."""
    a_card(tmp_path, monkeypatch, in_use=700, processes={1: 5, os.getpid(): own})
    managed = 70 * MIB if own == 2100 else 0  # the driver counts it as in use, but as no process's
    assert Footprint.begin().peak(70 * MIB)["outside_bytes"] == outside * MIB + managed


def test_where_nobody_tells_what_is_outside_the_allocator_counts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_card(tmp_path, monkeypatch, in_use=0, processes={}, fails=True)
    assert Footprint.begin().peak()["measured_peak_bytes"] == 1900 * MIB


def test_memory_that_the_host_does_not_have_is_told_as_such() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert ending_of(raised.value, {})[1].reason is FailureReason.HOST_OUT_OF_MEMORY


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (1.0, 3.0), (0.5, 2.0)])
def test_the_loss_without_logits_is_the_plain_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, scale: float, cap: float | None
) -> None:
    monkeypatch.setattr(loss_module, "loss_chunk_tokens", lambda *_: 3)
    torch.manual_seed(0)
    weight, targets = torch.randn(50, 16), torch.randint(50, (10,))
    predictors = torch.tensor([0, 1, 2, 4, 5, 6, 8, 9, 10, 11])
    hidden = torch.randn(12, 16)
    plain = hidden.clone().requires_grad_()
    bias = torch.randn(50) if cap else None
    head = Head(weight=weight, bias=bias, scale=scale, cap=cap)
    loss, gradient = summed_cross_entropy(hidden, predictors, targets, head, chunk_loss)
    logits = functional.linear(plain[predictors], weight, bias) * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    expected = functional.cross_entropy(logits, targets, reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, plain.grad)


def test_sequences_of_a_row_do_not_see_each_other_nor_the_future() -> None:
    mask = block_mask(torch.tensor([0, 2, 5], dtype=torch.int32), 5)
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert mask.int().tolist() == expected
    assert block_mask(torch.tensor([0, 3], dtype=torch.int32), 3, sliding_window=2).int().tolist()[2] == [0, 1, 1]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_packing_keeps_every_sequence_once_and_the_budget(lengths: list[int]) -> None:
    rows = pack(lengths, 50)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 50 for row in rows)


@given(rows=st.integers(1, 50), per_update=st.integers(1, 16), seed=st.integers(0, 99))
def test_an_epoch_visits_every_row_once(rows: int, per_update: int, seed: int) -> None:
    split = Split(np.zeros(rows, np.int32), np.ones(rows, np.uint8), np.arange(rows + 1))
    steps = -(-rows // per_update)
    seen = [
        row for step in range(steps) for row in update_rows(split, step, sequences_per_update=per_update, seed=seed)
    ]
    assert sorted(seen) == list(range(rows))


@pytest.mark.parametrize("scheduler", list(Scheduler))
def test_the_schedule_is_that_of_transformers(scheduler: Scheduler) -> None:
    training = Training(learning_rate=1e-3, lr_scheduler_type=scheduler, warmup_steps=5, max_steps=40)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    name = "constant_with_warmup" if scheduler is Scheduler.CONSTANT else scheduler.value
    theirs = get_scheduler(name, optimizer, num_warmup_steps=5, num_training_steps=40)
    for step in range(40):
        assert learning_rate_at(step, training, training.total_steps(1)) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("optim", list(Optim))
def test_the_flat_optimizer_goes_on_from_its_state_to_the_last_bit(optim: Optim) -> None:
    def made() -> tuple[list[torch.nn.Parameter], FlatOptimizer]:
        torch.manual_seed(1)
        weights = [torch.nn.Parameter(torch.randn(64, 80)), torch.nn.Parameter(torch.randn(80, 32))]
        return weights, FlatOptimizer(weights, Training(optim=optim, weight_decay=0.01))

    def step(weights: list[torch.nn.Parameter], optimizer: FlatOptimizer, number: int) -> None:
        for weight in weights:
            assert weight.grad is not None
            weight.grad.copy_(torch.sin(weight.detach() * 10 + number))
        optimizer.step(1e-2, 1.0)

    weights, straight = made()
    for number in range(3):
        step(weights, straight, number)
    saved = straight.state()
    resumed_weights, resumed = made()
    resumed.load(*saved)
    for number in range(3, 6):
        step(weights, straight, number)
        step(resumed_weights, resumed, number)
    for one, other in zip(weights, resumed_weights, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("optim", list(Optim))
def test_an_optimizer_saved_before_its_first_update_is_as_new(optim: Optim) -> None:
    def updated(optimizer: FlatOptimizer, weights: list[torch.nn.Parameter]) -> torch.Tensor:
        assert weights[0].grad is not None
        weights[0].grad.fill_(0.5)
        optimizer.step(1e-2, 1.0)
        return weights[0].detach().clone()

    def made() -> tuple[list[torch.nn.Parameter], FlatOptimizer]:
        weights = [torch.nn.Parameter(torch.ones(64, 80))]
        return weights, FlatOptimizer(weights, Training(optim=optim, weight_decay=0.1))

    (fresh_weights, fresh), (saved_weights, saved), (resumed_weights, resumed) = made(), made(), made()
    resumed.load(*saved.state())
    expected = updated(fresh, fresh_weights)
    assert torch.equal(updated(saved, saved_weights), expected)
    assert torch.equal(updated(resumed, resumed_weights), expected)


def test_a_job_of_one_step_learns_something(base: Path, train_file: Path, tmp_path: Path) -> None:
    ended = run_trainer(tmp_path / "run", a_request(base, train_file, spec={"training": {"max_steps": 1}}))
    assert ended.code == ExitCode.DONE


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(base: Path, train_file: Path, tmp_path: Path) -> None:
    spec = {"training": {"max_steps": 6, "save_steps": 3}, "lora": {"lora_dropout": 0.1}, "validation": {"split": 0.1}}
    whole = run_trainer(tmp_path / "whole", a_request(base, train_file, spec=spec, validation_file=str(train_file)))
    assert whole.code == ExitCode.DONE
    _, checkpoint = whole.of(CheckpointEvent)  # the first proves that one can be written
    request = a_request(base, train_file, spec=spec, validation_file=str(train_file), checkpoint_path=checkpoint.path)
    resumed = run_trainer(tmp_path / "resumed", request)
    assert resumed.code == ExitCode.DONE
    losses = [event.loss for event in whole.of(ProgressEvent)]
    assert [event.loss for event in resumed.of(ProgressEvent)] == losses[3:]
    assert [event.eval_loss for event in whole.of(EvaluationEvent)][-1] == resumed.of(EvaluationEvent)[-1].eval_loss
    steps = [line["step"] for line in metrics_lines(whole.workdir)]
    assert [line["step"] for line in metrics_lines(resumed.workdir)] == steps
    name = "adapter/adapter_model.safetensors"
    assert (resumed.workdir / name).read_bytes() == (whole.workdir / name).read_bytes()
    log = (resumed.workdir / "log").read_text()
    told = ["is loaded, in ", "40 held out", "rehearsing", "begins after step 3 of 6", "held-out loss", "proven"]
    places = [log.find(words) for words in told]
    assert places == sorted(places) and -1 not in places, log
    assert "checkpoint saved after step 3" in (whole.workdir / "log").read_text()
    assert str(tmp_path) not in log, "users read it"


@pytest.mark.parametrize("share", [0.1, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0])
def test_wherever_a_run_is_told_to_stop_it_goes_on_to_the_same_bytes(
    base: Path, train_file: Path, tmp_path: Path, share: float
) -> None:
    held_out = make_prepared_split(tmp_path / "held_out.safetensors", ROWS[:9])
    spec = {"training": {"max_steps": 4, "save_steps": 100, "eval_steps": 2}, "validation": {"split": 0.1}}
    request = a_request(base, train_file, spec=spec, validation_file=str(held_out))
    whole = Stopper()
    train(tmp_path / "whole", request, Recorder(), whole)
    stopped = Recorder()
    with pytest.raises(ToldToStop):
        train(tmp_path / "stopped", request, stopped, Stopper(round(share * whole.asked)))
    saved = [event.path for event in stopped.events if isinstance(event, CheckpointEvent)]
    finished = sum(isinstance(event, ProgressEvent) for event in stopped.events)
    assert [Path(path).name for path in saved][1:] == ([f"step-{finished}"] if finished else [])
    again = request.model_copy(update={"checkpoint_path": saved[-1] if saved else None})
    train(tmp_path / "resumed", again, Recorder(), Stopper())
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "resumed/adapter" / name).read_bytes() == (tmp_path / "whole/adapter" / name).read_bytes()
    facts = [{(line["step"], line.get("loss"), line.get("eval_loss")) for line in metrics_lines(tmp_path / name)}
             for name in ("whole", "resumed")]  # fmt: skip
    assert facts[0] == facts[1]


def test_a_run_goes_on_from_an_earlier_adapter(base: Path, train_file: Path, tmp_path: Path) -> None:
    held_out = str(make_prepared_split(tmp_path / "held_out.safetensors", ROWS[:9]))
    spec = {"lora": {"r": 4}, "validation": {"split": 0.1}, "training": {"eval_steps": 4}}
    first = Recorder()
    train(tmp_path / "first", a_request(base, train_file, spec=spec, validation_file=held_out), first, Stopper())
    earlier = str(tmp_path / "first" / "adapter")
    request = a_request(base, train_file, spec=spec, validation_file=held_out, adapter_path=earlier)
    second = Recorder()
    train(tmp_path / "second", request, second, Stopper())

    def held_out_losses(recorder: Recorder) -> list[float]:
        return [event.eval_loss for event in recorder.events if isinstance(event, EvaluationEvent)]

    assert held_out_losses(second)[0] == held_out_losses(first)[-1], "it begins where the earlier one ended"
    assert held_out_losses(second)[-1] < held_out_losses(second)[0]
    other = request.model_copy(update={"spec": {**request.spec, "lora": {**request.spec["lora"], "r": 8}}})
    with pytest.raises(InvalidParameter, match=r"adapter\.job"):
        train(tmp_path / "other", other, Recorder(), Stopper())


def test_a_run_that_changes_nothing_in_an_earlier_adapter_has_trained_nothing(
    base: Path, train_file: Path, tmp_path: Path
) -> None:
    train(tmp_path / "first", a_request(base, train_file), Recorder(), Stopper())
    spec = {"training": {"max_steps": 1, "learning_rate": 1e-30}}
    request = a_request(base, train_file, spec=spec, adapter_path=str(tmp_path / "first" / "adapter"))
    with pytest.raises(NotProven, match="as it was before training"):
        train(tmp_path / "second", request, Recorder(), Stopper())


def test_a_run_whose_held_out_loss_does_not_fall_stops_early(base: Path, train_file: Path, tmp_path: Path) -> None:
    held_out = make_prepared_split(tmp_path / "held_out.safetensors", [[300 - token for token in row] for row in ROWS])
    spec = {
        "training": {"max_steps": 50, "eval_steps": 2, "early_stopping_patience": 2, "learning_rate": 0.1},
        "validation": {"split": 0.1},
    }
    events = Recorder()
    train(tmp_path, a_request(base, train_file, spec=spec, validation_file=str(held_out)), events, Stopper())
    assert "stopped_early" in [event.code for event in events.events if isinstance(event, WarningEvent)]
    evaluations = [event.eval_loss for event in events.events if isinstance(event, EvaluationEvent)]
    best = evaluations.index(min(evaluations))
    assert len(evaluations) == best + 3
    assert isinstance(events.events[-1], TrainedEvent)


def test_a_finished_adapter_is_complete_and_says_nothing_of_this_machine(
    base: Path, train_file: Path, tmp_path: Path
) -> None:
    ended = run_trainer(tmp_path / "run", a_request(base, train_file, target_modules=ALL))
    (trained,) = ended.of(TrainedEvent)
    folder = ended.workdir / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "graft/tiny"
    assert config["revision"] is None
    assert set(config["target_modules"]) == set(ALL)
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    for path in folder.iterdir():
        assert str(base).encode() not in path.read_bytes(), path.name
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert trained.proof["reloaded_loss"] == pytest.approx(trained.proof["trained_loss"], rel=1e-3)
    assert {"torch", "transformers", "peft", "bitsandbytes"} <= set(trained.versions)
    assert ended.of(WarningEvent) == []
    assert ["'paged_adamw_8bit' runs unpaged" in note.message for note in ended.of(NoteEvent)] == [True]


@pytest.mark.parametrize("held_out", [False, True])
def test_the_peak_that_is_expected_is_that_of_the_microbatches_that_the_data_fills(
    base: Path, train_file: Path, tmp_path: Path, held_out: bool
) -> None:
    rows, budget = Split.load(train_file), 16_384
    spec = {"training": {"max_length": 4096, "max_steps": 1}}
    files = {"validation_file": str(train_file)} if held_out else {}
    request = a_request(base, train_file, spec=spec, plan={"microbatch_tokens": budget}, **files)
    events = Recorder()
    train(tmp_path, request, events, Stopper())
    told = events.events[-1].memory["expected_peak_bytes"]
    made, plan = JobSpec.model_validate(request.spec), TrainingPlan.from_dict(request.plan)
    shape = ModelShape.from_config(json.loads((base / "config.json").read_text()), base_model="a/b", revision="main")
    fullest = int(np.sort(rows.lengths)[-made.training.sequences_per_update :].sum())
    evaluated = len(rows.input_ids) if held_out else fullest  # as many rows as an update has
    filled = replace(plan, microbatch_tokens=fullest)
    assert told == estimate(shape, made, filled, evaluation_tokens=evaluated).expected_bytes
    assert told < estimate(shape, made, plan).expected_bytes


@pytest.mark.parametrize(
    "changes",
    [
        {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
        {"bnb_4bit_compute_dtype": "bfloat16"},
        {"bnb_4bit_compute_dtype": "float16"},
        {"load_in_4bit": False},
    ],
    ids=repr,
)
def test_every_way_to_hold_the_base_trains(
    base: Path, train_file: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    spec = {
        "quantization": changes,
        "training": {"packing": False, "optim": "paged_adamw_32bit", "max_steps": 4, "lr_scheduler_type": "linear"},
        "lora": {"use_rslora": True},
    }
    events = Recorder()
    train(tmp_path, a_request(base, train_file, spec=spec, target_modules=ALL), events, Stopper())
    losses = [event.loss for event in events.events if isinstance(event, ProgressEvent)]
    assert losses[-1] < losses[0]
    assert isinstance(events.events[-1], TrainedEvent)


def test_half_precision_skips_updates_that_overflow_and_halves_its_loss_scale(
    base: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "FIRST_LOSS_SCALE", 2.0**60)
    spec = {
        "quantization": {"bnb_4bit_compute_dtype": "float16"},
        "training": {"max_steps": 5, "save_steps": 3, "optim": "adamw_torch"},
    }
    events = Recorder()
    with pytest.raises(NotProven, match="as it was before training"):
        train(tmp_path, a_request(base, train_file, spec=spec), events, Stopper())
    _, checkpoint = (event for event in events.events if isinstance(event, CheckpointEvent))
    progress = json.loads((Path(checkpoint.path) / "state.json").read_text())["progress"]
    assert (progress["step"], progress["loss_scale"]) == (3, 2.0**57)
    assert [event.grad_norm for event in events.events if isinstance(event, ProgressEvent)] == [0.0] * 5


def test_a_loss_that_is_no_number_fails_the_run(base: Path, train_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in base.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotFinite):
        train(tmp_path / "run", a_request(broken, train_file), Recorder(), Stopper())
    assert not (tmp_path / "run" / "adapter").exists()


def test_rows_that_teach_nothing_fail_the_run(base: Path, tmp_path: Path) -> None:
    masked = make_prepared_split(tmp_path / "masked.safetensors", ROWS, prompt_tokens=99)
    ended = run_trainer(tmp_path / "run", a_request(base, masked))
    assert ended.code == ExitCode.USER_ERROR
    assert [failure.reason for failure in ended.of(FailureEvent)] == [FailureReason.NO_TRAINABLE_TOKENS]


def test_after_the_leases_deadline_nothing_is_made(base: Path, train_file: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    workdir.mkdir()
    write_deadline(workdir, boottime() - 1)
    ended = run_trainer(workdir, a_request(base, train_file))
    assert ended.code == ExitCode.STOPPED
    assert ended.of(ProgressEvent) == []
    assert not (workdir / "checkpoints").exists()


def test_what_a_later_step_would_fail_by_fails_before_the_first(
    base: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heaviest microbatch comes first, and nothing is learnt by it."""
    learn, sizes, events = Forward.learn, [], Recorder()

    def watched(self: Forward, batch: Any, scale: float = 1.0) -> torch.Tensor:
        sizes.append((batch.real_tokens, [getattr(event, "phase", None) for event in events.events][-1]))
        return learn(self, batch, scale)

    monkeypatch.setattr(Forward, "learn", watched)
    train(tmp_path, a_request(base, train_file, spec={"training": {"max_steps": 12}}), events, Stopper())
    probed = [tokens for tokens, phase in sizes if phase is Phase.PROBING]
    trained = [tokens for tokens, phase in sizes if phase is not Phase.PROBING]
    assert len(probed) == 1
    assert max(trained) <= probed[0] <= 64
    kinds = [type(event).__name__ for event in events.events]
    assert kinds.index("CheckpointEvent") < kinds.index("ProgressEvent")

    def full(*_: Any, **__: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Forward, "learn", full)
    failing = Recorder()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        train(tmp_path / "full", a_request(base, train_file), failing, Stopper())
    assert [event for event in failing.events if isinstance(event, ProgressEvent)] == []


def test_sigterm_saves_the_last_finished_step_and_leaves(base: Path, train_file: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    workdir.mkdir()
    request = a_request(base, train_file, spec={"training": {"max_steps": 100_000}})
    (workdir / REQUEST_NAME).write_text(request.model_dump_json())
    command = [sys.executable, "-m", "graft_worker.training", str(workdir)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    assert child.stdout is not None
    lines = (line for line in child.stdout)
    next(line for line in lines if '"step":5' in line)
    os.kill(child.pid, signal.SIGTERM)
    rest = [json.loads(line) for line in lines]
    assert child.wait() == ExitCode.STOPPED
    assert rest[-1]["event"] == "checkpoint"
    assert rest[-1]["step"] >= 5
    assert (Path(rest[-1]["path"]) / "state.safetensors").exists()


@pytest.mark.parametrize(
    "change", [{"target_modules": ["q_proj"]}, {"base_revision": "another"}, {"spec": {"seed": 7}}]
)
def test_a_checkpoint_of_another_recipe_is_refused(
    base: Path, train_file: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    training = {"max_steps": 4, "save_steps": 2}
    events = Recorder()
    train(tmp_path / "one", a_request(base, train_file, spec={"training": training}), events, Stopper())
    _, checkpoint = (event for event in events.events if isinstance(event, CheckpointEvent))
    spec = {"training": {**training, **change.pop("spec", {})}}
    other = a_request(base, train_file, spec=spec, checkpoint_path=checkpoint.path, **change)
    with pytest.raises(CheckpointMismatch):
        train(tmp_path / "two", other, Recorder(), Stopper())


def test_kept_4_bit_weights_are_the_same_bits_and_a_broken_copy_is_made_again(base: Path, tmp_path: Path) -> None:
    precision, quantization = choose_precision(ComputeDtype.AUTO), Quantization()

    def matrices() -> list[torch.Tensor]:
        model = load_base(base, quantization, precision, quantised_dir=tmp_path)
        layers = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
        assert len(layers) == 14
        plain = [tensor for name, tensor in model.state_dict().items() if "norm" in name or "embed" in name]
        return [dequantize_4bit(layer.weight, layer.weight.quant_state) for layer in layers] + plain

    made = matrices()
    (kept,) = tmp_path.iterdir()
    weights = kept / "model.safetensors"
    written_at = weights.stat().st_mtime_ns
    read = matrices()
    assert weights.stat().st_mtime_ns == written_at, "it was read, not made again"
    half = weights.read_bytes()[:1000]
    weights.unlink()  # not in place: what was loaded is still mapped
    weights.write_bytes(half)
    (tmp_path / ".abandoned").mkdir()
    os.utime(tmp_path / ".abandoned", (0, 0))
    again = matrices()
    assert weights.stat().st_size > 1000
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
    for one, two, three in zip(made, read, again, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_kept_4_bit_weights_are_those_of_one_compute_type(base: Path, tmp_path: Path) -> None:
    for wanted in (ComputeDtype.BFLOAT16, ComputeDtype.AUTO):
        precision = choose_precision(wanted)
        model = load_base(base, Quantization(bnb_4bit_compute_dtype=wanted), precision, quantised_dir=tmp_path)
        layer = next(module for module in model.modules() if isinstance(module, Linear4bit))
        assert layer.compute_dtype == precision.compute


def test_a_disk_that_cannot_keep_4_bit_weights_fails_no_run(base: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "file"
    nowhere.write_text("not a folder")
    assert load_base(base, Quantization(), choose_precision(ComputeDtype.AUTO), quantised_dir=nowhere)


def test_a_checkpoint_of_another_version_is_refused(base: Path, train_file: Path, tmp_path: Path) -> None:
    events, training = Recorder(), {"max_steps": 4, "save_steps": 2}
    train(tmp_path / "one", a_request(base, train_file, spec={"training": training}), events, Stopper())
    _, checkpoint = (event for event in events.events if isinstance(event, CheckpointEvent))
    path = Path(checkpoint.path) / "state.safetensors"
    tensors = load_file(path)
    tensors["optimizer.master"] = tensors.pop("optimizer.weights")
    path.unlink()
    save_file(tensors, path)
    request = a_request(base, train_file, spec={"training": training}, checkpoint_path=checkpoint.path)
    with pytest.raises(CheckpointMismatch, match="another version"):
        train(tmp_path / "two", request, Recorder(), Stopper())


def test_the_base_is_frozen_and_keeps_its_types(base: Path) -> None:
    model, _ = loaded(base)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)

"""What only a GPU can show of the trainer: its kernels' bits, compiled layers, and resuming to the last digit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from graft_shared.memory import Recompute, TrainingPlan
from graft_shared.specs import ComputeDtype, Lora, Optim, Quantization, Training
from graft_worker.protocol import CheckpointEvent, ExitCode, ProgressEvent, TrainedEvent, WarningEvent
from graft_worker.training.adapters import attach_adapter, trainable
from graft_worker.training.attention import packed_attention
from graft_worker.training.base import choose_precision, load_base
from graft_worker.training.batches import Split, microbatches
from graft_worker.training.forward import Forward
from graft_worker.training.graphs import Graphs
from graft_worker.training.host_memory import keep_on_host
from graft_worker.training.layers import arrange_layers, compiled_loss, require_input_gradients
from graft_worker.training.linear import take_over
from graft_worker.training.optimizer import FlatOptimizer
from graft_worker.training.weights import dense, weight_parts
from tests.factories import make_prepared_split, make_tiny_base
from tests.training_runs import a_request, run_trainer

GPU = torch.device("cuda", 0)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
ROWS = [[5 + (row * 7 + position) % 40 for position in range(30 + row % 90)] for row in range(40)]
# Small weights, so that rounding to bfloat16 stays small too.
SIZES = {
    "initializer_range": 0.03,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("base") / "tiny", **SIZES)


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_prepared_split(tmp_path_factory.mktemp("data") / "train.safetensors", ROWS, prompt_tokens=2)


def adapted_base(base: Path, compute: ComputeDtype = ComputeDtype.AUTO, **changes: Any) -> Any:
    model = load_base(base, Quantization(**changes), choose_precision(compute))
    targets = ALL if "q_proj" in {name.rpartition(".")[2] for name, _ in model.named_modules()} else ["qkv_proj"]
    adapted = attach_adapter(model, Lora(r=8, lora_dropout=0.0), targets, base_model="a/b", revision="main")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable(adapted):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return adapted


def loaded(
    base: Path,
    *,
    recompute: Recompute = Recompute.NONE,
    backend: str | None = None,
    dropout: float = 0.0,
    longest: int = 512,
    compute: ComputeDtype = ComputeDtype.AUTO,
    **changes: Any,
) -> tuple[Any, Forward, Any]:
    precision = choose_precision(compute)
    adapted = adapted_base(base, compute, **changes)
    keys = torch.zeros(4096, dtype=torch.int32, device=precision.device)
    take_over(adapted, precision.compute, dropout=dropout, keys=keys)
    forward = Forward(adapted, precision, keys, longest=longest, chunk=compiled_loss(backend))
    require_input_gradients(adapted)
    plan = TrainingPlan(
        recompute=recompute, recompute_every_n=1, microbatch_tokens=4096, packing=True, optim=Optim.ADAMW_TORCH
    )
    layers = arrange_layers(forward.backbone, plan, backend=backend, largest_microbatch=4096)
    adapted.train()
    return adapted, forward, layers


def gradients(
    model: Any, forward: Forward, split: Split, groups: list[list[int]], *, device: torch.device = GPU
) -> torch.Tensor:
    for parameter in trainable(model):  # in place: a captured backward pass adds to where they were
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
    for rows in groups:
        for batch in microbatches(split, np.array(rows), budget=4096, packing=True, device=device, update=(1, 2)):
            forward.learn(batch)
    return torch.cat([parameter.grad.flatten() for parameter in trainable(model)])


def usual_gradients(base: Path, split: Split, rows: list[int]) -> torch.Tensor:
    """What PEFT and bitsandbytes make of each sequence alone, without any part of ours."""
    model = adapted_base(base)
    model.get_base_model().set_attn_implementation("eager")
    require_input_gradients(model)
    model.train()
    for row in rows:
        span = slice(split.offsets[row], split.offsets[row + 1])
        ids = torch.tensor(split.input_ids[span], dtype=torch.int64, device=GPU)
        learnt = torch.tensor(split.loss_mask[span].astype(bool), device=GPU)[1:]
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits[learnt].float(), ids[1:][learnt], reduction="sum").backward()
    return torch.cat([parameter.grad.flatten().float() for parameter in trainable(model)])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_weight_is_dequantised_to_the_bits_of_bitsandbytes(quant_type: str, double: bool, dtype: torch.dtype) -> None:
    import bitsandbytes as bnb

    for shape in ((4096, 4096), (11008, 4096), (1024, 320), (33, 64)):
        layer = bnb.nn.Linear4bit(
            shape[1], shape[0], bias=False, compress_statistics=double, quant_type=quant_type, compute_dtype=dtype
        )
        layer.weight = bnb.nn.Params4bit(
            torch.randn(shape, dtype=dtype) * 0.03,
            requires_grad=False,
            compress_statistics=double,
            quant_type=quant_type,
        )
        layer = layer.to(GPU)
        theirs = dequantize_4bit(layer.weight, layer.weight.quant_state)
        beside = torch.randn(shape[0], 48).to(GPU, dtype)
        assert torch.equal(dense(weight_parts(layer), quant_type, shape, dtype), theirs), shape
        wide = dense(weight_parts(layer), quant_type, shape, dtype, beside)
        assert torch.equal(wide, torch.cat([theirs, beside], dim=1)), shape


def test_grouped_heads_attend_as_repeated_ones_do() -> None:
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 300, 64, device=GPU, dtype=torch.bfloat16, requires_grad=True) for heads in (8, 2, 2)
    )
    borders = torch.tensor([0, 100, 300], dtype=torch.int32, device=GPU)
    module = torch.nn.Module()
    out, _ = packed_attention(module, query, key, value, None, cu_seq_lens_q=borders, max_length_q=256)
    repeated = [tensor.repeat_interleave(4, dim=1) for tensor in (key, value)]
    again, _ = packed_attention(module, query, *repeated, None, cu_seq_lens_q=borders, max_length_q=256)
    seed = torch.randn_like(out)
    ours = torch.autograd.grad(out, (query, key, value), seed)
    theirs = torch.autograd.grad(again, (query, key, value), seed)
    assert apart(out.float(), again.float()) < 1e-3
    for one, other in zip(ours, theirs, strict=True):
        assert apart(one.float(), other.float()) < 1e-2


def test_a_packed_batch_has_the_gradients_of_its_sequences_alone(base: Path, train_file: Path) -> None:
    split = Split.load(train_file)
    model, forward, _ = loaded(base)
    packed = gradients(model, forward, split, [list(range(12))])
    alone = gradients(model, forward, split, [[row] for row in range(12)])
    assert apart(packed, alone) < 0.01


@pytest.mark.parametrize("recompute", list(Recompute))
def test_compiled_and_recomputed_layers_have_the_gradients_of_plain_ones(
    base: Path, train_file: Path, recompute: Recompute
) -> None:
    """In fp32, where only an error is larger than rounding."""
    split, fp32 = Split.load(train_file), ComputeDtype.FLOAT32
    plain = gradients(*loaded(base, dropout=0.1, compute=fp32)[:2], split, [list(range(12))])
    model, forward, layers = loaded(base, recompute=recompute, backend="inductor", dropout=0.1, compute=fp32)
    assert apart(gradients(model, forward, split, [list(range(12)), list(range(20, 25))]), plain) > 0.1
    assert apart(gradients(model, forward, split, [list(range(12))]), plain) < 1e-4
    assert layers.plain == {}


def test_bfloat16_is_as_near_to_fp32_as_in_the_usual_recipe(base: Path, train_file: Path) -> None:
    """Launched or compiled: rounding is all that is between them, and no more of it than PEFT and bitsandbytes do."""
    split, rows = Split.load(train_file), list(range(12))
    exact = gradients(*loaded(base, compute=ComputeDtype.FLOAT32)[:2], split, [rows])
    usual = apart(usual_gradients(base, split, rows), exact)
    launched = apart(gradients(*loaded(base)[:2], split, [rows]), exact)
    compiled = apart(gradients(*loaded(base, backend="inductor")[:2], split, [rows]), exact)
    print("bfloat16 from fp32: usual", usual, "launched", launched, "compiled", compiled)
    assert max(launched, compiled) < 1.2 * usual
    assert usual < 0.2


@pytest.mark.parametrize("recompute", [Recompute.NONE, Recompute.OFFLOAD])
def test_captured_microbatches_have_the_gradients_of_launched_ones(
    base: Path, train_file: Path, recompute: Recompute
) -> None:
    split = Split.load(train_file)
    groups = [[0, 1, 2], list(range(12)), [0, 1, 2], [5], list(range(12)), [20, 3]]
    model, forward, _ = loaded(base, recompute=recompute, backend="inductor", dropout=0.1)
    launched = [gradients(model, forward, split, [rows]) for rows in groups]
    model, forward, layers = loaded(base, recompute=recompute, backend="inductor", dropout=0.1)
    forward.graphs = Graphs(forward.hidden, layers, 4096)
    for parameter in trainable(model):
        parameter.grad = torch.zeros_like(parameter)
    for rows, expected in zip(groups * 2, launched * 2, strict=True):
        assert apart(gradients(model, forward, split, [rows]), expected) < 0.01
    assert forward.graphs.failed is None


def test_a_filling_longer_than_every_sequence_spoils_no_gradient(base: Path, tmp_path: Path) -> None:
    split = Split.load(make_prepared_split(tmp_path / "short.safetensors", [[5 + n, 6, 7, 8] * 5 for n in range(7)]))
    expected = gradients(*loaded(base, backend="inductor")[:2], split, [list(range(7))])
    model, forward, layers = loaded(base, backend="inductor", longest=128)
    forward.graphs = Graphs(forward.hidden, layers, 4096)
    for _ in range(3):
        assert apart(gradients(model, forward, split, [list(range(7))]), expected) < 0.01
    assert forward.graphs.failed is None


def test_a_job_whose_rows_all_fit_one_microbatch_is_captured(base: Path, tmp_path: Path) -> None:
    rows = make_prepared_split(tmp_path / "few.safetensors", [[5 + n] * (90 + n) for n in range(16)])
    request = a_request(base, rows, target_modules=ALL, plan={"microbatch_tokens": 4096})
    ended = run_trainer(tmp_path / "run", request, GRAFT_COMPILER="inductor")
    assert ended.code == ExitCode.DONE, (ended.workdir / "log").read_text()[-3000:]
    assert [warning.code for warning in ended.of(WarningEvent)] == []


@pytest.mark.parametrize("model_type", ["gemma3_text", "olmo3"])
def test_layers_with_rotary_tables_of_their_own_are_captured(tmp_path: Path, train_file: Path, model_type: str) -> None:
    sizes = {"head_dim": 64, "sliding_window": 16, "query_pre_attn_scalar": 64} if "gemma" in model_type else {}
    base, split = make_tiny_base(tmp_path / "base", model_type=model_type, **(SIZES | sizes)), Split.load(train_file)
    groups = [[0, 1, 2], list(range(12)), [5], [0, 1, 2]]
    model, forward, _ = loaded(base)
    expected = [gradients(model, forward, split, [rows]) for rows in groups]
    model, forward, layers = loaded(base, backend="inductor")
    forward.graphs = Graphs(forward.hidden, layers, 4096)
    for rows, gradient in zip(groups, expected, strict=True):
        assert apart(gradients(model, forward, split, [rows]), gradient) < 0.03
    assert forward.graphs.failed is None


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("qwen2", {}),
        ("qwen3", {"head_dim": 64}),
        ("gemma", {"head_dim": 64}),
        ("gemma2", {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16}),
        ("phi3", {"pad_token_id": 0}),
        ("mistral", {"sliding_window": 16}),
    ],
)
def test_other_families_are_compiled_too(
    tmp_path: Path, train_file: Path, model_type: str, sizes: dict[str, Any]
) -> None:
    base, split = make_tiny_base(tmp_path / "base", model_type=model_type, **(SIZES | sizes)), Split.load(train_file)
    rows = list(range(12))
    exact = gradients(*loaded(base, compute=ComputeDtype.FLOAT32)[:2], split, [rows])
    usual = apart(usual_gradients(base, split, rows), exact)
    model, forward, layers = loaded(base, backend="inductor")
    ours = apart(gradients(model, forward, split, [rows]), exact)
    print("bfloat16 from fp32: usual", usual, "ours", ours)
    assert ours < 1.2 * usual
    assert usual < 0.2
    assert layers.plain == {}


def test_a_gpu_and_a_cpu_agree_on_a_tiny_base(base: Path, train_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split, fp32 = Split.load(train_file), ComputeDtype.FLOAT32
    there = gradients(*loaded(base, dropout=0.1, compute=fp32)[:2], split, [list(range(12))]).cpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = gradients(*loaded(base, dropout=0.1)[:2], split, [list(range(12))], device=torch.device("cpu"))
    assert apart(there, here) < 1e-3


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "paged_adamw_32bit", "adamw_torch"])
@pytest.mark.parametrize("compiler", ["none", "inductor"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    base: Path, train_file: Path, tmp_path: Path, optim: str, compiler: str
) -> None:
    training = {"max_steps": 12, "save_steps": 6, "deterministic": True, "optim": optim}
    spec = {"training": training, "lora": {"lora_dropout": 0.1}}
    request = a_request(base, train_file, spec=spec, target_modules=ALL, plan={"microbatch_tokens": 512})
    whole = run_trainer(tmp_path / "whole", request, GRAFT_COMPILER=compiler)
    assert whole.code == ExitCode.DONE, (whole.workdir / "log").read_text()[-3000:]
    _, checkpoint = whole.of(CheckpointEvent)
    again = request.model_copy(update={"checkpoint_path": checkpoint.path})
    resumed = run_trainer(tmp_path / "resumed", again, GRAFT_COMPILER=compiler)
    losses = [event.loss for event in whole.of(ProgressEvent)]
    assert [event.loss for event in resumed.of(ProgressEvent)] == losses[6:]
    name = "adapter/adapter_model.safetensors"
    assert (resumed.workdir / name).read_bytes() == (whole.workdir / name).read_bytes()


def test_an_embedding_on_the_host_gives_the_same_rows_and_leaves_the_card() -> None:
    embedding = torch.nn.Embedding(4096, 512, device=GPU, dtype=torch.bfloat16).requires_grad_(False)
    ids = torch.randint(4096, (1, 300), device=GPU)
    before, held = embedding(ids), torch.cuda.memory_allocated()
    keep_on_host(embedding)
    assert held - torch.cuda.memory_allocated() == embedding.weight.nbytes
    assert embedding.weight.device == GPU
    assert torch.equal(embedding(ids), before)
    assert torch.equal(torch.compile(embedding)(ids), before)


def test_a_run_whose_inputs_and_embeddings_are_on_the_host_trains_as_any(
    base: Path, train_file: Path, tmp_path: Path
) -> None:
    losses = []
    for recompute in (Recompute.NONE, Recompute.OFFLOAD):
        plan = {"microbatch_tokens": 512, "recompute": recompute, "recompute_every_n": int(recompute != Recompute.NONE)}
        request = a_request(base, train_file, spec={"training": {"max_steps": 8}}, target_modules=ALL, plan=plan)
        ended = run_trainer(tmp_path / recompute, request)
        assert ended.code == ExitCode.DONE, (ended.workdir / "log").read_text()[-3000:]
        assert not ended.of(WarningEvent)
        losses.append([event.loss for event in ended.of(ProgressEvent)])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_paged_state_is_counted_apart_since_the_driver_calls_it_nobodys() -> None:
    for optim, per_weight in ((Optim.PAGED_ADAMW_8BIT, 2), (Optim.PAGED_ADAMW_32BIT, 8), (Optim.ADAMW_8BIT, 0)):
        weights = [torch.nn.Parameter(torch.zeros(1024, 1024, device=GPU))]
        optimizer = FlatOptimizer(weights, Training(optim=optim))
        optimizer.rehearse()
        assert optimizer.paged_bytes == per_weight * 1024**2


def test_every_precision_trains(base: Path, train_file: Path, tmp_path: Path) -> None:
    for number, quantization in enumerate(
        ({"bnb_4bit_compute_dtype": "float16"}, {"load_in_4bit": False}, {"bnb_4bit_quant_type": "fp4"})
    ):
        request = a_request(base, train_file, spec={"quantization": quantization}, target_modules=ALL)
        ended = run_trainer(tmp_path / str(number), request, GRAFT_COMPILER="none")
        assert ended.code == ExitCode.DONE, (ended.workdir / "log").read_text()[-3000:]
        losses = [event.loss for event in ended.of(ProgressEvent)]
        assert losses[-1] < losses[0]
        assert ended.of(TrainedEvent)

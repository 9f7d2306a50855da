"""What runs really hold of a GPU beside what the capacity table says of them, one process a run, as JSON.

    python tests/bench/golden.py --out-dir DIR [--only 70b] [--held-out no]     run, several at once
    python tests/bench/golden.py --report FILE --plot docs/memory.png           show what was found

Bases are made on the card, layer by layer and already quantised: a 70B fits no disk that a test has. Each run does what
a job's does (load, probe, three updates of the fullest microbatches, an evaluation, a checkpoint), fresh or resumed.
Measured is the allocator's peak and what the process holds outside it; the context and managed memory are in that.
`HELD_OUT` are runs that `memory.py` was not fitted to. Runs share the card as long as
it has room for what they are expected to hold and a bit more; each is measured by what the driver says of its process.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import numpy as np
from safetensors.numpy import save_file

from graft_shared.catalogue import ModelShape
from graft_shared.memory import (
    GIB,
    HIGH,
    LOW,
    MemoryEstimate,
    Recompute,
    TrainingPlan,
    estimate,
    runs_as_graphs,
)
from graft_shared.specs import JobSpec, Optim
from graft_worker.protocol import TrainRequest
from graft_worker.training.guard import Guard
from tests.bench.together import Task, require_card, run_together, script

UPDATES = 3
SEQUENCES = 16
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Dims:
    """A Llama's sizes."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = False


DIMS = {
    "tiny": Dims(64, 128, 2, 4, 2, 512),
    "1b": Dims(2048, 8192, 16, 32, 8, 128_256, tie_word_embeddings=True),
    "3b": Dims(3072, 8192, 28, 24, 8, 128_256, tie_word_embeddings=True),
    "7b": Dims(4096, 11_008, 32, 32, 32, 32_000),
    "8b": Dims(4096, 14_336, 32, 32, 8, 128_256),
    "13b": Dims(5120, 13_824, 40, 40, 40, 32_000),
    "34b": Dims(7168, 20_480, 60, 56, 8, 64_000),
    "70b": Dims(8192, 28_672, 80, 64, 8, 128_256),
}


@dataclass(frozen=True)
class Case:
    """One run."""

    dims: str
    recompute: str
    tokens: int  # of a microbatch
    all_linear: bool = False
    optim: str = "paged_adamw_8bit"
    load_in_4bit: bool = True
    resumed: bool = False
    r: int = 16

    @property
    def name(self) -> str:
        """A file's name."""
        words = [self.dims, self.recompute, str(self.tokens), "all" if self.all_linear else "attention", self.optim]
        words += ["resumed"] * self.resumed + ["bf16"] * (not self.load_in_4bit) + [f"r{self.r}"] * (self.r != 16)
        return "-".join(words)


FITTED = [
    Case("1b", "none", 512), Case("1b", "none", 8192, all_linear=True), Case("1b", "none", 32_768),
    Case("1b", "full", 16_384, optim="adamw_torch"), Case("1b", "offload", 32_768, all_linear=True),
    Case("3b", "none", 4096, optim="paged_adamw_32bit"), Case("3b", "every_n_layers", 8192, all_linear=True),
    Case("7b", "none", 1024), Case("7b", "every_n_layers", 8192), Case("7b", "offload", 1024),
    Case("7b", "full", 2048, optim="adamw_torch", all_linear=True),
    Case("7b", "none", 4096, load_in_4bit=False, all_linear=True),
    Case("8b", "none", 16_384, all_linear=True), Case("8b", "full", 4096, all_linear=True),
    Case("8b", "offload", 16_384, all_linear=True, resumed=True),
    Case("8b", "every_n_layers", 4096, optim="paged_adamw_32bit"), Case("8b", "none", 2048, r=128),
    Case("13b", "none", 8192), Case("13b", "full", 8192, resumed=True),
    Case("13b", "offload", 4096, optim="adamw_torch", all_linear=True),
    Case("34b", "none", 1024), Case("34b", "none", 4096, all_linear=True), Case("34b", "full", 4096, all_linear=True),
    Case("70b", "none", 2048, all_linear=True), Case("70b", "every_n_layers", 2048), Case("70b", "offload", 1024),
    Case("3b", "full", 16_384, resumed=True), Case("7b", "none", 4096, resumed=True),
    Case("7b", "none", 6144, all_linear=True), Case("7b", "offload", 8192, all_linear=True, r=64),
    Case("8b", "offload", 8192, all_linear=True), Case("13b", "none", 2048, all_linear=True),
    Case("13b", "offload", 512), Case("34b", "offload", 8192, resumed=True), Case("70b", "none", 512),
    Case("70b", "full", 4096, all_linear=True, optim="paged_adamw_32bit"),
    Case("1b", "full", 4096, all_linear=True), Case("1b", "offload", 16_384, all_linear=True, optim="adamw_torch"),
    Case("3b", "none", 8192, all_linear=True), Case("3b", "offload", 12_288, resumed=True),
    Case("7b", "full", 8192), Case("7b", "every_n_layers", 3072, all_linear=True, resumed=True),
    Case("8b", "none", 1024, all_linear=True, optim="paged_adamw_32bit"),
    Case("8b", "full", 8192, all_linear=True, r=64), Case("13b", "offload", 2048),
    Case("34b", "full", 1024, all_linear=True),
    Case("70b", "offload", 4096, all_linear=True),
    Case("1b", "offload", 8192, all_linear=True), Case("1b", "full", 8192),
]  # fmt: skip
HELD_OUT = [
    Case("1b", "every_n_layers", 16_384, all_linear=True), Case("3b", "offload", 8192, all_linear=True),
    Case("3b", "full", 4096, optim="paged_adamw_32bit"), Case("7b", "offload", 16_384, r=32),
    Case("7b", "full", 3072, all_linear=True, resumed=True), Case("8b", "offload", 4096),
    Case("8b", "none", 4096, optim="adamw_torch"), Case("13b", "every_n_layers", 4096, all_linear=True),
    Case("34b", "offload", 2048, all_linear=True, resumed=True), Case("70b", "full", 1024),
]  # fmt: skip


ROOM = 1.15  # times what a run is expected to hold is kept free for it


def main() -> None:
    """Run the cases, each in a process of its own, and tell how far the table was off."""
    arguments = _arguments()
    if arguments.case is not None:
        with TemporaryDirectory(dir=arguments.out_dir) as workdir:  # checkpoints of so many runs would fill a disk
            print(json.dumps(measure(Case(**json.loads(arguments.case)), Path(workdir))))
        return
    if arguments.report is not None:
        report(json.loads(arguments.report.read_text()), arguments.plot)
        return
    require_card(smoke=arguments.smoke)
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    waiting = [
        case
        for case in ([Case("tiny", "none", 64)] if arguments.smoke else [*FITTED, *HELD_OUT])
        if arguments.only in case.name and arguments.held_out in (None, case in HELD_OUT)
    ]
    found = run_all(sorted(waiting, key=lambda case: expected(case).expected_bytes, reverse=True), arguments.out_dir)
    report(found, arguments.plot)


def run_all(waiting: list[Case], out_dir: Path) -> list[dict[str, Any]]:
    """Make the runs, several at once; returns what was found, and keeps it in a file."""
    found: list[dict[str, Any]] = []
    for done in run_together([_task(case, out_dir) for case in waiting], out_dir):
        if done.result is None:
            print(f"{done.name}: {done.problem}", flush=True)
            continue
        found.append(done.result)
        (out_dir / "golden.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def _task(case: Case, out_dir: Path) -> Task:
    command = script(__file__, "--out-dir", str(out_dir), "--case", json.dumps(asdict(case)))
    return Task(name=case.name, command=command, bytes_kept=int(ROOM * expected(case).expected_bytes))


def expected(case: Case) -> MemoryEstimate:
    """What the table says of a case."""
    request, shape = make_request(case, Path("/nowhere/rows.safetensors"))
    return estimate(shape, JobSpec.model_validate(request.spec), TrainingPlan.from_dict(request.plan))


def errors_of(found: list[dict[str, Any]]) -> list[float]:
    """How far off the table is today, as a share of what was measured: its arithmetic may be newer than the runs."""
    return [expected(Case(**run["case"])).expected_bytes / run["memory"]["measured_peak_bytes"] - 1 for run in found]


def is_held_out(run: dict[str, Any]) -> bool:
    """Whether the table was not fitted to this run."""
    return Case(**run["case"]) in HELD_OUT


def line_of(run: dict[str, Any]) -> str:
    """One run in a line."""
    (error,), measured = errors_of([run]), run["memory"]["measured_peak_bytes"]
    held_out = " (held out)" if is_held_out(run) else ""
    return f"{Case(**run['case']).name}: {measured / GIB:.2f} GiB, expected {100 * error:+.1f} %{held_out}"


def report(found: list[dict[str, Any]], plot: Path | None) -> None:
    """Tell how far off the table is, run by run and over all, and draw it."""
    for run in found:
        print(line_of(run))
    for name, runs in (
        ("fitted", [run for run in found if not is_held_out(run)]),
        ("held out", [run for run in found if is_held_out(run)]),
    ):
        sizes = sorted(abs(error) for error in errors_of(runs))
        if sizes:
            print(f"{name}: {len(sizes)} runs, median {sizes[len(sizes) // 2]:.1%}, worst {sizes[-1]:.1%}")
    if plot is not None and found:
        draw(found, plot)


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Expected over measured, and how far off each run is."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for held_out, color in ((False, "C0"), (True, "C1")):
        runs = [run for run in found if is_held_out(run) == held_out]
        if not runs:
            continue
        measured = [run["memory"]["measured_peak_bytes"] / GIB for run in runs]
        errors = errors_of(runs)
        label = "held out" if held_out else "fitted to"
        left.scatter(
            measured, [size * (1 + error) for size, error in zip(measured, errors, strict=True)], 16, color, label=label
        )
        right.scatter(measured, [100 * error for error in errors], 16, color, label=label)
    top = 1.05 * max(run["memory"]["measured_peak_bytes"] for run in found) / GIB
    left.plot([0, top], [0, top], color="gray", linewidth=0.8)
    left.set(xlabel="measured GiB", ylabel="expected GiB", xlim=(0, top), ylim=(0, top))
    for percent in (100 * (1 / HIGH - 1), 100 * (1 / LOW - 1)):
        right.axhline(percent, color="gray", linewidth=0.8, linestyle="--")
    right.axhline(0, color="gray", linewidth=0.8)
    right.set(xlabel="measured GiB", ylabel="expected above measured, %", xlim=(0, top))
    left.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def measure(case: Case, workdir: Path) -> dict[str, Any]:
    """One run in this process."""
    from graft_worker.training import base, recipe
    from graft_worker.training.versions import versions
    from tests.bench.profile_step import Silent

    base._load = lambda _path, precision, quantization: make_base(DIMS[case.dims], precision, quantization)
    data = make_rows(workdir / "rows.safetensors", case)
    request, shape = make_request(case, data)
    if case.resumed:
        run = recipe.load(workdir, request, Silent(), Guard())
        recipe.probe(run)
        request = request.model_copy(update={"checkpoint_path": str(workdir / "checkpoints" / "step-0")})
        del run
        gc.collect()
        forget_peaks()
    began = time.monotonic()
    run = recipe.load(workdir, request, Silent(), Guard())
    forget_peaks()
    recipe.probe(run)
    figures = [recipe.update(run).read() for _ in range(UPDATES)]
    recipe.evaluate(run)
    run.saved_step = -1
    recipe.save(run)
    spec = JobSpec.model_validate(request.spec)
    return {
        "case": asdict(case),
        "memory": run.footprint.peak(run.optimizer.paged_bytes),
        "pools": pools(),
        "estimate": estimate(shape, spec, run.plan).to_dict(),
        "losses": [round(loss, 4) for loss, _ in figures],
        "seconds": round(time.monotonic() - began, 1),
        "versions": versions(),
        "command": f"python tests/bench/golden.py --only {case.name}",
    }


def pools() -> dict[str, dict[str, int]]:
    """Bytes that the allocator holds at the end, and those in use: of what is launched, and of what is replayed."""
    import torch

    found = {name: {"held": 0, "in_use": 0} for name in ("launched", "graphs")}
    for segment in torch.cuda.memory_snapshot() if torch.cuda.is_available() else []:
        pool = found["launched" if tuple(segment["segment_pool_id"]) == (0, 0) else "graphs"]
        pool["held"] += segment["total_size"]
        pool["in_use"] += segment["active_size"]
    return found


def forget_peaks() -> None:
    """What the allocator held until now is no part of what is measured from here on."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def make_base(dims: Dims, precision: Any, quantization: Any) -> Any:
    """A Llama of random weights on the device, its linear layers quantised one after the other."""
    import bitsandbytes as bnb
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**asdict(dims), max_position_embeddings=32_768)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(precision.base)
    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        size = (module.out_features, module.in_features)
        weight = torch.randn(size, dtype=precision.base, device=precision.device) * 0.02
        if quantization is None:
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
            continue
        facts = {
            "compress_statistics": quantization.bnb_4bit_use_double_quant,
            "quant_type": quantization.bnb_4bit_quant_type,
        }
        layer = bnb.nn.Linear4bit(
            size[1], size[0], bias=False, compute_dtype=precision.compute, device="meta", **facts
        )  # fmt: skip
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, **facts)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.to(precision.device))
        if layer.weight.quant_state is None:  # nothing moved it: it was made where it is to be
            layer.weight = layer.weight._quantize(precision.device)
        del weight
    _fill(model, precision)
    model.tie_weights()
    return model


def _fill(model: Any, precision: Any) -> None:
    """Give memory and numbers to what is still without: embeddings, norms, head, rotary tables."""
    import torch

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                made = torch.randn(parameter.shape, dtype=precision.base, device=precision.device) * 0.02
                made = torch.ones_like(made) if "norm" in type(module).__name__.lower() else made
                setattr(module, name, torch.nn.Parameter(made, requires_grad=False))
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config).to(precision.device)


def make_rows(path: Path, case: Case) -> Path:
    """Rows of which a few fill a microbatch to the last token, and an update two microbatches."""
    length = max(8, case.tokens // (SEQUENCES // 2))
    rows = 4 * SEQUENCES
    ids = np.random.default_rng(1).integers(3, 300, rows * length).astype(np.int32)
    offsets = np.arange(rows + 1, dtype=np.int64) * length
    save_file({"input_ids": ids, "loss_mask": np.ones(len(ids), dtype=np.uint8), "offsets": offsets}, path)
    return path


def make_request(case: Case, data: Path) -> tuple[TrainRequest, ModelShape]:
    """The request of a job whose base is only made when it is loaded."""
    every_n = {"none": 0, "every_n_layers": 2}.get(case.recompute, 1)
    training = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": SEQUENCES, "max_steps": 10**6}
    spec = JobSpec.model_validate(
        {
            "base_model": f"graft/{case.dims}",
            "dataset": {"file": "file-rows"},
            "validation": {"file": "file-rows"},
            "quantization": {"load_in_4bit": case.load_in_4bit},
            "lora": {"r": case.r, "target_modules": "all-linear" if case.all_linear else ATTENTION},
            "training": {**training, "optim": case.optim, "max_length": case.tokens, "eval_steps": 10**6},
        }
    )
    config = {**asdict(DIMS[case.dims]), "model_type": "llama", "max_position_embeddings": 32_768}
    shape = ModelShape.from_config(config, base_model=spec.base_model, revision="random")
    plan = TrainingPlan(
        recompute=Recompute(case.recompute),
        recompute_every_n=every_n,
        microbatch_tokens=case.tokens,
        packing=True,
        optim=Optim(case.optim),
        cuda_graphs=runs_as_graphs(shape, case.tokens),
    )
    request = TrainRequest(
        job_id="ftjob-golden",
        epoch=1,
        spec=spec.model_dump(mode="json", by_alias=True),
        plan=plan.to_dict(),
        target_modules=ALL if case.all_linear else ATTENTION,
        base_path=str(data.parent),
        base_model=spec.base_model,
        base_revision="random",
        train_file=str(data),
        validation_file=str(data),
        checkpoint_path=None,
    )
    return request, shape


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out-dir", type=Path, default=Path(".graft/bench/golden"))
    parser.add_argument("--report", type=Path, help="run nothing: tell of an earlier golden.json")
    parser.add_argument("--plot", type=Path, help="draw what was found here; needs matplotlib")
    parser.add_argument("--only", default="", help="runs whose name holds this")
    parser.add_argument("--held-out", type=lambda word: word == "yes", help="yes or no: only these")
    parser.add_argument("--smoke", action="store_true", help="one run on a tiny base, on any device")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Train one adapter on a base of random weights, exactly as a supervisor would, and write what it took as JSON.

    python tests/bench/train_once.py --dims llama-2-7b --steps 60 --recompute none --out result.json

Workload A: 16 sequences per optimizer step, lengths log-normal (median 180, sigma 0.6, cap 1,024). Workload B: the same
of longer ones (median 800, cap 4,096), 16,000 tokens an update. Both with the usual configuration (NF4, double
quantisation, r=16 on q, k, v, o, batch 4 × accumulation 4, paged 8-bit AdamW). Tokens are drawn from a small skewed
distribution, so that even random weights have something to learn. Real tokens are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from graft_shared.catalogue import ModelShape
from graft_shared.memory import Recompute, TrainingPlan, estimate, runs_as_graphs
from graft_shared.planner import fastest_plan, plans
from graft_shared.specs import JobSpec, Optim
from graft_worker.protocol import (
    REQUEST_NAME,
    EvaluationEvent,
    PhaseEvent,
    ProgressEvent,
    TrainedEvent,
    TrainRequest,
    WarningEvent,
    parse_event,
)

DIMS: dict[str, dict[str, Any]] = {
    "llama-2-7b": {"base": "meta-llama/Llama-2-7b-hf", "hidden_size": 4096, "intermediate_size": 11008,
                   "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "llama-3.2-1b": {"base": "meta-llama/Llama-3.2-1B", "hidden_size": 2048, "intermediate_size": 8192,
                     "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
                     "vocab_size": 128256, "tie_word_embeddings": True},
    "llama-3.1-8b": {"base": "meta-llama/Llama-3.1-8B", "hidden_size": 4096, "intermediate_size": 14336,
                     "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                     "vocab_size": 128256},
    "tiny": {"base": "graft/tiny", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
}  # fmt: skip
LEARNABLE_TOKENS = 400
ROWS = 4000
WORKLOADS = {"a": {"median": 180, "cap": 1024}, "b": {"median": 800, "cap": 4096}}


def main() -> None:
    """Make base and data if they are not there, train, report."""
    arguments = arguments_of(__doc__ or "")
    arguments.workspace.mkdir(parents=True, exist_ok=True)
    base = make_base(arguments.workspace / arguments.dims, arguments.dims)
    data = make_workload(arguments.workspace, arguments.workload, DIMS[arguments.dims]["vocab_size"])
    request = make_request(base, data, arguments)
    result = train(request, arguments.workspace / f"run-{os.getpid()}")
    result["estimate"] = predict(base, request)
    result["arguments"] = {key: str(value) for key, value in vars(arguments).items() if key not in ("out", "workspace")}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "losses"}, indent=1))


def make_base(path: Path, dims: str) -> Path:
    """A Llama of these dimensions with random weights, saved as a user's base would be.

    It is made in a process of its own: what that takes of the card in 16 bits is no part of any measured peak.
    """
    if not (path / "config.json").exists():
        maker = get_context("spawn").Process(target=_write_base, args=(path, dims))
        maker.start()
        maker.join()
        if maker.exitcode != 0:
            raise SystemExit(f"the process that makes the base left with {maker.exitcode}")
    return path


def _write_base(path: Path, dims: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {key: value for key, value in DIMS[dims].items() if key != "base"}
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        config = LlamaConfig(**sizes, max_position_embeddings=4096, dtype=torch.bfloat16)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(path)


def make_workload(folder: Path, name: str, vocabulary: int) -> Path:
    """A workload as a prepared split."""
    path, facts = folder / f"workload-{name}-{vocabulary}.safetensors", WORKLOADS[name]
    random = np.random.default_rng(7)
    lengths = np.clip(np.exp(random.normal(np.log(facts["median"]), 0.6, ROWS)), 8, facts["cap"]).astype(int)
    odds = 1 / np.arange(1, LEARNABLE_TOKENS + 1)
    tokens = random.choice(vocabulary, LEARNABLE_TOKENS, replace=False)
    ids = random.choice(tokens, size=int(lengths.sum()), p=odds / odds.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    save_file({"input_ids": ids, "loss_mask": np.ones(len(ids), dtype=np.uint8), "offsets": offsets}, path)
    return path


def make_request(base: Path, data: Path, arguments: argparse.Namespace) -> TrainRequest:
    """The usual configuration."""
    targets: Any = "all-linear" if arguments.all_linear else ["q_proj", "k_proj", "v_proj", "o_proj"]
    spec = JobSpec.model_validate(
        {
            "base_model": DIMS[arguments.dims]["base"],
            "dataset": {"file": "file-workload"},
            "quantization": {"load_in_4bit": not arguments.bf16_base},
            "lora": {"r": 16, "lora_alpha": 32, "lora_dropout": arguments.dropout, "target_modules": targets},
            "training": {
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 4,
                "max_steps": arguments.steps,
                "max_length": WORKLOADS[arguments.workload]["cap"],
                "optim": arguments.optim,
                "save_steps": 10**6,
                "deterministic": arguments.deterministic,
            },
        }
    )
    plan = plan_of(spec, base, arguments)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", *(["gate_proj", "up_proj", "down_proj"] * arguments.all_linear)]
    return TrainRequest(
        job_id="ftjob-bench",
        epoch=1,
        spec=spec.model_dump(mode="json", by_alias=True),
        plan=plan.to_dict(),
        target_modules=names,
        base_path=str(base),
        base_model=spec.base_model,
        base_revision="random-weights",
        train_file=str(data),
        validation_file=None,
        checkpoint_path=None,
        quantised_dir=str(arguments.workspace / "quantised" / arguments.dims),
    )


def plan_of(spec: JobSpec, base: Path, arguments: argparse.Namespace) -> TrainingPlan:
    """The plan that a user's job would get: the fastest that fits the limit, or the leanest; or the one asked for."""
    shape = shape_of(base, spec.base_model)
    if arguments.recompute is None:
        if arguments.mode == "memory":
            every = plans(shape, spec)
            captured = [plan for plan in every if plan.cuda_graphs] or every
            return min(captured, key=lambda plan: estimate(shape, spec, plan).expected_bytes)
        found = fastest_plan(shape, spec, int(arguments.limit_gib * 2**30))
        assert found is not None, "no plan fits"
        return found[0]
    return TrainingPlan(
        recompute=Recompute(arguments.recompute),
        recompute_every_n={"none": 0, "every_n_layers": 2}.get(arguments.recompute, 1),
        microbatch_tokens=arguments.microbatch_tokens,
        packing=True,
        optim=Optim(arguments.optim),
        cuda_graphs=not arguments.launched and runs_as_graphs(shape, arguments.microbatch_tokens),
    )


def train(request: TrainRequest, workdir: Path) -> dict[str, Any]:
    """Run the trainer as its own process and gather its events."""
    workdir.mkdir()
    (workdir / REQUEST_NAME).write_text(request.model_dump_json())
    started = time.monotonic()
    command = [sys.executable, "-m", "graft_worker.training", str(workdir)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    steps: list[ProgressEvent] = []
    moments: list[float] = []
    phases: list[tuple[float, str]] = []
    warnings: list[str] = []
    trained: TrainedEvent | None = None
    for line in child.stdout:
        event = parse_event(line)
        if isinstance(event, ProgressEvent):
            steps.append(event)
            moments.append(time.monotonic())
        elif isinstance(event, TrainedEvent):
            trained = event
        elif isinstance(event, PhaseEvent):
            phases.append((round(time.monotonic() - started, 2), event.phase.value))
        elif isinstance(event, WarningEvent):
            warnings.append(event.message)
        elif not isinstance(event, EvaluationEvent):
            print(line.rstrip(), file=sys.stderr)
    if child.wait() != 0 or trained is None:
        raise SystemExit(f"the trainer left with {child.returncode}")
    half = len(steps) // 2
    speeds = [
        (steps[i].tokens_seen - steps[i - 1].tokens_seen) / (moments[i] - moments[i - 1])
        for i in range(half, len(steps))
    ]
    return {
        "first_loss": steps[0].loss,
        "last_loss": steps[-1].loss,
        "largest_update_tokens": max(np.diff([0, *(step.tokens_seen for step in steps)]).tolist()),
        "losses": [round(step.loss, 4) for step in steps],
        "tokens_per_second": round(statistics.median(speeds), 1),
        "seconds_to_first_step": round(moments[0] - started, 1),
        "phases": phases,
        "warnings": warnings,
        "plan": request.plan,
        "memory": trained.memory,
        "proof": trained.proof,
        "versions": trained.versions,
        "command": command_line(),
    }


def predict(base: Path, request: TrainRequest) -> dict[str, Any]:
    """What the capacity table would have said."""
    shape = shape_of(base, request.base_model)
    return estimate(shape, JobSpec.model_validate(request.spec), TrainingPlan.from_dict(request.plan)).to_dict()


def command_line() -> str:
    """How this figure is made again, without where its files lay."""
    words = ["python", f"tests/bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    places = {"--out", "--workspace"}
    return " ".join(word for word, before in zip(words, ["", *words], strict=False) if not {word, before} & places)


def shape_of(base: Path, base_model: str) -> ModelShape:
    """The base's numbers, from its config."""
    config = json.loads((base / "config.json").read_text())
    return ModelShape.from_config(config, base_model=base_model, revision="main")


def card_gib() -> float:
    """What jobs may use of the first GPU; an 80 GB card's where there is none. Asked without making a context on it."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits", "--id=0"]
    try:
        mib = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError, ValueError):
        mib = 80 * 1024
    return round(mib / 1024 - 4, 1)


def arguments_of(description: str) -> argparse.Namespace:
    """What to measure."""
    return parser_of(description).parse_args()


def parser_of(description: str) -> argparse.ArgumentParser:
    """The options that say what is trained, on what, by which plan."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", choices=sorted(DIMS), default="llama-2-7b")
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="a")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--mode",
        choices=["speed", "memory"],
        default="speed",
        help="the planner's fastest, or its leanest with CUDA graphs",
    )
    parser.add_argument("--limit-gib", type=float, default=card_gib(), help="memory that the planner may use for speed")
    parser.add_argument("--recompute", choices=[mode.value for mode in Recompute], help="a plan of your own instead")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--microbatch-tokens", type=int, default=4096)
    parser.add_argument("--launched", action="store_true", help="no microbatch as a CUDA graph")
    parser.add_argument("--optim", choices=[optim.value for optim in Optim], default="paged_adamw_8bit")
    parser.add_argument("--all-linear", action="store_true")
    parser.add_argument("--bf16-base", action="store_true")
    parser.add_argument("--deterministic", action="store_true", help="the same bytes each time on a GPU, too")
    parser.add_argument("--workspace", type=Path, default=Path("/tmp/graft-bench"))
    parser.add_argument("--out", type=Path, required=True)
    return parser


if __name__ == "__main__":
    main()

"""What the capacity table promises, trained under hard caps on one large card, as JSON and as a table.

    python tests/bench/caps.py --out-dir DIR [--only 24gb] [--budget SECONDS]     20 steps of each base on its class
    python tests/bench/caps.py --out-dir DIR --plans [--only 24gb]                the chosen plan beside others

Each base that guides to QLoRA name for a size of card trains on that class, at these lengths of sequence:

    short     512 tokens
    speed     the longest that the class holds with nothing computed twice
    listed    the longest that the table promises of the base as it is: its positions or the memory end it
    longest   the longest that the memory allows, of a base with positions enough

One step above each but the first, the table has to refuse the job. A run's allocator gets what jobs may use of the
class, less the CUDA context and the managed memory, which no such limit sees. Runs share the card as their caps allow.
With `--plans` nothing runs beside what is timed: for each base the plan that is chosen at 512 tokens, the next ones of
the planner's list, and some that it does not list.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import yaml
from safetensors.numpy import save_file

from graft_shared.capacity import LENGTH_STEP, CapacityTable, GpuClass, Placement
from graft_shared.catalogue import Catalogue, ModelShape
from graft_shared.errors import InvalidParameter, VramCapacityExceeded
from graft_shared.memory import CONTEXT_BYTES, GIB, Recompute, TrainingPlan, estimate, runs_as_graphs
from graft_shared.planner import leanest_plan, plans
from graft_shared.specs import JobSpec
from graft_worker.protocol import TrainRequest
from graft_worker.training.guard import Guard
from tests.bench.golden import Dims, forget_peaks, make_base
from tests.bench.together import Task, require_card, run_together, script

DEPLOY = Path(__file__).parents[2] / "deploy"
GUIDE = {
    "16gb": "huggyllama/llama-7b",
    "24gb": "huggyllama/llama-13b",
    "40gb": "huggyllama/llama-30b",
    "48gb": "huggyllama/llama-65b",
    "80gb": "meta-llama/Llama-2-70b-hf",
}
SMOKE_GUIDE = {"tiny": "graft/tiny"}
SMOKE_BASE = {"ids": ["graft/tiny"], "model_type": "llama", "max_position_embeddings": 512,
              **asdict(Dims(64, 128, 2, 4, 2, 512))}  # fmt: skip
SMOKE_CLASS = {"memory_gib": 1.203}  # holds some two thousand tokens
KINDS = ("short", "speed", "listed", "longest")
SHORT = 512
POSITIONS = 262_144  # enough for whatever memory allows here
STEPS, SMOKE_STEPS = 20, 2
UPDATE_TOKENS = 4096
PLAN_SEQUENCES = 16  # what a user's job has
PLAN_STEPS = 10_000  # never reached
WARM_UP, TIMED, TIMED_SECONDS = 4, 6, 15.0
NEXT_PLANS = 3  # of the planner's list
WORTH = 0.95  # the chosen plan is no slower than this share of the fastest that was tried
GRACE_SECONDS = 60.0  # a run ends by itself after the step in which its time was over


@dataclass(frozen=True, kw_only=True)
class Case:
    """One base on the class that guides give it, at one length."""

    gpu_class: str
    base_model: str
    kind: str
    max_length: int
    smoke: bool = False

    @property
    def name(self) -> str:
        """A file's name."""
        return f"{self.base_model.rpartition('/')[2]}-{self.gpu_class}-{self.kind}".lower()

    @cached_property
    def tables(self) -> tuple[CapacityTable, Catalogue]:
        """The operator's table and catalogue."""
        return read_tables(smoke=self.smoke)

    @property
    def gpu(self) -> GpuClass:
        """Its class."""
        found = self.tables[0].get(self.gpu_class)
        assert found is not None
        return found

    @property
    def shape(self) -> ModelShape:
        """Its base, with positions enough where memory is to be the limit."""
        found = self.tables[1].get(self.base_model)
        assert found is not None
        return replace(found, max_position_embeddings=POSITIONS) if self.kind in ("speed", "longest") else found

    @property
    def spec(self) -> JobSpec:
        """The job that is posted: an update is some thousand tokens, or one sequence."""
        sequences = max(1, UPDATE_TOKENS // self.max_length)
        training = {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": PLAN_SEQUENCES if self.kind == "plans" else sequences,
            "max_steps": PLAN_STEPS if self.kind == "plans" else SMOKE_STEPS if self.smoke else STEPS,
            "max_length": self.max_length,
            "gradient_checkpointing": False if self.kind == "speed" else "auto",
        }
        body = {"base_model": self.base_model, "dataset": {"file": "file-rows"}, "validation": {"file": "file-rows"}}
        return JobSpec.model_validate({**body, "training": training, "gpu": {"class": self.gpu_class}})

    def place(self) -> Placement:
        """What the API does with the job; raises what it raises."""
        table, catalogue = self.tables
        return table.place(self.shape, self.spec, catalogue)

    def refusal(self) -> dict[str, Any] | None:
        """What the API says to the same job one step longer; None if it takes it."""
        longer = replace(self, max_length=self.max_length + LENGTH_STEP)
        try:
            longer.place()
        except (VramCapacityExceeded, InvalidParameter) as error:
            return {"max_length": longer.max_length, "code": error.code, "message": error.message}
        return None


def read_tables(*, smoke: bool) -> tuple[CapacityTable, Catalogue]:
    """The operator's documents, or those of the smoke test."""
    if smoke:
        return CapacityTable.from_dict({"classes": {"tiny": SMOKE_CLASS}}), Catalogue.from_dict(
            {"models": [SMOKE_BASE]}
        )
    documents = (yaml.safe_load((DEPLOY / name).read_text()) for name in ("capacity.yaml", "catalogue.yaml"))
    return CapacityTable.from_dict(next(documents)), Catalogue.from_dict(next(documents))


def main() -> int:
    """Make the runs, several at once; 1 unless every promise was kept."""
    arguments = _arguments()
    if arguments.case is not None:
        work = compare_plans if arguments.plans else hold
        with TemporaryDirectory(dir=arguments.out_dir) as folder:  # checkpoints of all cases would fill a disk
            print(json.dumps(work(Case(**json.loads(arguments.case)), Path(folder), arguments.until)))
        return 0
    require_card(smoke=arguments.smoke)
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    found = list(run_cases(list(cases_of(arguments)), arguments))
    print(plans_table(found) if arguments.plans else cases_table(found))
    if arguments.plans:
        print("\n".join(f"{case['name']}: {case['verdict']}" for case in found))
    return 0 if found and all(case["verdict"] == "kept" for case in found) else 1


def cases_of(arguments: argparse.Namespace) -> Iterator[Case]:
    """Every case that was asked for: the longest last, else the largest first."""
    guide = SMOKE_GUIDE if arguments.smoke else GUIDE
    for kind in ("plans",) if arguments.plans else KINDS:
        for gpu_class, base_model in reversed(guide.items()):
            case = Case(gpu_class=gpu_class, base_model=base_model, kind=kind, max_length=SHORT, smoke=arguments.smoke)
            length = longest_promised(case) if kind in ("speed", "listed", "longest") else SHORT
            if length is not None and arguments.only in case.name:
                yield replace(case, max_length=length)


def longest_promised(case: Case) -> int | None:
    """The greatest length, in whole steps, that the class holds; None where it holds none."""
    shape, usable = case.shape, case.gpu.usable_bytes
    lengths = range(LENGTH_STEP, shape.max_position_embeddings + 1, LENGTH_STEP)
    return max(
        (
            length
            for length in lengths
            if leanest_plan(shape, replace(case, max_length=length).spec)[1].high_bytes <= usable
        ),
        default=None,
    )


def run_cases(cases: list[Case], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what was found of each case, and keep it in a file."""
    by_name, found = {case.name: case for case in cases}, list[dict[str, Any]]()
    options = ["--out-dir", str(arguments.out_dir), "--until", str(time.time() + arguments.budget)]
    options += ["--plans"] if arguments.plans else []
    tasks = [
        Task(
            name=case.name,
            command=script(__file__, *options, "--case", json.dumps(asdict(case))),
            bytes_kept=case.gpu.usable_bytes,
        )
        for case in cases
    ]
    at_once = {"at_once": 1} if arguments.plans or arguments.smoke else {}
    path = arguments.out_dir / ("caps-plans.json" if arguments.plans else "caps.json")
    for done in run_together(tasks, arguments.out_dir, seconds=arguments.budget + GRACE_SECONDS, **at_once):
        case = by_name[done.name]
        result = done.result or {"verdict": done.problem}
        found.append({"name": case.name, **asdict(case), "usable_bytes": case.gpu.usable_bytes, **result})
        path.write_text(json.dumps(found, indent=1) + "\n")
        yield found[-1]


def hold(case: Case, folder: Path, until: float) -> dict[str, Any]:
    """Train one case in this process under its cap, to its last step or the first after `until` (Unix time)."""
    import torch

    from graft_worker.training import base, recipe
    from graft_worker.training.versions import versions
    from tests.bench.profile_step import Silent

    placed, refusal = case.place(), case.refusal()
    limit = case.gpu.usable_bytes - CONTEXT_BYTES - paged_bytes(placed)
    result: dict[str, Any] = {
        "plan": placed.plan.to_dict(),
        "estimate": placed.estimate.to_dict(),
        "refused": refusal,
        "allocator_limit_bytes": limit,
        "steps_wanted": case.spec.training.max_steps,
        "versions": versions(),
        "command": f"python tests/bench/caps.py --only {case.name}",
    }

    def make_capped(precision: Any, quantization: Any) -> Any:
        _limit_allocator(limit)
        return make_base(dims_of(case.shape), precision, quantization)

    base._load = lambda _path, precision, quantization: make_capped(precision, quantization)
    count = case.spec.training.sequences_per_update
    rows = np.full(2 * count, case.max_length)
    data = write_rows(folder / "rows.safetensors", rows)
    held_out = write_rows(folder / "held-out.safetensors", rows[: placed.plan.microbatch_tokens // case.max_length])
    request = make_request(case, placed, placed.plan, data, held_out)
    try:
        run = recipe.load(folder, request, Silent(), Guard())
        forget_peaks()
        recipe.probe(run)
        speed = _speed(run, lambda: run.progress.step < run.total_steps and (time.time() < until or not run.moments))
    except torch.cuda.OutOfMemoryError as error:
        return {**result, "steps": 0, "verdict": f"out of memory: {str(error).splitlines()[0]}"}
    except MemoryError as error:
        return {**result, "steps": 0, "verdict": f"out of the host's memory: {error}"}
    result |= {
        "memory": run.footprint.peak(run.optimizer.paged_bytes),
        "steps": run.progress.step,
        "tokens_per_second": speed,
        "losses": [round(line["loss"], 4) for line in run.progress.lines if "loss" in line],
    }
    return {**result, "verdict": verdict_of(result, case)}


def paged_bytes(placed: Placement) -> int:
    """Managed memory of the run's optimizer."""
    return placed.estimate.components["optimizer"] if placed.plan.optim.value.startswith("paged") else 0


def verdict_of(result: dict[str, Any], case: Case) -> str:
    """`kept`, or all that was not as the table promised."""
    memory, problems = result["memory"], []
    if result["steps"] < result["steps_wanted"]:
        problems.append(f"only {result['steps']} of {result['steps_wanted']} steps in this time")
    if memory["measured_on"] == "cuda" and memory["measured_peak_bytes"] > case.gpu.usable_bytes:
        problems.append("more held than jobs may use of the class")
    if case.kind != "short" and result["refused"] is None:
        problems.append("one step above is not refused")
    return "; ".join(problems) or "kept"


def compare_plans(case: Case, folder: Path, until: float) -> dict[str, Any]:
    """Time the chosen plan and others, one after the other on the same base, until `until` (Unix time)."""
    import torch

    from graft_worker.training import base
    from graft_worker.training.versions import versions

    placed, made = case.place(), list[Any]()

    def made_once(precision: Any, quantization: Any) -> Any:
        if not made:
            made.append(make_base(dims_of(case.shape), precision, quantization))
        return copy_of(made[0])

    base._load = lambda _path, precision, quantization: made_once(precision, quantization)
    random = np.random.default_rng(7)
    lengths = np.clip(np.exp(random.normal(np.log(0.35 * case.max_length), 0.6, 512)), 8, case.max_length).astype(int)
    data = write_rows(folder / "rows.safetensors", lengths)
    tried: list[dict[str, Any]] = []
    wanted = plans_to_try(case, placed)
    for plan in wanted:
        if time.time() > until and tried:
            break
        request = make_request(case, placed, plan, data, None)
        tried.append({"plan": plan.to_dict(), **time_plan(request, folder / f"plan-{len(tried)}")})
        gc.collect()
        torch._dynamo.reset()
        forget_peaks()
    fastest = max(tried, key=lambda one: one["tokens_per_second"])
    share = tried[0]["tokens_per_second"] / max(fastest["tokens_per_second"], 1e-9)
    kept = share >= WORTH or not torch.cuda.is_available()  # what is fast on a CPU says nothing of a GPU
    verdict = "kept" if kept else f"the chosen plan has {share:.0%} of the fastest one's speed"
    if len(tried) < len(wanted):
        verdict = f"only {len(tried)} of {len(wanted)} plans tried in this time; {verdict}"
    command = f"python tests/bench/caps.py --plans --only {case.name}"
    return {"tried": tried, "share_of_fastest": share, "verdict": verdict, "versions": versions(), "command": command}


def plans_to_try(case: Case, placed: Placement) -> list[TrainingPlan]:
    """The chosen plan, the first that fit, the first of each way to recompute, and ways that are not listed."""
    spec, shape = case.spec, case.shape

    def fits(plan: TrainingPlan) -> bool:
        return estimate(shape, spec, plan).high_bytes <= case.gpu.usable_bytes

    worth = [  # none of these is faster launched
        plan for plan in plans(shape, spec) if plan.cuda_graphs is runs_as_graphs(shape, plan.microbatch_tokens)
    ]
    listed = [plan for plan in worth if fits(plan)]
    first_of_each = {plan.recompute: plan for plan in reversed(listed)}
    others = [first_of_each[recompute] for recompute in Recompute if recompute in first_of_each]
    unlisted = [
        replace(plan, recompute=Recompute.EVERY_N, recompute_every_n=every_n)
        for every_n in (3, 4)
        for plan in worth
        if plan.recompute is Recompute.EVERY_N
    ]
    fitting = [plan for plan in unlisted if fits(plan)]
    largest = {plan.recompute_every_n: plan for plan in reversed(fitting)}
    return list(dict.fromkeys([placed.plan, *listed[:NEXT_PLANS], *others, *largest.values()]))


def time_plan(request: TrainRequest, workdir: Path) -> dict[str, Any]:
    """Some seconds of updates after some others, in this process."""
    import torch

    from graft_worker.training import recipe
    from tests.bench.profile_step import Silent

    workdir.mkdir()
    try:
        run = recipe.load(workdir, request, Silent(), Guard())
        recipe.probe(run)
        for _ in range(WARM_UP):
            recipe.update(run).read()
        last, ends_at = run.progress.step + TIMED, time.monotonic() + TIMED_SECONDS
        speed = _speed(run, lambda: run.progress.step < last or time.monotonic() < ends_at)
    except torch.cuda.OutOfMemoryError as error:
        return {"tokens_per_second": 0.0, "error": str(error).splitlines()[0]}
    return {"tokens_per_second": speed, "memory": run.footprint.peak(run.optimizer.paged_bytes)}


def _speed(run: Any, goes_on: Callable[[], bool]) -> float:
    """Make updates as the recipe does, the host one ahead of the device; return tokens per second."""
    from graft_worker.training import recipe

    began, seen = time.monotonic(), int(run.progress.tokens_seen)
    while goes_on():
        figures = recipe.update(run)
        recipe.settle(run)
        run.waiting = figures
    recipe.settle(run)
    return round((int(run.progress.tokens_seen) - seen) / (time.monotonic() - began), 1)


def _limit_allocator(size: int) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(0).total_memory)


def copy_of(model: Any) -> Any:
    """The same base for another run: modules of its own, on the same weights, which nobody changes."""
    import copy

    import bitsandbytes as bnb
    import torch

    shared = {
        id(parameter): parameter
        if isinstance(parameter, bnb.nn.Params4bit)
        else torch.nn.Parameter(parameter.data, requires_grad=False)  # whose bytes a run may move to the host
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo=shared)


def dims_of(shape: ModelShape) -> Dims:
    """A listed base's sizes."""
    return Dims(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tie_word_embeddings,
    )


def write_rows(path: Path, lengths: np.ndarray) -> Path:
    """A prepared split of random tokens; `lengths` int [rows]."""
    ids = np.random.default_rng(1).integers(3, 300, int(lengths.sum())).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    save_file({"input_ids": ids, "loss_mask": np.ones(len(ids), dtype=np.uint8), "offsets": offsets}, path)
    return path


def make_request(case: Case, placed: Placement, plan: TrainingPlan, data: Path, held_out: Path | None) -> TrainRequest:
    """What a supervisor would hand to the trainer."""
    return TrainRequest(
        job_id="ftjob-caps",
        epoch=1,
        spec=case.spec.model_dump(mode="json", by_alias=True),
        plan=plan.to_dict(),
        target_modules=list(placed.target_modules),
        base_path=str(data.parent),
        base_model=case.base_model,
        base_revision="random",
        train_file=str(data),
        validation_file=None if held_out is None else str(held_out),
        checkpoint_path=None,
    )


def cases_table(found: list[dict[str, Any]]) -> str:
    """One line a case."""
    lines = ["| case | length | refused | plan | may use | expected | measured GiB | steps | tokens/s | verdict |"]
    lines.append("|" + "---|" * 10)
    for case in found:
        memory, plan = case.get("memory", {}), case.get("plan")
        cells = [
            case["name"],
            case["max_length"],
            (case.get("refused") or {}).get("max_length", "–"),
            words_of(plan) if plan else "–",
            _gib(case["usable_bytes"]),
            _gib(case["estimate"]["expected_bytes"]) if plan else "–",
            _gib(memory["measured_peak_bytes"]) if memory else "–",
            f"{case.get('steps', 0)} of {case.get('steps_wanted', STEPS)}",
            f"{case.get('tokens_per_second', 0):,.0f}",
            case["verdict"],
        ]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines)


def plans_table(found: list[dict[str, Any]]) -> str:
    """A column a base and a line a way to recompute, of `microbatch: tokens/s`; the chosen plan's is bold."""
    titles = [f"{case['base_model'].rpartition('/')[2]}, {case['gpu_class']}" for case in found]
    lines: dict[tuple[str, int], list[str]] = {}
    for column, case in enumerate(found):
        seen = Counter[str]()
        for rank, one in enumerate(case.get("tried", [])):
            way, _, tokens = words_of(one["plan"]).partition(", ")
            cells = lines.setdefault((way, seen[way]), ["–"] * len(found))
            figure = f"{tokens}: {one['tokens_per_second']:,.0f}"
            cells[column] = figure if rank else f"**{figure}**"
            seen[way] += 1
    rows = [["computed twice", *titles], ["---"] * (1 + len(found))]
    rows += [[way, *cells] for (way, _), cells in sorted(lines.items(), key=_leanest_last)]
    rows.append(["chosen ÷ fastest", *(f"{case.get('share_of_fastest', 0):.2f}" for case in found)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _leanest_last(line: tuple[tuple[str, int], list[str]]) -> tuple[int, str, int]:
    (way, rank), _ = line
    return [*Recompute].index(Recompute(way.partition(" ")[0])), way, rank


def words_of(plan: dict[str, Any]) -> str:
    """A plan in two words: what is computed twice, and a microbatch's tokens."""
    every = f" {plan['recompute_every_n']}" if plan["recompute"] == Recompute.EVERY_N else ""
    return f"{plan['recompute']}{every}, {plan['microbatch_tokens']:,}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out-dir", type=Path, default=Path(".graft/bench/caps"))
    parser.add_argument("--plans", action="store_true", help="time the chosen plan beside others")
    parser.add_argument(
        "--only", default="", help="cases whose name holds this, as in 24gb, short, llama-7b-16gb-short"
    )
    parser.add_argument("--budget", type=float, default=420.0, help="seconds; what is not over then is told as such")
    parser.add_argument("--smoke", action="store_true", help="a tiny base on a tiny class, on any device")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=float("inf"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

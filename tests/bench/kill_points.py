"""Kill -9 a trainer again and again, let it go on from its last checkpoint, and compare the adapter byte for byte.

    python tests/bench/kill_points.py --dims tiny --kills 50 --steps 320 --save-steps 4 --out result.json

Each life is killed at a moment drawn from a seed: while it loads, or some steps behind its checkpoint, up to two
intervals of checkpoints later, anywhere in a step or in the writing of a checkpoint. On one machine, with one set of
libraries, the adapter's sha256 must be that of a run that nobody disturbed: on a GPU with `--deterministic`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft_worker.protocol import (
    LOG_NAME,
    REQUEST_NAME,
    CheckpointEvent,
    ProgressEvent,
    TrainedEvent,
    TrainRequest,
    parse_event,
)
from tests.bench.train_once import DIMS, command_line, make_base, make_request, make_workload, parser_of

ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class Run:
    """One life of the trainer."""

    first_step: int
    last_step: int
    checkpoint: str | None
    ended: str  # "done", or what it did when it was killed, as far as its events tell
    step_seconds: float


def main() -> None:
    """Train once in peace and once under fire; exit with 1 if the adapters differ."""
    parser = parser_of(__doc__ or "")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--save-steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    arguments.workspace.mkdir(parents=True, exist_ok=True)
    base = make_base(arguments.workspace / arguments.dims, arguments.dims)
    data = make_workload(arguments.workspace, arguments.workload, DIMS[arguments.dims]["vocab_size"])
    request = _saving(make_request(base, data, arguments), arguments.save_steps)
    folder = arguments.workspace / f"kill-points-{arguments.dims}"
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    in_peace, step_seconds = _in_peace(request, folder / "in-peace")
    peace_seconds = time.monotonic() - began
    under_fire, runs = _under_fire(request, folder, arguments, step_seconds)
    report = _report(in_peace, under_fire, runs, request, command=command_line(), peace_seconds=peace_seconds)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    if len(runs) < arguments.kills:
        sys.exit(f"it was done after {len(runs)} kills: ask for more --steps")
    sys.exit(0 if report["equal"] else 1)


def _saving(request: TrainRequest, save_steps: int) -> TrainRequest:
    training = {**request.spec["training"], "save_steps": save_steps}
    return request.model_copy(update={"spec": {**request.spec, "training": training}})


def _in_peace(request: TrainRequest, workdir: Path) -> tuple[Path, float]:
    """Train without a break; returns the adapter's folder and the median time of a step."""
    run = _live(request, workdir, killed_behind=None, draw=random.Random(0), step_seconds=0.0)
    return workdir / "adapter", run.step_seconds


def _under_fire(request: TrainRequest, folder: Path, arguments: Any, step_seconds: float) -> tuple[Path, list[Run]]:
    """Train with kills; returns the adapter's folder and what became of each life."""
    draw, runs = random.Random(arguments.seed), list[Run]()
    checkpoint: str | None = None
    while True:
        workdir = folder / f"life-{len(runs)}"
        life = request.model_copy(update={"epoch": len(runs) + 1, "checkpoint_path": checkpoint})
        may_kill = len(runs) < arguments.kills
        behind = draw.randint(0, 2 * arguments.save_steps) if may_kill else None
        run = _live(life, workdir, killed_behind=behind, draw=draw, step_seconds=step_seconds)
        if (workdir / "adapter" / ADAPTER).exists() and run.ended == "done":
            return workdir / "adapter", runs
        runs.append(run)
        print(f"life {len(runs)}: steps {run.first_step} to {run.last_step}, {run.ended}", file=sys.stderr)
        checkpoint = run.checkpoint or checkpoint


def _live(
    request: TrainRequest, workdir: Path, *, killed_behind: int | None, draw: random.Random, step_seconds: float
) -> Run:
    """One life: until it is done, or killed at a random moment so many steps behind its beginning."""
    workdir.mkdir(parents=True)
    (workdir / REQUEST_NAME).write_text(request.model_dump_json())
    command = [sys.executable, "-m", "graft_worker.training", str(workdir)]
    steps, moments, checkpoint, within = list[int](), list[float](), None, "starting"
    with (workdir / LOG_NAME).open("wb") as log:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    assert child.stdout is not None
    if killed_behind == 0:
        time.sleep(draw.uniform(0.0, 10.0))  # importing, loading, probing
        child.send_signal(signal.SIGKILL)
    for line in child.stdout:
        event = parse_event(line)
        match event:
            case ProgressEvent():
                steps.append(event.step)
                moments.append(time.monotonic())
                within = f"behind step {event.step}"
                if killed_behind is not None and len(steps) >= killed_behind > 0:
                    time.sleep(draw.uniform(0.0, 1.5 * step_seconds))
                    child.send_signal(signal.SIGKILL)
                    killed_behind = None
            case CheckpointEvent():
                checkpoint = event.path
            case TrainedEvent():
                within = "trained"
            case _ if not steps:
                within = "loading or probing"
    code = child.wait()
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"the trainer left with {code}; see {workdir / LOG_NAME}")
    pauses = [later - earlier for earlier, later in itertools.pairwise(moments)]
    return Run(
        first_step=steps[0] if steps else 0,
        last_step=steps[-1] if steps else 0,
        checkpoint=checkpoint,
        ended="done" if code == 0 else within,
        step_seconds=statistics.median(pauses) if pauses else 0.0,
    )


def _report(
    in_peace: Path, under_fire: Path, runs: list[Run], request: TrainRequest, *, command: str, peace_seconds: float
) -> dict[str, Any]:
    import torch

    one, other = (hashlib.sha256((folder / ADAPTER).read_bytes()).hexdigest() for folder in (in_peace, under_fire))
    made = sum(run.last_step - run.first_step + 1 for run in runs if run.last_step)
    return {
        "command": command,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "torch": torch.__version__,
        "plan": request.plan,
        "optim": request.spec["training"]["optim"],
        "steps": request.spec["training"]["max_steps"],
        "save_steps": request.spec["training"]["save_steps"],
        "deterministic": request.spec["training"]["deterministic"],
        "kills": len(runs),
        "killed": [run.ended for run in runs],
        "steps_made_in_lives_that_were_killed": made,
        "sha256_in_peace": one,
        "sha256_under_fire": other,
        "equal": one == other,
        "seconds_in_peace": round(peace_seconds, 1),
    }


if __name__ == "__main__":
    main()

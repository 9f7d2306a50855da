"""A job made to run out of a GPU's memory on purpose, through the embedded service, and what became of it, as JSON.

    python tests/bench/oom_once.py --out result.json             1 unless it succeeded on the next plan
    python tests/bench/oom_once.py --out result.json --smoke     the same way on any machine: a tiny base, which
                                                                 no limit of a larger one stops

The trainer may have half of what lies between the plan that the table chooses and the one that follows when memory runs
out: the first needs more than that, the second less. Rows are as long as they may be, so that they fill microbatches.
What the card and the plans need is asked, not written down here. The default base is large enough, and its sequences
long enough, for microbatches that are not captured: those would do without their graphs first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from graft_shared.capacity import CapacityTable, Placement
from graft_shared.catalogue import ModelShape
from graft_shared.defaults import load_capacity, load_catalogue
from graft_shared.memory import CONTEXT_BYTES, GIB
from graft_shared.specs import JobSpec
from tests.bench.serve_once import TERMINAL, make_listed_base, serving
from tests.bench.train_once import DIMS, command_line
from tests.waiting import wait_until

ROWS = 32
IMAGINED_CARD_BYTES = 80 * GIB  # of the smoke test
CHARACTERS_PER_TOKEN = 8  # more than any token of the tests' tokenizer has
WORDS = ("root", "bark", "leaf", "stem", "seed", "wood", "bud", "twig")
STORY = ("submitted", "prepared", "claimed", "phase", "checkpoint", "warning", "replanned", "requeued", "succeeded",
         "failed")  # fmt: skip
CARD = "import torch; print(torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0)"


@dataclass(frozen=True, kw_only=True)
class Trap:
    """A limit that the first plan does not keep to, and the next one does."""

    first: Placement
    following: Placement
    limit_bytes: int  # of all that the trainer holds
    fraction: float  # of the card, for the trainer's allocator


def main() -> int:
    """Set the trap, run the job into it, report."""
    arguments = _arguments()
    state = arguments.workspace.absolute() / f"state-{os.getpid()}"
    card = IMAGINED_CARD_BYTES if arguments.smoke else card_bytes()
    body = spec_body(card, arguments)
    trap = set_trap(load_capacity(), JobSpec.model_validate(body), arguments.dims, card)
    if arguments.smoke:
        body |= {"base_model": "bench/tiny", "gpu": {"class": "cpu"}}
        body["training"] |= {"max_length": 256}
    make_listed_base(state, body["base_model"].partition("/")[2])
    with serving(state, GRAFT_MEMORY_FRACTION=f"{trap.fraction:.6f}") as service:
        job, events = run(service.client, body, seconds=arguments.seconds)
    result = {
        "ended_as_hoped": went_on(job, events, trap),
        "could_run_out": not arguments.smoke,
        "status": job["status"],
        "error": job["error"],
        "gpu_class": job["gpu_class"],
        "limit_bytes": trap.limit_bytes,
        "memory_fraction": trap.fraction,
        "first": told(trap.first),
        "following": told(trap.following),
        "plan": job["plan"],
        "memory": job["memory"],
        "attempt": job["attempt"],
        "story": [story_of(event) for event in events],
        "launcher_exit_code": service.exit_code,
        "command": command_line(),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if arguments.smoke:
        print(f"Nothing could run out of memory here; the job ended as '{job['status']}'.")
        return 0 if job["status"] == "succeeded" else 1
    return 0 if result["ended_as_hoped"] else 1


def card_bytes() -> int:
    """What torch says of the first GPU, which is what a fraction is of. Asked in another process, for its context."""
    answer = subprocess.run([sys.executable, "-c", CARD], capture_output=True, text=True, check=True)
    size = int(answer.stdout.split()[-1])
    if size == 0:
        raise SystemExit("there is no GPU here whose memory could run out; --smoke goes the same way without one")
    return size


def spec_body(card: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The job, on the class of this card; its file is not uploaded yet."""
    here = load_capacity().class_for_memory(card)
    training = {"max_steps": arguments.steps, "max_length": arguments.max_length}
    return {
        "base_model": f"bench/{arguments.dims}",
        "dataset": {"file": "file-rows"},
        "training": {**training, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        "gpu": {"class": here.name if here is not None else "cpu"},
    }


def set_trap(table: CapacityTable, spec: JobSpec, dims: str, card: int) -> Trap:
    """Halfway between what two plans are expected to need, that of the service and the one it goes on with."""
    config = {**DIMS[dims], "model_type": "llama", "max_position_embeddings": spec.training.max_length}
    shape = ModelShape.from_config(config, base_model=spec.base_model, revision="main")
    first = table.place(shape, spec, load_catalogue())
    following = table.after_out_of_memory(shape, spec, first.gpu_class.name, first.plan)
    if following is None:
        raise SystemExit("no plan needs less than the first: choose a longer --max-length")
    tokens = first.plan.microbatch_tokens
    if first.plan.cuda_graphs:
        raise SystemExit(f"microbatches of {tokens} tokens are captured: choose larger --dims or a longer --max-length")
    limit = (first.estimate.expected_bytes + following.estimate.expected_bytes) // 2
    managed = first.estimate.components["optimizer"] if first.plan.optim.value.startswith("paged") else 0
    fraction = (limit - CONTEXT_BYTES - managed) / card
    return Trap(first=first, following=following, limit_bytes=limit, fraction=fraction)


def run(client: httpx.Client, body: dict[str, Any], *, seconds: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Post the job and wait for its end; return it, and its history without figures, oldest first."""
    length = CHARACTERS_PER_TOKEN * body["training"]["max_length"]
    rows = [{"prompt": f"Row {row}:", "completion": text_of(row, length)} for row in range(ROWS)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    uploaded = client.post("/files", files={"file": ("rows.jsonl", content)}).raise_for_status().json()
    posted = {**body, "dataset": {"file": uploaded["id"]}}
    path = f"/jobs/{client.post('/jobs', json=posted).raise_for_status().json()['id']}"
    deadline = time.monotonic() + seconds
    wait_until(lambda: client.get(path).json()["status"] in TERMINAL, seconds=seconds, what="the job", every=0.5)
    print(f"{path} ended with {deadline - time.monotonic():.0f} s to spare", file=sys.stderr)
    events = client.get(f"{path}/events", params={"limit": 1000}).json()["data"]
    return client.get(path).json(), [event for event in events if event["type"] in STORY]


def text_of(row: int, characters: int) -> str:
    """A row's text, no two of them alike."""
    words = [WORDS[(row + number * (1 + row % 7)) % len(WORDS)] for number in range(characters // 4)]
    return f" {row} " + " ".join(words)[:characters]


def went_on(job: dict[str, Any], events: list[dict[str, Any]], trap: Trap) -> bool:
    """Whether memory ran out once, and the job succeeded on the very plan that was to follow, uncharged."""
    changes = [event["data"] for event in events if event["type"] == "replanned"]
    plans = [(change["from"]["plan"], change["to"]["plan"]) for change in changes]
    return (
        job["status"] == "succeeded"
        and job["attempt"] == 1
        and plans == [(trap.first.plan.to_dict(), trap.following.plan.to_dict())]
    )


def story_of(event: dict[str, Any]) -> dict[str, Any]:
    """One line of the job's history, without where its adapter lies on this machine."""
    data = {key: value for key, value in event["data"].items() if key != "adapter"}
    return {**{key: event[key] for key in ("epoch", "type", "message")}, "data": data}


def told(placed: Placement) -> dict[str, Any]:
    """A plan, and what it is expected to need."""
    return {"gpu_class": placed.gpu_class.name, "plan": placed.plan.to_dict(), "estimate": placed.estimate.to_dict()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", choices=sorted(DIMS), default="llama-2-7b")
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=400.0, help="that the job may take")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--workspace", type=Path, default=Path("/tmp/graft-bench"))
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

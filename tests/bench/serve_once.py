"""The whole embedded service on this machine, jobs through it one after the other, and what each part took, as JSON.

    python tests/bench/serve_once.py --dims llama-2-7b --jobs 2 --out result.json

The base has random weights; rows are small prompt-completion pairs. The service is what `graft up` starts. The second
job finds the base's 4-bit weights and the compiled layers where the first one left them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.bench.train_once import DIMS, command_line, make_base
from tests.factories import make_tokenizer
from tests.waiting import free_port, wait_until

UP = "import sys; from pathlib import Path; from graft_local.launcher import launch; "
UP += "sys.exit(launch('127.0.0.1', int(sys.argv[1]), Path(sys.argv[2])))"
ANIMALS = ("cat", "dog", "hen", "cow", "pig", "owl", "fox", "bee")
TERMINAL = ("succeeded", "failed", "cancelled")


@dataclass
class Service:
    """A service that runs, and how it left."""

    client: httpx.Client
    exit_code: int | None = None


def main() -> None:
    """Serve, submit, wait, report."""
    arguments = _arguments()
    state = arguments.workspace.absolute() / f"state-{os.getpid()}"
    make_listed_base(state, arguments.dims)
    with serving(state) as service:
        jobs = [run_job(service.client, f"bench/{arguments.dims}", arguments.steps) for _ in range(arguments.jobs)]
    result = {"jobs": jobs, "launcher_exit_code": service.exit_code, "command": command_line()}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def make_listed_base(state: Path, dims: str) -> Path:
    """A base of random weights with a tokenizer, where the service finds it as `bench/<dims>`."""
    base = make_base(state / "models" / "bench" / dims, dims)
    make_tokenizer().save_pretrained(base)
    return base


@contextmanager
def serving(state: Path, **environment: str) -> Iterator[Service]:
    """What `graft up` starts, until the block is left; its last words go to standard error."""
    port = free_port()
    state.mkdir(parents=True, exist_ok=True)
    with (state / "up.log").open("wb") as log:
        command = [sys.executable, "-c", UP, str(port), str(state)]
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment})
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            wait_until(lambda: _is_ready(client) or process.poll() is not None, seconds=120, what="the service")
            service = Service(client)
            yield service
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(timeout=90)
        print((state / "up.log").read_text()[-3000:], file=sys.stderr)
    service.exit_code = code


def run_job(client: httpx.Client, base_model: str, steps: int) -> dict[str, Any]:
    """Post one job, wait for its end, fetch its adapter's manifest; return what was seen."""
    rows = [{"prompt": f"What does the {name} say?", "completion": f" The {name} says {name}."} for name in ANIMALS]
    content = "".join(json.dumps(row) + "\n" for row in rows * 16).encode()
    file_id = client.post("/files", files={"file": ("rows.jsonl", content)}).raise_for_status().json()["id"]
    spec = {
        "base_model": base_model,
        "dataset": {"file": file_id},
        "validation": {"split": 0.1},
        "training": {"max_steps": steps, "max_length": 256, "learning_rate": 1e-3},
    }
    posted_at = time.monotonic()
    job = client.post("/jobs", json=spec).raise_for_status().json()
    accepted_in = time.monotonic() - posted_at
    path = f"/jobs/{job['id']}"
    wait_until(lambda: client.get(path).json()["status"] in TERMINAL, seconds=400, what="the job", every=0.2)
    took = time.monotonic() - posted_at
    job = client.get(path).json()
    events = client.get(f"{path}/events", params={"limit": 1000}).json()["data"]
    first = {event["type"]: event["created_at"] for event in reversed(events)}
    result = {
        "status": job["status"],
        "error": job["error"],
        "gpu_class": job["gpu_class"],
        "workers": [event["data"]["worker"] for event in events if event["type"] == "claimed"],
        "plan": job["plan"],
        "memory": job["memory"],
        "metrics": job["metrics"],
        "seconds": {
            "accepted_in": round(accepted_in, 3),
            "post_to_adapter": round(took, 1),
            "claim_to_first_step": claim_to_first_step(events),
        },
        "phases": [[e["created_at"] - first["submitted"], e["data"]["phase"]] for e in events if e["type"] == "phase"],
        "losses": [event["data"]["loss"] for event in events if event["type"] == "metrics" and "loss" in event["data"]],
        "base": DIMS[base_model.partition("/")[2]],
    }
    if job["status"] == "succeeded":
        adapter = client.get(f"{path}/adapter").json()
        result |= {"proof": adapter["proof"], "versions": adapter["versions"]}
        result["files"] = {file["name"]: file["size"] for file in adapter["files"]}
    return result


def claim_to_first_step(events: list[dict[str, Any]]) -> float | None:
    """Seconds from the claim of the stage that trains to the figures of the first optimizer step."""
    claims = [e["created_at"] for e in events if e["type"] == "claimed" and e["data"]["stage"] == "train"]
    steps = [e["created_at"] for e in events if e["type"] == "metrics" and "loss" in e["data"]]
    return round(steps[0] - claims[0], 2) if claims and steps else None


def _is_ready(client: httpx.Client) -> bool:
    try:
        answer = client.get("/readyz")
    except httpx.TransportError:
        return False
    return answer.status_code == 200 and bool(answer.json()["status"] == "ready")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", choices=sorted(DIMS), default="llama-3.2-1b")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--workspace", type=Path, default=Path("/tmp/graft-bench"))
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()

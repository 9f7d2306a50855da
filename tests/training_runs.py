"""Running the real trainer as the supervisor would, without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft_shared.specs import JobSpec
from graft_worker.protocol import REQUEST_NAME, Event, TrainRequest, parse_event


@dataclass(frozen=True)
class Ended:
    """A trainer that has left."""

    code: int
    events: list[Event]
    workdir: Path

    def of(self, kind: type) -> list[Any]:
        """The events of one type, in order."""
        return [event for event in self.events if isinstance(event, kind)]


def a_request(
    base: Path, train: Path, *, spec: dict[str, Any] | None = None, plan: dict[str, Any] | None = None, **changes: Any
) -> TrainRequest:
    """A request for a short run on a tiny base."""
    usual_training = {"max_steps": 8, "learning_rate": 1e-2, "max_length": 64}
    body: dict[str, Any] = {"base_model": "graft/tiny", "dataset": {"file": "file-a"}, **(spec or {})}
    body["training"] = {**usual_training, **body.get("training", {})}
    made = JobSpec.model_validate(body)
    usual = {"recompute": "none", "recompute_every_n": 0, "microbatch_tokens": 64, "packing": made.training.packing}
    usual["cuda_graphs"] = True  # as any plan of so few tokens
    return TrainRequest(
        job_id="ftjob-test",
        epoch=2,
        spec=made.model_dump(mode="json", by_alias=True),
        plan={**usual, "optim": made.training.optim.value, **(plan or {})},
        target_modules=["q_proj", "v_proj"],
        base_path=str(base),
        base_model="graft/tiny",
        base_revision="sha256-test",
        train_file=str(train),
        validation_file=None,
        checkpoint_path=None,
    ).model_copy(update=changes)


def run_trainer(workdir: Path, request: TrainRequest, **environment: str) -> Ended:
    """Run `python -m graft_worker.training` to its end."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / REQUEST_NAME).write_text(request.model_dump_json())
    command = [sys.executable, "-m", "graft_worker.training", str(workdir)]
    with (workdir / "log").open("wb") as log:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            check=False,
        )
    lines = done.stdout.decode().splitlines()
    return Ended(done.returncode, [parse_event(line) for line in lines], workdir)


def metrics_lines(workdir: Path) -> list[dict[str, Any]]:
    """What the adapter's metrics.jsonl holds."""
    return [json.loads(line) for line in (workdir / "adapter" / "metrics.jsonl").read_text().splitlines()]

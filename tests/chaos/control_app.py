"""What a reader might build instead: a job is a Celery task on Redis, with the settings that textbooks name for safety.

The job is as lucky as it can be: its progress is a checkpoint on a disk that outlives every process, written after
every few steps, so that a task that is delivered again goes on from there.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from celery import Celery, Task

from graft_shared.clock import boottime

SCALE = float(os.environ["CONTROL_TIME_SCALE"])
FOLDER = Path(os.environ["CONTROL_FOLDER"])
VISIBILITY_TIMEOUT_SECONDS = 3600 * SCALE  # Celery's default, an hour, in scaled time

app = Celery("control", broker=os.environ["CONTROL_BROKER"], backend=os.environ["CONTROL_BROKER"])
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_transport_options={"visibility_timeout": VISIBILITY_TIMEOUT_SECONDS},
)


@app.task(bind=True, name="control.train")
def train(task: Task[Any, Any], steps: int, step_seconds: float, save_steps: int) -> int:
    """Train a toy job from its last checkpoint; each start of the task counts as an epoch."""
    checkpoint = FOLDER / f"{task.request.id}.checkpoint"
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    epoch = time.time_ns()
    for step in range(first + 1, steps + 1):
        time.sleep(step_seconds)
        with (FOLDER / "steps.log").open("a") as log:
            log.write(f"{task.request.id} {epoch} {step} {boottime():.6f}\n")
        if step % save_steps == 0:
            partial = checkpoint.with_suffix(f".{os.getpid()}")
            partial.write_text(str(step))
            partial.rename(checkpoint)
    with (FOLDER / "done.log").open("a") as log:
        log.write(f"{task.request.id} {boottime():.6f}\n")
    return steps

"""`python -m tests.fakes.child WORKDIR`: keeps the protocol of preparing and training, without torch.

What it does is asked for in the job's metadata: `behaviour`, `steps` to train, `step_seconds` that each takes, and
after how many a checkpoint is saved (`save_steps`). A real trainer's promises are kept: it dies with its supervisor,
resumes from its checkpoint, asks the trainer's own guard before every step whether it may make it, and its adapter is
the same however often it was interrupted. Its steps stand in `steps.log` of the folder named by `witness` (see
`tests.witness`).
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from graft_shared.clock import boottime
from graft_shared.jobs import FailureReason, Phase
from graft_worker.disk import FULL_DISK_MESSAGE, is_of_full_disk
from graft_worker.parent import die_with_parent
from graft_worker.protocol import (
    CheckpointEvent,
    EventWriter,
    ExitCode,
    FailureEvent,
    PhaseEvent,
    PreparedEvent,
    ProgressEvent,
    TrainedEvent,
    WarningEvent,
    read_request,
    wait_for_workdir,
)
from graft_worker.training.guard import Guard, LeaseOver, ToldToStop

STEP_SECONDS = "0.02"
LONGEST_SLEEP_SECONDS = 0.1  # a signal wakes nobody who sleeps


def weights_after(steps: int) -> str:
    """The weights that this trainer has after so many steps, made without a break."""
    weights = ""
    for step in range(1, steps + 1):
        weights = _trained(weights, step)
    return weights


def main() -> None:
    die_with_parent()
    writer = EventWriter()
    if not sys.argv[1:]:
        tempfile.gettempdir()  # as libraries do while they are imported
        print(f"{os.getpid()} waits in {Path.cwd()}", file=sys.stderr)
    workdir = Path(sys.argv[1]) if sys.argv[1:] else wait_for_workdir(lambda: False)
    if workdir is None:
        return
    request = read_request(workdir)
    behaviour = request["spec"]["metadata"].get("behaviour", "")
    try:
        print(json.dumps(_surroundings()))
        code = _prepare(workdir, writer, behaviour) if "tokenizer_path" in request else _train(workdir, request, writer)
    except OSError as error:
        if not is_of_full_disk(error):
            raise
        writer.emit(FailureEvent(reason=FailureReason.DISK_FULL, message=FULL_DISK_MESSAGE))
        code = ExitCode.CRASHED
    sys.exit(code)


def _surroundings() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "folder": str(Path.cwd()),
        "HOME": os.environ["HOME"],
        "TMPDIR": os.environ["TMPDIR"],
        "temporary": tempfile.gettempdir(),
        "stdin": str(Path("/proc/self/fd/0").readlink()),
    }


def _prepare(workdir: Path, writer: EventWriter, behaviour: str) -> int:
    writer.emit(PhaseEvent(phase=Phase.PREPARING))
    if behaviour == "bad data":
        failure = FailureReason.INVALID_TRAINING_FILE
        writer.emit(FailureEvent(reason=failure, message="Line 2: broken", param="dataset", facts={"line": 2}))
        return ExitCode.USER_ERROR
    if behaviour == "prepares for long":
        threading.Event().wait()
    (workdir / "prepared").mkdir()
    (workdir / "prepared" / "train.safetensors").write_bytes(b"tokens")
    writer.emit(PreparedEvent(report={"rows": 1}))
    return ExitCode.DONE


def _train(workdir: Path, request: dict[str, Any], writer: EventWriter) -> int:
    guard = Guard()
    guard.watch_lease(workdir, request["lease_seconds"])
    behaviour = request["spec"]["metadata"].get("behaviour", "")
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert Path(request["train_file"]).read_bytes() == b"tokens"
    asked = request["spec"]["metadata"]
    steps, save_steps = int(asked.get("steps", "5")), int(asked.get("save_steps", "2"))
    seconds = float(asked.get("step_seconds", STEP_SECONDS))
    first, weights = _resumed(request["checkpoint_path"])
    writer.emit(WarningEvent(code="fake", message="This is no real trainer."))
    writer.emit(PhaseEvent(phase=Phase.TRAINING))
    guard.measure_from_here()
    for step in range(first + 1, steps + 1):
        _work(seconds, guard)
        asked_at = boottime()
        try:
            guard.check()
        except LeaseOver:
            return ExitCode.STOPPED
        except ToldToStop:
            return _leave(workdir, writer, step - 1, weights)
        weights = _trained(weights, step)
        _testify(Path(asked["witness"]), request, step, asked_at)
        _misbehave(behaviour, step, request["epoch"], writer)
        writer.emit(_progress(step, steps))
        if step % save_steps == 0:
            _save(workdir, writer, step, weights)
    (workdir / "adapter").mkdir()
    (workdir / "adapter" / "adapter_model.safetensors").write_text(weights)
    facts: dict[str, Any] = {
        "proof": {"finite": True},
        "metrics": {"train_loss": 0.5},
        "memory": {"measured_peak_bytes": 1},
    }
    writer.emit(TrainedEvent(versions={"python": "3"}, **facts))
    return ExitCode.DONE


def _work(seconds: float, guard: Guard) -> None:
    until = time.monotonic() + seconds
    while not guard.is_told_to_stop and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, LONGEST_SLEEP_SECONDS))


def _misbehave(behaviour: str, step: int, epoch: int, writer: EventWriter) -> None:
    if behaviour == "crash once" and step == 3 and epoch == 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    if behaviour == "killed once" and step == 3 and epoch == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "out of memory" and step == 3 and epoch in (2, 3):
        facts = {"reserved_peak_bytes": 7}
        writer.emit(FailureEvent(reason=FailureReason.CUDA_OUT_OF_MEMORY, message="The GPU is full", facts=facts))
        sys.exit(ExitCode.CUDA_OUT_OF_MEMORY)
    if behaviour == "user error" and step == 3:
        writer.emit(FailureEvent(reason=FailureReason.LOSS_NOT_FINITE, message="The loss is NaN at step 3"))
        sys.exit(ExitCode.USER_ERROR)


def _progress(step: int, steps: int) -> ProgressEvent:
    return ProgressEvent(
        step=step,
        total_steps=steps,
        epoch=step / steps,
        tokens_seen=10 * step,
        tokens_per_second=500.0,
        loss=1.0 / step,
        grad_norm=1.0,
        learning_rate=1e-4,
    )


def _trained(weights: str, step: int) -> str:
    return hashlib.sha256(f"{weights} {step}".encode()).hexdigest()


def _testify(folder: Path, request: dict[str, Any], step: int, asked_at: float) -> None:
    """A step is dated by when the guard was asked for it: whoever is frozen behind the answer still ends that one."""
    with (folder / "steps.log").open("a") as log:
        log.write(f"{request['job_id']} {request['epoch']} {step} {asked_at:.6f}\n")


def _leave(workdir: Path, writer: EventWriter, step: int, weights: str) -> int:
    _save(workdir, writer, step, weights)
    return ExitCode.STOPPED


def _save(workdir: Path, writer: EventWriter, step: int, weights: str) -> None:
    folder = workdir / "checkpoints" / f"step-{step}"
    if folder.exists() or step == 0:
        return
    partial = folder.with_name(f".{folder.name}")
    partial.mkdir(parents=True)
    text = json.dumps({"step": step, "weights": weights})
    with (partial / "state.json").open("w") as file:
        file.write(text[:10])
        _write_rest(file, text[10:])
    partial.rename(folder)
    writer.emit(CheckpointEvent(step=step, path=str(folder)))


def _write_rest(file: TextIO, text: str) -> None:
    file.write(text)
    file.flush()


def _resumed(checkpoint_path: str | None) -> tuple[int, str]:
    if checkpoint_path is None:
        return 0, ""
    state = json.loads((Path(checkpoint_path) / "state.json").read_text())
    return int(state["step"]), str(state["weights"])


if __name__ == "__main__":
    main()

"""All that the supervisor and its child process share: a request in, one JSON event a line out, and exit codes.

The child (`python -m graft_worker.preparing WORKDIR`, `… .training WORKDIR` or `… .merging WORKDIR`) reads
`WORKDIR/request.json`, writes only under WORKDIR, prints events on standard output and all else on standard error.
A trainer without WORKDIR is a spare one: it imports what it will need and waits for a line with WORKDIR on standard
input; from there on it is as if it had been started there (the supervisor moves its log there too).

    WORKDIR/
      request.json        PrepareRequest, ReportRequest, TrainRequest or MergeRequest
      deadline            8 bytes: the lease's deadline on CLOCK_BOOTTIME, a little-endian double; rewritten in place
      checkpoints/        step-<n>/ written by the trainer: temp folder, fsync, rename, then the `checkpoint` event
      adapter/            the finished PEFT folder
      trainer.log         the child's standard error: a line a phase, and whatever goes wrong
      tmp/                the child's TMPDIR
      merged/             what merging leaves: a folder as `save_pretrained` writes it
      prepared/           what preparing leaves: train.safetensors, validation.safetensors, report.json

A prepared split is one safetensors file of three flat tensors: `input_ids` int32 [tokens], `loss_mask` uint8 [tokens]
(1 where the token is learnt), `offsets` int64 [rows + 1].
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import struct
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from graft_shared.jobs import FailureReason, Phase

REQUEST_NAME = "request.json"
DEADLINE_NAME = "deadline"
LOG_NAME = "trainer.log"
SCRATCH_NAME = "tmp"

PLAIN_CHAT = "plain_chat_template"  # the report's warning that the base has no template of its own

DEADLINE_SHARE = 0.9  # of a lease: the trainer stops changing things well before anyone else may begin
STOP_LOOK_SECONDS = 1.0  # a spare trainer that is told to stop does so within this time


class ExitCode(IntEnum):
    """How the child left."""

    DONE = 0
    CRASHED = 1
    USER_ERROR = 64  # EX_USAGE: trying again cannot help
    STOPPED = 75  # EX_TEMPFAIL: told to stop, or the lease's deadline has passed
    CUDA_OUT_OF_MEMORY = 77


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PrepareRequest(_Message):
    """Turn raw rows into tokens. Paths are absolute and on this machine."""

    task: Literal["prepare"] = "prepare"
    job_id: str
    spec: dict[str, Any]
    tokenizer_path: str
    base_commit: str | None
    max_positions: int
    train_file: str
    validation_file: str | None
    source: dict[str, str] = Field(default_factory=dict)  # where the rows are from, for the report


class ReportRequest(_Message):
    """Say what raw rows would teach. Paths are absolute and on this machine."""

    task: Literal["report"] = "report"
    spec: dict[str, Any]
    tokenizer_path: str
    train_file: str
    validation_file: str | None


class TrainRequest(_Message):
    """Train one adapter. Paths are absolute and on this machine."""

    job_id: str
    epoch: int
    spec: dict[str, Any]
    plan: dict[str, Any]
    target_modules: list[str]
    base_path: str
    base_model: str
    base_revision: str
    train_file: str
    validation_file: str | None
    checkpoint_path: str | None
    lease_seconds: float = 0.0
    is_chat: bool = False  # its rows were written in the base's chat template
    adapter_path: str | None = None  # a PEFT folder: the earlier adapter that it goes on from
    quantised_dir: str | None = None  # kept on this host for this revision of the base: its 4-bit weights, once made


class MergeRequest(_Message):
    """Merge an adapter into its full-precision base. Paths are absolute and on this machine."""

    job_id: str
    base_path: str
    base_model: str
    base_revision: str
    adapter_path: str


class PhaseEvent(_Message):
    """The child is busy with something else now."""

    event: Literal["phase"] = "phase"
    phase: Phase


class ProgressEvent(_Message):
    """One optimizer step is done. `loss` is the mean over the update's learnt tokens, in nats."""

    event: Literal["progress"] = "progress"
    step: int
    total_steps: int
    epoch: float
    tokens_seen: int
    tokens_per_second: float
    loss: float
    grad_norm: float
    learning_rate: float


class EvaluationEvent(_Message):
    """The held-out loss after `step` optimizer steps, in nats per learnt token."""

    event: Literal["evaluation"] = "evaluation"
    step: int
    eval_loss: float


class CheckpointEvent(_Message):
    """A complete checkpoint folder lies at `path`."""

    event: Literal["checkpoint"] = "checkpoint"
    step: int
    path: str


class WarningEvent(_Message):
    """Something the user should know, that stops nothing."""

    event: Literal["warning"] = "warning"
    code: str
    message: str


class NoteEvent(_Message):
    """Something that is so and harms nothing: it stands in the job's history, and not among its warnings."""

    event: Literal["note"] = "note"
    message: str


class FailureEvent(_Message):
    """Why the child is about to leave without its result."""

    event: Literal["failure"] = "failure"
    reason: FailureReason
    message: str
    param: str | None = None
    facts: dict[str, Any] = Field(default_factory=dict)


class PreparedEvent(_Message):
    """The prepared files lie in `prepared/`, if any were asked for; `report` is what the user may see."""

    event: Literal["prepared"] = "prepared"
    report: dict[str, Any]


class TrainedEvent(_Message):
    """The adapter lies in `adapter/` and has passed its proof.

    `memory` holds `measured_peak_bytes` with what it is made of, and `expected_peak_bytes`: what the arithmetic says of
    the microbatches that this data really fills. Where it does not know the base, that is left out.
    """

    event: Literal["trained"] = "trained"
    proof: dict[str, Any]
    metrics: dict[str, Any]
    memory: dict[str, Any]
    versions: dict[str, str]


class MergedEvent(_Message):
    """The merged model lies in `merged/` and reads back as it was written."""

    event: Literal["merged"] = "merged"
    proof: dict[str, Any]
    versions: dict[str, str]


Event = Annotated[
    PhaseEvent
    | ProgressEvent
    | EvaluationEvent
    | CheckpointEvent
    | WarningEvent
    | NoteEvent
    | FailureEvent
    | PreparedEvent
    | TrainedEvent
    | MergedEvent,
    Field(discriminator="event"),
]
_EVENT: TypeAdapter[Event] = TypeAdapter(Event)


def parse_event(line: str) -> Event:
    """Read one line of the child's output; raises ValueError for anything that is not an event."""
    return _EVENT.validate_json(line)


class EventWriter:
    """The child's mouth: takes standard output for events alone and sends stray prints to standard error."""

    def __init__(self) -> None:
        self._stream = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        sys.stdout = sys.stderr

    def emit(self, event: _Message) -> None:
        """Write one event as one line."""
        self._stream.write(event.model_dump_json() + "\n")

    def log(self, line: str) -> None:
        """Leave a line for whoever reads the job's log: no secret and no path of this machine, users see it.

        On a full disk there is none: no run ends for that.
        """
        with contextlib.suppress(OSError):
            os.write(2, f"{datetime.now(UTC):%H:%M:%S} {line}\n".encode())  # past buffers, which would try again


def wait_for_workdir(is_told_to_stop: Callable[[], bool]) -> Path | None:
    """Wait, as a spare trainer, for the folder of a job, and settle there.

    None if the supervisor left without one, or if this process is told to stop before it has one. Whoever has a job
    and is told to stop has to say so to the job.
    """
    while not select.select([sys.stdin], [], [], STOP_LOOK_SECONDS)[0]:
        if is_told_to_stop():
            return None
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        return None
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())
    workdir = Path(os.fsdecode(line.removesuffix(b"\n")))
    os.chdir(workdir)
    scratch = workdir / SCRATCH_NAME
    scratch.mkdir(exist_ok=True)
    os.environ |= {"HOME": str(workdir), "TMPDIR": str(scratch)}
    tempfile.tempdir = None  # or it stays what it was when somebody first asked
    return workdir


def write_deadline(workdir: Path, deadline: float) -> None:
    """Tell the child until when (CLOCK_BOOTTIME, seconds) it may change anything."""
    fd = os.open(workdir / DEADLINE_NAME, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.pwrite(fd, struct.pack("<d", deadline), 0)
    finally:
        os.close(fd)


def read_deadline(workdir: Path) -> float:
    """Return the deadline last written, on CLOCK_BOOTTIME."""
    fd = os.open(workdir / DEADLINE_NAME, os.O_RDONLY)
    try:
        (deadline,) = struct.unpack("<d", os.pread(fd, 8, 0))
    finally:
        os.close(fd)
    return float(deadline)


def read_request(workdir: Path) -> dict[str, Any]:
    """Return the raw request of this folder."""
    request: dict[str, Any] = json.loads((workdir / REQUEST_NAME).read_text())
    return request

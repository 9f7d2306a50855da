"""Checkpoints: a folder of safetensors and JSON, complete or absent; no pickle is ever written or read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from graft_worker.protocol import TrainRequest
from graft_worker.training.durable import sync, sync_folder
from graft_worker.training.guard import Guard
from graft_worker.training.optimizer import FlatOptimizer

_TENSORS, _NUMBERS = "state.safetensors", "state.json"


class CheckpointMismatch(Exception):
    """The checkpoint belongs to another spec, base or data."""


@dataclass
class Progress:
    """Where a run stands, beside its weights."""

    step: int = 0
    tokens_seen: int = 0
    tokens_learnt: int = 0
    last_loss: float = 0.0
    lines: list[dict[str, Any]] = field(default_factory=list)  # what metrics.jsonl will hold
    evaluations_without_gain: int = 0
    loss_scale: float = 1.0
    scale_good_steps: int = 0

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The held-out losses so far, in order."""
        return [line for line in self.lines if "eval_loss" in line]


def fingerprint(request: TrainRequest) -> str:
    """What a checkpoint must agree with: the recipe, the targets and the base. The plan may change on the way."""
    recipe = {key: request.spec[key] for key in ("quantization", "lora", "training", "dataset", "validation")}
    facts = [recipe, request.target_modules, request.base_model, request.base_revision]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def save_checkpoint(
    workdir: Path, request: TrainRequest, progress: Progress, optimizer: FlatOptimizer, guard: Guard
) -> Path:
    """Write `checkpoints/step-<n>`: temporary folder, fsync, rename. Returns its path."""
    guard.check_lease()
    final = workdir / "checkpoints" / f"step-{progress.step}"
    partial = workdir / "checkpoints" / f".step-{progress.step}"
    partial.mkdir(parents=True, exist_ok=True)
    tensors, numbers = optimizer.state()
    save_file(
        {**{f"optimizer.{name}": tensor for name, tensor in tensors.items()}, **random_state()}, partial / _TENSORS
    )
    facts = {"fingerprint": fingerprint(request), "optimizer": numbers, "progress": asdict(progress)}
    (partial / _NUMBERS).write_text(json.dumps(facts))
    sync_folder(partial)
    guard.check_lease()
    partial.rename(final)
    sync(final.parent)
    return final


def resume_from(folder: Path, request: TrainRequest, optimizer: FlatOptimizer) -> Progress:
    """Take weights, optimizer, random generators and position from a checkpoint.

    Raises:
        CheckpointMismatch: It was made by another recipe, on another base or other data.
    """
    facts: dict[str, Any] = json.loads((folder / _NUMBERS).read_text())
    if facts["fingerprint"] != fingerprint(request):
        raise CheckpointMismatch("the checkpoint was made with another recipe, base or data")
    tensors = load_file(folder / _TENSORS)
    if "optimizer.weights" not in tensors:
        raise CheckpointMismatch("the checkpoint was made by another version of the trainer")
    prefix = "optimizer."
    optimizer.load({name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)},
                   facts["optimizer"])  # fmt: skip
    restore_random_state(tensors)
    return Progress(**facts["progress"])


def random_state() -> dict[str, torch.Tensor]:
    """The states of torch's random generators, by name; uint8 tensors."""
    state = {"rng.cpu": torch.get_rng_state()}
    return {**state, "rng.cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def restore_random_state(tensors: dict[str, torch.Tensor]) -> None:
    """Put the generators back to where `random_state` found them."""
    torch.set_rng_state(tensors["rng.cpu"])
    if torch.cuda.is_available() and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])

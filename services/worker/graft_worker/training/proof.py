"""The proof: what must be true of a saved adapter before anyone hears `trained`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

from graft_worker.training.adapters import WEIGHTS_NAME
from graft_worker.training.batches import Microbatch
from graft_worker.training.checkpoint import Progress
from graft_worker.training.forward import Forward

LOSS_TOLERANCE = 1e-3  # relative; the reloaded weights are the same numbers, kernels may order sums differently


class NotProven(Exception):
    """The adapter is not what it should be."""


def prove(
    model: PeftModel,
    forward: Forward,
    sample: list[Microbatch],
    folder: Path,
    progress: Progress,
    *,
    earlier: Path | None = None,
) -> dict[str, Any]:
    """Check the files on disk against the trained model on its base, and against the adapter that it went on from.

    Raises:
        NotProven: Non-finite numbers, nothing trained, or another loss after reloading.
    """
    weights = load_file(folder / WEIGHTS_NAME)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()):
        raise NotProven("the adapter holds numbers that are not finite")
    if progress.tokens_learnt == 0:
        raise NotProven("no token was trained")
    if _is_untrained(weights, earlier):
        raise NotProven("the adapter is as it was before training")
    trained_loss = forward.mean_loss(sample)
    _forget(model)
    set_peft_model_state_dict(model, weights)
    reloaded_loss = forward.mean_loss(sample)
    if not math.isclose(trained_loss, reloaded_loss, rel_tol=LOSS_TOLERANCE) or not math.isfinite(reloaded_loss):
        raise NotProven(f"the loss is {reloaded_loss:.6f} after reloading, {trained_loss:.6f} before")
    return {
        "weights_finite": True,
        "loss_finite": True,
        "tokens_learnt": progress.tokens_learnt,
        "trained_loss": trained_loss,
        "reloaded_loss": reloaded_loss,
        "tensors": len(weights),
    }


def _is_untrained(weights: dict[str, torch.Tensor], earlier: Path | None) -> bool:
    """Whether the adapter still is what it began as: without effect, or the earlier one."""
    if earlier is None:
        return not any(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)
    before = load_file(earlier / WEIGHTS_NAME)
    return all(torch.equal(tensor, before[name]) for name, tensor in weights.items())


def _forget(model: PeftModel) -> None:
    """Overwrite the adapter in memory, so that only what was saved can bring it back."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()

"""Before anything is trained: a packed row must say what transformers itself says of its sequences alone."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from graft_shared.errors import UnsupportedBaseModel
from graft_worker.training.attention import ATTENTION
from graft_worker.training.batches import Microbatch, Split, microbatches
from graft_worker.training.forward import Forward

SAMPLE_LENGTHS = (23, 14)  # tokens, the longest first as packing lays them
SAMPLE_TOKENS = max(SAMPLE_LENGTHS)
# Relative difference of a token's logits. On an H200 rounding to bfloat16 alone makes 0.02 in two layers, 0.06 in a 7B
# of random weights and 0.21 in 80 layers of large ones; an attention sink that is passed over makes 0.44.
TOLERANCE = {torch.float32: 1e-3}
HALF_TOLERANCE = 0.3


def sample(vocab_size: int, device: torch.device) -> Microbatch:
    """Two sequences of random tokens in one packed row."""
    ids = np.random.default_rng(0).integers(3, vocab_size, sum(SAMPLE_LENGTHS))
    split = Split(ids.astype(np.int32), np.ones(len(ids), np.uint8), np.cumsum([0, *SAMPLE_LENGTHS]))
    (batch,) = microbatches(split, np.arange(2), budget=len(ids), packing=True, device=device)
    return batch


@torch.no_grad()
def said_alone(model: Any, batch: Microbatch) -> list[torch.Tensor]:
    """What a base as transformers loaded it says of each sequence alone, by its plainest path: fp32 logits each."""
    model.eval()
    model.set_attn_implementation("eager")
    logits = [model(input_ids=batch.input_ids[:, a:b], use_cache=False).logits[0].float() for a, b in _spans()]
    model.set_attn_implementation(ATTENTION)
    model.train()
    return logits


@torch.no_grad()
def require_exactness(
    model: PeftModel, forward: Forward, batch: Microbatch, alone: list[torch.Tensor], compute: torch.dtype
) -> None:
    """Compare the packed row, through our layers, attention and head, with what the base said of its sequences alone.

    Raises:
        UnsupportedBaseModel: This architecture does something that our forward pass does not know.
    """
    base_model = str(model.peft_config["default"].base_model_name_or_path)
    model.eval()
    try:
        ours = forward.logits(batch)
    except (TypeError, ValueError) as error:
        reason = "its attention takes no packed sequences"
        raise UnsupportedBaseModel(base_model=base_model, reason=reason) from error
    model.train()
    # The median over a sequence's tokens: in a mixture of experts, rounding sends single tokens to another expert.
    # Where the base itself gives no number, the loss will say so; where only we give none, that is infinitely far.
    differences = [
        float(((ours[start:end] - logits).norm(dim=-1) / logits.norm(dim=-1)).nan_to_num(math.inf).median())
        for (start, end), logits in zip(_spans(), alone, strict=True)
        if bool(logits.isfinite().all())
    ]
    worst = max(differences, default=0.0)
    if worst > TOLERANCE.get(compute, HALF_TOLERANCE):
        reason = f"packed sequences come out {worst:.2g} away from what they are alone"
        raise UnsupportedBaseModel(base_model=base_model, reason=reason)


def _spans() -> list[tuple[int, int]]:
    return [(int(start), int(end)) for start, end in pairwise(np.cumsum([0, *SAMPLE_LENGTHS]))]

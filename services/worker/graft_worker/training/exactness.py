"""Before anything is trained: a packed row must say what transformers itself says of its sequences alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from graft_shared.errors import UnsupportedBaseModel
from graft_worker.training.attention import ATTENTION
from graft_worker.training.base import Precision
from graft_worker.training.batches import Split, microbatches
from graft_worker.training.forward import Forward

SAMPLE_LENGTHS = (23, 14)  # tokens, the longest first as packing lays them
SAMPLE_TOKENS = max(SAMPLE_LENGTHS)
# Relative difference of a token's logits. On an H200 rounding to bfloat16 alone makes 0.02 in two layers, 0.06 in a 7B
# of random weights and 0.21 in 80 layers of large ones; an attention sink that is passed over makes 0.44.
TOLERANCE = {torch.float32: 1e-3}
HALF_TOLERANCE = 0.3


@torch.no_grad()
def require_exactness(model: PeftModel, forward: Forward, precision: Precision, *, base_model: str) -> None:
    """Compare one packed row with its sequences alone, through the model's own attention and head.

    Raises:
        UnsupportedBaseModel: This architecture does something that our forward pass does not know.
    """
    ids = np.random.default_rng(0).integers(3, model.config.get_text_config().vocab_size, sum(SAMPLE_LENGTHS))
    offsets = np.cumsum([0, *SAMPLE_LENGTHS])
    split = Split(ids.astype(np.int32), np.ones(len(ids), np.uint8), offsets)
    (batch,) = microbatches(split, np.arange(2), budget=len(ids), packing=True, device=precision.device)
    model.eval()
    try:
        ours = forward.logits(batch)
    except (TypeError, ValueError) as error:
        reason = "its attention takes no packed sequences"
        raise UnsupportedBaseModel(base_model=base_model, reason=reason) from error
    theirs = [_alone(model, batch.input_ids[:, start:end]) for start, end in _spans(offsets)]
    model.train()
    # The median over a sequence's tokens: in a mixture of experts, rounding sends single tokens to another expert.
    differences = [
        float(((ours[start:end] - logits).norm(dim=-1) / logits.norm(dim=-1)).median())
        for (start, end), logits in zip(_spans(offsets), theirs, strict=True)
    ]
    # Where the base itself gives no number, the loss will say so.
    if max(differences) > TOLERANCE.get(precision.compute, HALF_TOLERANCE):
        reason = f"packed sequences come out {max(differences):.2g} away from what they are alone"
        raise UnsupportedBaseModel(base_model=base_model, reason=reason)


def _alone(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits of one sequence by the plainest path that transformers has, fp32 [tokens, vocabulary]."""
    base: Any = model.get_base_model()
    base.set_attn_implementation("eager")
    logits: torch.Tensor = base(input_ids=ids, use_cache=False).logits
    base.set_attn_implementation(ATTENTION)
    return logits[0].float()


def _spans(offsets: np.ndarray) -> list[tuple[int, int]]:
    return [(int(start), int(end)) for start, end in pairwise(offsets)]

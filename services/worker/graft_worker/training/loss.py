"""Cross-entropy that never holds all logits: a few thousand tokens at a time, with the gradient made on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from graft_shared.memory import LOSS_CHUNK_BYTES

FEWEST_CHUNK_TOKENS = 64

Head = Callable[[torch.Tensor], torch.Tensor]


def summed_cross_entropy(hidden: torch.Tensor, targets: torch.Tensor, head: Head, vocab_size: int) -> torch.Tensor:
    """The sum of the negative log-likelihoods of `targets`, in nats; fp32 scalar.

    Args:
        hidden: [learnt tokens, hidden size], the states that predict.
        targets: int64 [learnt tokens].
        head: From states to logits; its parameters are frozen, only `hidden` gets a gradient.
    """
    chunk_tokens = max(FEWEST_CHUNK_TOKENS, LOSS_CHUNK_BYTES // (4 * vocab_size))
    loss: torch.Tensor = _ChunkedCrossEntropy.apply(hidden, targets, head, chunk_tokens)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: Head, chunk_tokens: int) -> torch.Tensor:
        wants_gradient = hidden.requires_grad
        gradient = torch.empty_like(hidden) if wants_gradient else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(targets), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            with torch.set_grad_enabled(wants_gradient):
                states = hidden[chunk].detach().requires_grad_(wants_gradient)
                loss = functional.cross_entropy(head(states).float(), targets[chunk], reduction="sum")
            if gradient is not None:
                (gradient[chunk],) = torch.autograd.grad(loss, states)
            total += loss.detach()
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None, None


def head_of(model: Any) -> Head:
    """The output head, with what some families do to logits (Gemma 2's soft cap; the scales of Granite and Cohere)."""
    project = model.get_output_embeddings()
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)

    def head(states: torch.Tensor) -> torch.Tensor:
        logits = project(states)
        if scale != 1.0:
            logits = logits * scale
        squashed: torch.Tensor = logits if cap is None else cap * torch.tanh(logits / cap)
        return squashed

    return head

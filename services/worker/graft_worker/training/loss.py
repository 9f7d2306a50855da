"""Cross-entropy that never holds all logits: a few thousand tokens at a time, with the gradient made on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from graft_shared.memory import loss_chunk_tokens

Chunk = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Head:
    """From hidden states to logits, with what some families do to them."""

    weight: torch.Tensor  # [vocabulary, hidden size]
    bias: torch.Tensor | None = None
    scale: float = 1.0  # Granite and Cohere scale logits
    cap: float | None = None  # Gemma 2 squashes them to ±cap by tanh

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """fp32 [tokens, vocabulary] of states [tokens, hidden size]."""
        logits = functional.linear(states, self.weight, self.bias).float() * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def head_of(model: Any) -> Head:
    """The output head of a transformers model."""
    project = model.get_output_embeddings()
    config = model.config.get_text_config()
    return Head(
        weight=project.weight.detach(),
        bias=None if project.bias is None else project.bias.detach(),
        scale=float(getattr(config, "logit_scale", None) or 1.0)
        / float(getattr(config, "logits_scaling", None) or 1.0),
        cap=getattr(config, "final_logit_softcapping", None),
    )


def summed_cross_entropy(
    hidden: torch.Tensor, predictors: torch.Tensor, targets: torch.Tensor, head: Head, chunk: Chunk
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the negative log-likelihoods of `targets`, and its gradient to the hidden states.

    Args:
        hidden: [tokens, hidden size], without autograd.
        predictors: int64 [learnt tokens], distinct: the position whose state predicts each target.
        targets: int64 [learnt tokens].
        chunk: `chunk_loss`, or what a compiler made of it.

    Returns:
        The loss in nats, fp32 scalar, and the gradient, [tokens, hidden size], in the type of `hidden`.
    """
    gradient = torch.zeros_like(hidden)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for at, wanted in _chunks(predictors, targets, loss_chunk_tokens(len(head.weight), len(hidden))):
        loss, gradient[at] = chunk(hidden[at], wanted, head.weight, head.bias, head.scale, head.cap)
        total += loss
    return total, gradient


def _chunks(
    predictors: torch.Tensor, targets: torch.Tensor, tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(torch.split(predictors, tokens), torch.split(targets, tokens), strict=True)


def chunk_loss(
    states: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    cap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss of some states, fp32 scalar, and its gradient to them, [tokens, hidden size].

    The gradient of a cross-entropy is softmax minus one-hot, so neither needs autograd; a compiler makes it two passes
    over the logits.
    """
    logits = Head(weight=weight, bias=bias, scale=scale, cap=cap).logits(states)
    total = torch.logsumexp(logits, dim=-1, keepdim=True)
    loss = (total - logits.gather(1, targets[:, None])).sum()
    classes = torch.arange(logits.shape[1], device=logits.device)
    gradient = torch.exp(logits - total) - (classes[None, :] == targets[:, None]).float()
    if cap is not None:
        gradient = gradient * (1 - (logits / cap) ** 2)
    return loss, (gradient * scale).to(states.dtype) @ weight

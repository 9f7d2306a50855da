"""One microbatch through the model: the summed loss over its learnt tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from graft_worker.training.attention import ATTENTION, block_mask
from graft_worker.training.base import Precision
from graft_worker.training.batches import Microbatch
from graft_worker.training.graphs import Graphs
from graft_worker.training.loss import Chunk, Head, chunk_loss, head_of, summed_cross_entropy


class Forward:
    """The model as a function from microbatch to loss."""

    def __init__(
        self, model: Any, precision: Precision, keys: torch.Tensor, *, longest: int, chunk: Chunk = chunk_loss
    ) -> None:
        """Args: `keys` as `take_over` was given it; `longest` is no less than the tokens of any sequence."""
        base = model.get_base_model()
        self._model = model
        self.backbone = getattr(base, base.base_model_prefix)
        self._head: Head = head_of(base)
        self._precision = precision
        self._keys = keys
        self._longest = longest  # one number for all batches: a compiled layer holds it as a constant
        self.chunk = chunk
        self.graphs: Graphs | None = None
        self.packs_densely = base.config.get_text_config()._attn_implementation != ATTENTION

    def learn(self, batch: Microbatch, scale: float = 1.0) -> torch.Tensor:
        """Add the gradient of the batch's loss times `scale` to the adapter's; return the loss.

        The loss is the sum over the batch's learnt tokens, in nats; fp32 scalar, on the device.
        """
        if batch.keys is not None:
            self._keys[: len(batch.keys)].copy_(batch.keys)
        if self.graphs is not None:
            return self.graphs.learn(batch, lambda hidden: self._scaled_loss(hidden, batch, scale))
        hidden = self.hidden(batch)
        loss, gradient = self._scaled_loss(hidden.detach(), batch, scale)
        hidden.backward(gradient)  # type: ignore[no-untyped-call]
        return loss

    @torch.no_grad()
    def _scaled_loss(self, hidden: torch.Tensor, batch: Microbatch, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        loss, gradient = summed_cross_entropy(hidden, batch.predictors, batch.targets, self._head, self.chunk)
        return loss, gradient if scale == 1.0 else gradient * scale

    @torch.no_grad()
    def logits(self, batch: Microbatch) -> torch.Tensor:
        """What the model says at every token, fp32 [tokens, vocabulary]; for small batches: `learn` never holds it."""
        return self._head.logits(self.hidden(batch))

    def hidden(self, batch: Microbatch) -> torch.Tensor:
        """The last hidden states, [tokens, hidden size]."""
        states: torch.Tensor = self.backbone(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **self._boundaries(batch)
        ).last_hidden_state
        return states[0]

    def _boundaries(self, batch: Microbatch) -> dict[str, Any]:
        """What keeps the sequences of a packed row apart: their borders, or a mask where only that is understood."""
        if self.packs_densely:
            allowed = block_mask(batch.cu_seq_lens, batch.input_ids.shape[1])
            forbidden = torch.finfo(self._precision.base).min
            mask = torch.zeros(allowed.shape, dtype=self._precision.base, device=allowed.device)
            return {"attention_mask": mask.masked_fill(~allowed, forbidden)[None, None]}
        borders, longest = batch.cu_seq_lens, self._longest
        return {
            "attention_mask": None,
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    @torch.no_grad()
    def mean_loss(self, batches: Iterable[Microbatch]) -> float:
        """The held-out loss per learnt token, in nats, without dropout.

        The gradient that is made beside it is one product of the head: less than logits in fp32 would cost in memory.
        """
        self._model.eval()
        total, learnt = torch.zeros((), dtype=torch.float64, device=self._precision.device), 0
        for batch in batches:
            total += self._scaled_loss(self.hidden(batch), batch, scale=1.0)[0]
            learnt += len(batch.targets)
        self._model.train()
        return float(total) / max(1, learnt)

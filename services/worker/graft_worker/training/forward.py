"""One microbatch through the model: the summed loss over its learnt tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from graft_worker.training.base import Precision
from graft_worker.training.batches import Microbatch
from graft_worker.training.loss import Head, head_of, summed_cross_entropy


class Forward:
    """The model as a function from microbatch to loss."""

    def __init__(self, model: Any, precision: Precision) -> None:
        base = model.get_base_model()
        self._model = model
        self._backbone = getattr(base, base.base_model_prefix)
        self._head: Head = head_of(base)
        self._vocab_size = int(base.config.get_text_config().vocab_size)
        self._precision = precision

    def loss(self, batch: Microbatch) -> torch.Tensor:
        """The sum of the losses of the batch's learnt tokens, in nats; fp32 scalar, differentiable."""
        with torch.autocast(self._precision.device.type, self._precision.compute, enabled=self._precision.autocast):
            hidden = self._backbone(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=None,
                use_cache=False,
                cu_seq_lens_q=batch.cu_seq_lens,
                cu_seq_lens_k=batch.cu_seq_lens,
                max_length_q=batch.max_length,
                max_length_k=batch.max_length,
            ).last_hidden_state
            return summed_cross_entropy(hidden[0, batch.predictors], batch.targets, self._head, self._vocab_size)

    @torch.no_grad()
    def mean_loss(self, batches: Iterable[Microbatch]) -> float:
        """The held-out loss per learnt token, in nats, without dropout."""
        self._model.eval()
        total, learnt = 0.0, 0
        for batch in batches:
            total += float(self.loss(batch))
            learnt += len(batch.targets)
        self._model.train()
        return total / max(1, learnt)

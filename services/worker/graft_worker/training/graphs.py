"""Small microbatches as CUDA graphs: where a layer takes the device less time than the host needs to launch it.

A microbatch is filled up to a size of a short list, and each size is captured once: one graph for the forward pass, one
for the backward pass, all in one pool of memory. The loss runs between the two as it always does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from graft_worker.training.batches import Microbatch

Loss = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

# Products of a layer's weights and a microbatch's tokens below which an H200 waits for the host: at 6e14 operations a
# second they take a millisecond forward, about what launching a compiled layer takes.
HOST_BOUND = 3e11
SIZE_STEP = 128  # tokens between two sizes


def is_host_bound(microbatch_tokens: int, weights_per_layer: int) -> bool:
    """Whether launching would take longer than computing."""
    return microbatch_tokens * weights_per_layer < HOST_BOUND


@dataclass(frozen=True, kw_only=True)
class _Captured:
    """One size: what a microbatch is written into, and what is replayed."""

    batch: Microbatch
    hidden: torch.Tensor  # [size, hidden size]
    gradient: torch.Tensor  # [size, hidden size]
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class Graphs:
    """The backbone, captured once for each size of microbatch."""

    def __init__(self, hidden_of: Callable[[Microbatch], torch.Tensor], settle: Callable[[], None]) -> None:
        """Args: `hidden_of` runs the backbone; `settle` joins every stream that it uses with the current one."""
        self._hidden_of, self._settle = hidden_of, settle
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._warm = False

    def learn(self, batch: Microbatch, loss_of: Loss) -> torch.Tensor:
        """Run forward, loss and backward; the gradients are added to the adapter's."""
        if not self._warm:  # the first one compiles and sets libraries up, which cannot be captured
            hidden = self._hidden_of(batch)
            loss, gradient = loss_of(hidden.detach())
            hidden.backward(gradient)  # type: ignore[no-untyped-call]
            self._warm = True
            del hidden, gradient
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # the graphs' own pool takes the memory over
            return loss
        size = -(-batch.real_tokens // SIZE_STEP) * SIZE_STEP
        sequences = 1 << len(batch.cu_seq_lens).bit_length()
        key = size, sequences
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._capture(batch, *key)
        _fill(captured.batch, batch)
        captured.forward.replay()
        tokens = batch.real_tokens
        loss, captured.gradient[:tokens] = loss_of(captured.hidden[:tokens])
        captured.gradient[tokens:] = 0
        captured.backward.replay()
        return loss

    def _capture(self, like: Microbatch, size: int, sequences: int) -> _Captured:
        held = _empty(like, size, sequences)
        torch.cuda.synchronize()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, pool=self._pool):
            hidden = self._hidden_of(held)
            self._settle()
        gradient = torch.zeros_like(hidden)
        with torch.cuda.graph(backward, pool=self._pool):
            hidden.backward(gradient)  # type: ignore[no-untyped-call]
            self._settle()
        return _Captured(batch=held, hidden=hidden.detach(), gradient=gradient, forward=forward, backward=backward)


def _empty(like: Microbatch, size: int, sequences: int) -> Microbatch:
    """A microbatch of one size to be written into; the attention reads at most `sequences` borders of it."""
    device = like.input_ids.device
    return Microbatch(
        input_ids=torch.zeros(1, size, dtype=torch.int64, device=device),
        position_ids=torch.zeros(1, size, dtype=torch.int64, device=device),
        targets=like.targets[:0],
        predictors=like.predictors[:0],
        cu_seq_lens=torch.full((sequences,), size, dtype=torch.int32, device=device),
        max_length=size,
        real_tokens=size,
    )


def _fill(held: Microbatch, batch: Microbatch) -> None:
    """Write a microbatch into the captured one; what it lacks in tokens is a sequence of its own that teaches nothing."""
    tokens, borders = batch.real_tokens, len(batch.cu_seq_lens)
    for to, what in ((held.input_ids, batch.input_ids), (held.position_ids, batch.position_ids)):
        to[:, :tokens].copy_(what)
        to[:, tokens:] = 0
    held.cu_seq_lens[:borders].copy_(batch.cu_seq_lens)
    held.cu_seq_lens[borders:] = held.real_tokens

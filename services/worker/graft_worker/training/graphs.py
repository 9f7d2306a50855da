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

# Products of a layer's weights and a microbatch's tokens below which the device would wait for the host now and then. A
# compiled layer takes 1 to 2 ms to launch, each way; on an H200 a layer of 202 million weights takes as long for some
# 2,500 tokens, and at 3,500 of them the device was still idle for 15 % of the time.
HOST_BOUND = 2e12
SIZE_STEP = 128  # tokens between two sizes


def is_host_bound(microbatch_tokens: int, weights_per_layer: int) -> bool:
    """Whether launching would take longer than computing."""
    return microbatch_tokens * weights_per_layer < HOST_BOUND


@dataclass(frozen=True, kw_only=True)
class _Captured:
    """One size: what a microbatch is written into, and what is replayed."""

    batch: Microbatch
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class Graphs:
    """The backbone, captured once for each size of microbatch."""

    def __init__(
        self, hidden_of: Callable[[Microbatch], torch.Tensor], settle: Callable[[], None], largest_microbatch: int
    ) -> None:
        """Args: `hidden_of` runs the backbone; `settle` joins every stream that it uses with the current one."""
        self._hidden_of, self._settle = hidden_of, settle
        self._largest = _size_of(largest_microbatch)
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._pool: Any = torch.cuda.graph_pool_handle()
        # What goes between the two graphs, for all sizes; made by the first microbatch.
        self._hidden: torch.Tensor | None = None
        self._gradient: torch.Tensor | None = None

    def learn(self, batch: Microbatch, loss_of: Loss) -> torch.Tensor:
        """Run forward, loss and backward; the gradients are added to the adapter's."""
        if self._hidden is None or self._gradient is None:
            return self._launch(batch, loss_of)
        tokens = batch.real_tokens
        key = _size_of(tokens), 1 << len(batch.cu_seq_lens).bit_length()
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._capture(batch, *key)
        _fill(captured.batch, batch)
        captured.forward.replay()
        loss, self._gradient[:tokens] = loss_of(self._hidden[:tokens])
        self._gradient[tokens : key[0]] = 0
        captured.backward.replay()
        return loss

    def _launch(self, batch: Microbatch, loss_of: Loss) -> torch.Tensor:
        """The first microbatch compiles and sets libraries up, which cannot be captured."""
        hidden = self._hidden_of(batch)
        loss, gradient = loss_of(hidden.detach())
        hidden.backward(gradient)  # type: ignore[no-untyped-call]
        self._hidden, self._gradient = hidden.new_empty(2, self._largest, hidden.shape[1], requires_grad=False)
        del hidden, gradient
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graphs' own pool takes the memory over
        return loss

    def _capture(self, like: Microbatch, size: int, sequences: int) -> _Captured:
        assert self._hidden is not None and self._gradient is not None  # noqa: S101 (made by the first microbatch)
        held = _empty(like, size, sequences)
        torch.cuda.synchronize()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, pool=self._pool):
            hidden = self._hidden_of(held)
            self._hidden[:size].copy_(hidden.detach())
            self._settle()
        with torch.cuda.graph(backward, pool=self._pool):
            hidden.backward(self._gradient[:size])  # type: ignore[no-untyped-call]
            self._settle()
        return _Captured(batch=held, forward=forward, backward=backward)


def _size_of(tokens: int) -> int:
    return -(-tokens // SIZE_STEP) * SIZE_STEP


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
    """Write a microbatch into the captured one; the tokens that it lacks are a sequence that teaches nothing."""
    tokens, borders = batch.real_tokens, len(batch.cu_seq_lens)
    for to, what in ((held.input_ids, batch.input_ids), (held.position_ids, batch.position_ids)):
        to[:, :tokens].copy_(what)
        to[:, tokens:] = 0
    held.cu_seq_lens[:borders].copy_(batch.cu_seq_lens)
    held.cu_seq_lens[borders:] = held.real_tokens

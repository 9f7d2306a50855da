"""Small microbatches as CUDA graphs: where a layer takes the device less time than the host needs to launch it.

A microbatch is filled up to a size of a short list, and each size is captured once: one graph for the forward pass, one
for the backward pass, all in one pool of memory. The loss runs between the two as it always does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from graft_shared.memory import SIZE_STEP, size_for
from graft_worker.training.batches import Microbatch
from graft_worker.training.layers import Layers

Loss = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class _Captured:
    """One size: what a microbatch is written into, and what is replayed."""

    batch: Microbatch
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class Graphs:
    """The backbone, captured once for each size of microbatch."""

    def __init__(self, hidden_of: Callable[[Microbatch], torch.Tensor], layers: Layers, largest: int) -> None:
        """Args: `hidden_of` runs the backbone over `layers`; `largest` is the largest size, in tokens."""
        self._hidden_of, self._layers, self._largest = hidden_of, layers, largest
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._between: tuple[torch.Tensor, torch.Tensor] | None = None  # hidden states and their gradient, of any size
        self.failed: str | None = None  # why nothing is captured any more

    def learn(self, batch: Microbatch, loss_of: Loss) -> torch.Tensor:
        """Run forward, loss and backward; the gradients are added to the adapter's."""
        key = size_for(batch.real_tokens), 1 << len(batch.cu_seq_lens).bit_length()
        if self.failed is not None:
            return self._launch(batch, batch, loss_of)
        if self._between is None:
            return self._warm_up(batch, *key, loss_of)
        captured = self._captured.get(key)
        if captured is None:
            try:
                captured = self._captured[key] = self._capture(batch, *key)
            except RuntimeError as error:
                _raise_out_of_memory(error)
                self.failed = str(error).strip().splitlines()[0]
                self._layers.start_over()
                torch.cuda.synchronize()
                return self._launch(batch, batch, loss_of)
        hidden, gradient = self._between
        tokens = batch.real_tokens
        fill(captured.batch, batch)
        captured.forward.replay()
        loss, gradient[:tokens] = loss_of(hidden[:tokens])
        gradient[tokens : key[0]] = 0
        captured.backward.replay()
        return loss

    def _launch(self, held: Microbatch, batch: Microbatch, loss_of: Loss) -> torch.Tensor:
        """Run a microbatch, which `held` may be filled up from, without a graph."""
        hidden = self._hidden_of(held)
        tokens = batch.real_tokens
        gradient = torch.zeros_like(hidden)
        loss, gradient[:tokens] = loss_of(hidden.detach()[:tokens])
        hidden.backward(gradient)  # type: ignore[no-untyped-call]
        return loss

    def _warm_up(self, batch: Microbatch, size: int, sequences: int, loss_of: Loss) -> torch.Tensor:
        """The first microbatch compiles and sets libraries up, which cannot be captured; so does a second size."""
        held = empty(batch, size, sequences)
        fill(held, batch)
        loss = self._launch(held, batch, loss_of)
        other = size - SIZE_STEP if size > SIZE_STEP else min(size + SIZE_STEP, self._largest)
        hidden = self._hidden_of(of_short_sequences(batch, other))
        hidden.backward(torch.zeros_like(hidden))  # type: ignore[no-untyped-call]  # adds nothing to any gradient
        between = hidden.new_empty(2, self._largest, hidden.shape[1], requires_grad=False)
        del hidden
        if self._layers.plain:  # what cannot be compiled may well look at numbers on the host
            self.failed = "its layers are not compiled"
            return loss
        self._between = between[0], between[1]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graphs' own pool takes the memory over
        return loss

    def _capture(self, like: Microbatch, size: int, sequences: int) -> _Captured:
        assert self._between is not None  # noqa: S101 (made by the first microbatch)
        held = empty(like, size, sequences)
        torch.cuda.synchronize()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, pool=self._pool):
            hidden = self._hidden_of(held)
            self._between[0][:size].copy_(hidden.detach())
            self._layers.settle()
        with torch.cuda.graph(backward, pool=self._pool):
            hidden.backward(self._between[1][:size])  # type: ignore[no-untyped-call]
            self._layers.settle()
        return _Captured(batch=held, forward=forward, backward=backward)


def _raise_out_of_memory(error: BaseException) -> None:
    """Raise the out-of-memory that lies behind an error: the end of a broken capture hides it."""
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, torch.cuda.OutOfMemoryError):
            raise behind
        behind = behind.__cause__ or behind.__context__


def empty(like: Microbatch, size: int, sequences: int) -> Microbatch:
    """A microbatch of one size that `fill` writes into, never to be run before; it has `sequences` borders."""
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


def of_short_sequences(like: Microbatch, size: int) -> Microbatch:
    """A microbatch that can be run as it is: no sequence is longer than any attention was told, no token uncovered."""
    borders = torch.arange(0, size + 1, SIZE_STEP, dtype=torch.int32, device=like.input_ids.device)
    return dataclasses.replace(empty(like, size, len(borders)), cu_seq_lens=borders)


def fill(held: Microbatch, batch: Microbatch) -> None:
    """Write a microbatch into the captured one; the tokens that it lacks are a sequence that teaches nothing."""
    tokens, borders = batch.real_tokens, len(batch.cu_seq_lens)
    for to, what in ((held.input_ids, batch.input_ids), (held.position_ids, batch.position_ids)):
        to[:, :tokens].copy_(what)
        to[:, tokens:] = 0
    held.cu_seq_lens[:borders].copy_(batch.cu_seq_lens)
    held.cu_seq_lens[borders:] = held.real_tokens

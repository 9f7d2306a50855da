"""What an update says of itself, read when the device has it, so that the device never waits to be read."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


class NotFinite(Exception):
    """The loss or the gradient is no number any more."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One update's loss and gradient norm, on their way to the host."""

    step: int
    tokens_seen: int  # of the whole run, this update included
    tokens_learnt: int  # of this update
    learning_rate: float
    values: torch.Tensor  # fp32 [2] on the host: mean loss, gradient norm before clipping
    arrived: torch.cuda.Event | None

    @classmethod
    def take(
        cls, loss: torch.Tensor, norm: torch.Tensor, *, step: int, tokens_seen: int, tokens_learnt: int, rate: float
    ) -> Figures:
        """Begin to copy two fp32 scalars to the host."""
        values, arrived = torch.stack([loss, norm]), None
        if values.is_cuda:
            host = torch.empty(2, pin_memory=True)
            values, arrived = host.copy_(values, non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        return cls(
            step=step,
            tokens_seen=tokens_seen,
            tokens_learnt=tokens_learnt,
            learning_rate=rate,
            values=values,
            arrived=arrived,
        )

    def read(self) -> tuple[float, float]:
        """Wait for the update to be done; return its loss and gradient norm.

        Raises:
            NotFinite: One of them is no number; what the update made of the weights is worth nothing.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, norm = self.values.tolist()
        if not math.isfinite(loss):
            raise NotFinite(f"the loss is {loss} at step {self.step}")
        if not math.isfinite(norm):
            raise NotFinite(f"the gradient's norm is {norm} at step {self.step}")
        return loss, norm

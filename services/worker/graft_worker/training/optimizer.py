"""The flat optimizer: all adapter weights as views of one parameter, so that one launch updates them all.

bitsandbytes pages only tensors of 100,000 elements and more, launches once per tensor, and loses paging when its state
is loaded. One flat fp32 master cures all three; where the adapter computes in bf16 it is copied down after each update.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch

from graft_shared.specs import Optim, Training

_BNB = {
    Optim.PAGED_ADAMW_8BIT: bnb.optim.PagedAdamW8bit,
    Optim.PAGED_ADAMW_32BIT: bnb.optim.PagedAdamW32bit,
    Optim.ADAMW_8BIT: bnb.optim.AdamW8bit,
}
_STATE_TENSORS = ("state1", "state2", "absmax1", "absmax2", "exp_avg", "exp_avg_sq")


class FlatOptimizer:
    """AdamW over one flat fp32 master of all trainable parameters."""

    def __init__(self, parameters: list[torch.nn.Parameter], training: Training, dtype: torch.dtype) -> None:
        self._views = parameters
        device = parameters[0].device
        size = sum(parameter.numel() for parameter in parameters)
        self._weights = torch.empty(size, dtype=dtype, device=device)  # what the model computes with
        self._gradients = torch.zeros(size, dtype=dtype, device=device)
        offset = 0
        for parameter in parameters:
            span = slice(offset, offset + parameter.numel())
            self._weights[span].copy_(parameter.detach().flatten())
            parameter.data = self._weights[span].view(parameter.shape)
            parameter.grad = self._gradients[span].view(parameter.shape)
            offset += parameter.numel()
        own_master = dtype == torch.float32
        self._master = torch.nn.Parameter(self._weights if own_master else self._weights.float())
        self._own_master = own_master
        self._optimizer = _build(self._master, training)

    @property
    def size(self) -> int:
        """How many numbers are trained."""
        return self._weights.numel()

    def gradient_norm(self, scale: float = 1.0) -> torch.Tensor:
        """The 2-norm of the whole gradient times `scale`; fp32 scalar on the device."""
        norm: torch.Tensor = torch.linalg.vector_norm(self._gradients, dtype=torch.float32)
        return norm * scale

    def step(self, learning_rate: float, gradient_scale: float | torch.Tensor) -> None:
        """Update all weights with the gradient times `gradient_scale`, and clear the gradient."""
        self._master.grad = self._gradients.float().mul_(gradient_scale)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._master.grad = None
        if not self._own_master:
            self._weights.copy_(self._master.detach())
        self.clear()

    def clear(self) -> None:
        """Forget the gradient gathered so far."""
        self._gradients.zero_()

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything that resuming needs: tensors by name, and plain numbers."""
        if self._master not in self._optimizer.state:  # saved before the first update: fp16 may skip the first ones
            _set_step(self._made_state(), 0)
        state = self._optimizer.state[self._master]
        tensors = {name: state[name].detach().cpu().clone() for name in _STATE_TENSORS if name in state}
        step = state["step"]
        numbers = {"step": int(step.item() if isinstance(step, torch.Tensor) else step)}
        return {"master": self._master.detach().cpu().clone(), **tensors}, numbers

    def load(self, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
        """Go on from a saved state; paged buffers stay paged, since they are filled in place."""
        with torch.no_grad():
            self._master.copy_(tensors["master"])
            if not self._own_master:
                self._weights.copy_(self._master)
        state = self._made_state()
        for name in _STATE_TENSORS:
            if name in tensors:
                state[name].copy_(tensors[name])
        _set_step(state, numbers["step"])

    def _made_state(self) -> dict[str, Any]:
        """The optimizer's state buffers, made as its first step would make them."""
        kept = self._master.detach().clone()
        self._master.grad = torch.zeros_like(self._master)
        self._optimizer.step()
        self._master.grad = None
        with torch.no_grad():
            self._master.copy_(kept)
        state: dict[str, Any] = self._optimizer.state[self._master]
        return state


def _set_step(state: dict[str, Any], step: int) -> None:
    if isinstance(state["step"], torch.Tensor):
        state["step"].fill_(step)
    else:
        state["step"] = step


def _build(master: torch.nn.Parameter, training: Training) -> torch.optim.Optimizer:
    facts: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
        "weight_decay": training.weight_decay,
    }
    if training.optim is Optim.ADAMW_TORCH:
        return torch.optim.AdamW([master], fused=True, **facts)
    optimizer: torch.optim.Optimizer = _BNB[training.optim]([master], **facts)
    return optimizer

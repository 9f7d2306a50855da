"""The flat optimizer: all adapter weights as views of one parameter, so that one launch updates them all.

bitsandbytes pages only tensors of 100,000 elements and more, launches once per tensor, and loses paging when its state
is loaded. One flat fp32 parameter cures all three. The layers cast its views to the type that they compute in, so that
gradients come back in fp32 and gather there without loss, however many microbatches an update has.
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
    """AdamW over all trainable parameters, laid into one."""

    def __init__(self, parameters: list[torch.nn.Parameter], training: Training) -> None:
        flat = torch.cat([parameter.detach().flatten().float() for parameter in parameters])
        self._weights = torch.nn.Parameter(flat)
        self._weights.grad = torch.zeros_like(flat)
        offset = 0
        for parameter in parameters:
            span = slice(offset, offset + parameter.numel())
            parameter.data = flat[span].view(parameter.shape)
            parameter.grad = self._weights.grad[span].view(parameter.shape)
            offset += parameter.numel()
        self._optimizer = _build(self._weights, training)

    @property
    def size(self) -> int:
        """How many numbers are trained."""
        return self._weights.numel()

    @property
    def paged_bytes(self) -> int:
        """Bytes of state in managed memory, which moves between host and GPU by itself."""
        state = self._optimizer.state.get(self._weights, {})
        return sum(tensor.nbytes for tensor in state.values() if getattr(tensor, "is_paged", False))

    @property
    def _gradients(self) -> torch.Tensor:
        assert self._weights.grad is not None  # noqa: S101 (made with the optimizer, and only ever written into)
        return self._weights.grad

    def gradient_norm(self, scale: float = 1.0) -> torch.Tensor:
        """The 2-norm of the whole gradient times `scale`; fp32 scalar on the device."""
        norm: torch.Tensor = torch.linalg.vector_norm(self._gradients)
        return norm * scale

    def step(self, learning_rate: float, gradient_scale: float | torch.Tensor) -> None:
        """Update all weights with the gradient times `gradient_scale`, and clear the gradient. Waits for no device."""
        self._gradients.mul_(gradient_scale)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._launch()
        self.clear()

    @torch.no_grad()
    def _launch(self) -> None:
        optimizer: Any = self._optimizer
        if self._weights not in optimizer.state or isinstance(optimizer, torch.optim.AdamW):
            optimizer.step()
            return
        # What bitsandbytes' own `step` does, without its two waits for the device: the host would fall behind. Whoever
        # reads paged state on the host waits for it (`_wait`).
        optimizer.prefetch_state(self._weights)
        optimizer.update_step(optimizer.param_groups[0], self._weights, 0, 0)

    def _wait(self) -> None:
        """Paged state is the host's memory too, and the device may still be at work on it."""
        if self._weights.is_cuda:
            torch.cuda.synchronize()

    def clear(self) -> None:
        """Forget the gradient gathered so far."""
        self._gradients.zero_()

    def rehearse(self) -> None:
        """Hold all the memory that the first step will, and leave weights and moments as they are."""
        if self._weights not in self._optimizer.state:
            _set_step(self._made_state(), 0)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything that resuming needs: tensors by name, and plain numbers."""
        self.rehearse()
        state = self._optimizer.state[self._weights]
        self._wait()
        tensors = {name: state[name].detach().cpu().clone() for name in _STATE_TENSORS if name in state}
        step = state["step"]
        numbers = {"step": int(step.item() if isinstance(step, torch.Tensor) else step)}
        return {"weights": self._weights.detach().cpu().clone(), **tensors}, numbers

    def load(self, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
        """Go on from a saved state; paged buffers stay paged, since they are filled in place."""
        with torch.no_grad():
            self._weights.copy_(tensors["weights"])
        state = self._made_state()
        self._wait()
        for name in _STATE_TENSORS:
            if name in tensors:
                state[name].copy_(tensors[name])
        _set_step(state, numbers["step"])

    def _made_state(self) -> dict[str, Any]:
        """The optimizer's state buffers, made as its first step would make them."""
        kept, gathered = self._weights.detach().clone(), self._gradients.clone()
        self.clear()
        self._optimizer.step()
        with torch.no_grad():
            self._weights.copy_(kept)
            self._gradients.copy_(gathered)
        state: dict[str, Any] = self._optimizer.state[self._weights]
        return state


def _set_step(state: dict[str, Any], step: int) -> None:
    if isinstance(state["step"], torch.Tensor):
        state["step"].fill_(step)
    else:
        state["step"] = step


def _build(weights: torch.nn.Parameter, training: Training) -> torch.optim.Optimizer:
    facts: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
        "weight_decay": training.weight_decay,
    }
    if training.optim is Optim.ADAMW_TORCH:
        return torch.optim.AdamW([weights], fused=True, **facts)
    optimizer: torch.optim.Optimizer = _BNB[training.optim]([weights], **facts)
    return optimizer

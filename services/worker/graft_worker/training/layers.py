"""The decoder layers: compiled once for all of them, and recomputed in the backward pass where the plan says so."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
from torch.autograd.function import once_differentiable
from transformers.modeling_layers import GradientCheckpointingLayer

from graft_shared.memory import Recompute
from graft_shared.planner import TrainingPlan
from graft_worker.training.host_memory import pinned
from graft_worker.training.linear import leave_out_spared, let_go, spare_last_products, teach_inductor
from graft_worker.training.loss import Chunk, chunk_loss

Run = Callable[..., Any]

# `FailOnRecompileLimitHit` is no TorchDynamoException.
CompilerGaveUp = (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit)

# Variants of one layer that may be compiled: training and evaluation, local and global attention, the first shapes.
RECOMPILE_LIMIT = 32


def choose_compiler() -> str | None:
    """The compiler of the layers, or None where there is no GPU.

    Also for short runs: from an empty cache it takes some ten seconds, and uncompiled layers keep twice the bytes for
    the backward pass, which nobody planned for. `GRAFT_COMPILER` in the environment decides for tests and benchmarks:
    a backend of `torch.compile`, or `none`.
    """
    wanted = os.environ.get("GRAFT_COMPILER", "inductor" if torch.cuda.is_available() else "none")
    return None if wanted == "none" else wanted


def linear_weights(module: torch.nn.Module) -> int:
    """Weights in the module's linear layers, quantised or not."""
    return sum(part.in_features * part.out_features for part in module.modules() if isinstance(part, torch.nn.Linear))


@dataclass
class Layers:
    """How the layers run; what could not be compiled is told by `plain`."""

    blocks: list[torch.nn.Module]
    plain: dict[str, str] = field(default_factory=dict)  # kind of layer -> why it runs uncompiled
    parking: Parking | None = None

    def give_up_compiling(self, error: Exception) -> None:
        """Run every layer as it is from now on."""
        self.plain |= dict.fromkeys(map(_kind, self.blocks), _first_line(error))
        self.start_over()

    def start_over(self) -> None:
        """Forget a microbatch that was broken off."""
        for block in self.blocks:
            let_go(block)
        if self.parking is not None:
            self.parking.forget()

    def make_every_product(self) -> bool:
        """Leave out no product any more; tell whether any was left out."""
        spared = [module for block in self.blocks for module in block.modules() if getattr(module, "spared", False)]
        for module in spared:
            module.spared = False  # type: ignore[assignment]  # a plain attribute of ours
        return bool(spared)

    def settle(self) -> None:
        """Join every stream that the layers use with the current one."""
        if self.parking is not None:
            self.parking.settle()

    @property
    def weights(self) -> int:
        """Weights of one layer's products, the mean over all."""
        return sum(linear_weights(block) for block in self.blocks) // max(1, len(self.blocks))


def arrange_layers(
    backbone: torch.nn.Module, plan: TrainingPlan, *, backend: str | None, largest_microbatch: int
) -> Layers:
    """Let each decoder layer run as the plan says.

    Args:
        backend: The compiler of `torch.compile`, or None for no compiler.
        largest_microbatch: In tokens.
    """
    layers = Layers(decoder_layers(backbone))
    _configure_compiler()
    if backend == "inductor":
        teach_inductor()
    if plan.recompute is Recompute.OFFLOAD and torch.cuda.is_available():
        layers.parking = Parking(largest_microbatch)
    marked = _Marked()
    for index, layer in enumerate(layers.blocks):
        spare_last_products(layer)
        run: Run = layer.forward
        if backend is not None:
            run = _Compiled(run, backend, _kind(layer), layers.plain, marked)
        if plan.recompute is not Recompute.NONE and index % max(1, plan.recompute_every_n) == 0:
            run = _recomputing(run, index, layers.parking)
        layer.forward = run
    return layers


def _configure_compiler() -> None:
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    # The compiler keeps dropped inputs, masks and gated products for the backward pass, for fear that computing them
    # again might cost more: 36 % more bytes per token in a layer of Llama's, 92 % with adapters on all its products.
    # All of it is elementwise, and fuses into what reads it. Products are never computed twice.
    torch._functorch.config.ban_recompute_used_far_apart = False
    torch._functorch.config.ban_recompute_long_fusible_chains = False
    torch._functorch.config.ban_recompute_materialized_backward = False


def decoder_layers(backbone: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks of the model, in order."""
    return [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]


def require_input_gradients(model: Any) -> None:
    """Let the first layer's input ask for a gradient as all others do: one form of the layer is compiled, not two."""
    model.get_input_embeddings().register_forward_hook(lambda _module, _args, states: states.requires_grad_())


def _kind(layer: torch.nn.Module) -> str:
    """Layers built alike share what is compiled, and what cannot be."""
    return " ".join(sorted({type(module).__name__ for module in layer.modules()}))


class _Compiled:
    """A layer's forward under the compiler; where the compiler gives up, the plain one, for all layers of its kind."""

    def __init__(self, run: Run, backend: str, kind: str, plain: dict[str, str], marked: _Marked) -> None:
        self._run = run
        self._compiled = torch.compile(run, backend=backend, fullgraph=True)
        self._kind, self._plain = kind, plain
        self._marked = marked

    def __call__(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._kind in self._plain:
            return self._run(hidden, *args, **kwargs)
        self._marked.mark(hidden, *args, **kwargs)
        try:
            return self._compiled(hidden, *args, **kwargs)
        except CompilerGaveUp as error:
            self._plain[self._kind] = _first_line(error)
            return self._run(hidden, *args, **kwargs)


class _Marked:
    """Tells the compiler from the first call on which sizes will change: tokens, and sequences in a row.

    Most layers of a microbatch get the very same tensors beside their input: each is marked once.
    """

    def __init__(self) -> None:
        self._borders: Any = None
        self._known: set[int] = set()

    def mark(self, hidden: torch.Tensor, *args: Any, cu_seq_lens_q: torch.Tensor | None = None, **kwargs: Any) -> None:
        """Mark a layer's arguments."""
        if cu_seq_lens_q is None or cu_seq_lens_q is not self._borders:  # another microbatch: its tensors are new
            self._borders = cu_seq_lens_q
            self._known.clear()
        for value in _tensors([hidden, cu_seq_lens_q, *args, *kwargs.values()]):
            if value is hidden or id(value) not in self._known:
                self._known.add(id(value))
                _mark_lengths(hidden.shape[1], value)


def compiled_loss(backend: str | None) -> Chunk:
    """The loss of a chunk of tokens under the compiler, or as it is."""
    if backend is None:
        return chunk_loss
    compiled = torch.compile(chunk_loss, backend=backend, fullgraph=True)

    def loss(states: torch.Tensor, targets: torch.Tensor, *head: Any) -> tuple[torch.Tensor, torch.Tensor]:
        for tensor in (states, targets):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(states, targets, *head)

    return loss


def _mark_lengths(tokens: int, value: torch.Tensor) -> None:
    for dimension, size in enumerate(value.shape):
        if size == tokens or (value.dim() == 1 and value.dtype == torch.int32):
            torch._dynamo.maybe_mark_dynamic(value, dimension)


def _first_line(error: Exception) -> str:
    cause = getattr(error, "inner_exception", None) or error  # what lies behind `BackendCompilerFailed`
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


def _tensors(values: list[Any]) -> list[torch.Tensor]:
    flat: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            flat.append(value)
        elif isinstance(value, (tuple, list)):
            flat += _tensors(list(value))
    return flat


def _recomputing(run: Run, index: int, parking: Parking | None) -> Run:
    """Run a layer so that only its input is kept, or parked, and the rest computed again in the backward pass."""

    def recomputed(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        def again(states: torch.Tensor) -> Any:
            return run(states, *args, **kwargs)

        if not torch.is_grad_enabled():
            return again(hidden)
        return _Recomputed.apply(hidden, again, index, parking)  # type: ignore[no-untyped-call]

    return recomputed


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, run: Run, index: int, parking: Parking | None) -> Any:
        ctx.run, ctx.index, ctx.parking = run, index, parking
        if parking is None:
            ctx.save_for_backward(hidden)
        else:
            parking.park(index, hidden)
        # With gradients, though they are thrown away: the compiler then needs one form of the layer, not two.
        with torch.enable_grad():
            out = run(hidden.detach().requires_grad_())
        return out.detach() if isinstance(out, torch.Tensor) else (out[0].detach(), *out[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        hidden = ctx.saved_tensors[0] if ctx.parking is None else ctx.parking.fetch(ctx.index)
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad(), leave_out_spared():
            out = ctx.run(hidden)
        torch.autograd.backward(out if isinstance(out, torch.Tensor) else out[0], grads[0])
        return hidden.grad, None, None, None


class Parking:
    """Layer inputs in the host's pinned memory while the GPU does not need them; two of them are on the GPU at most."""

    def __init__(self, tokens: int) -> None:
        """Args: `tokens` is the largest microbatch."""
        self._tokens = tokens
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._buffers: dict[int, torch.Tensor] = {}
        self._shapes: dict[int, torch.Size] = {}
        self._leaving: list[tuple[Any, torch.Tensor]] = []
        self._coming: dict[int, torch.Tensor] = {}

    def park(self, index: int, hidden: torch.Tensor) -> None:
        """Begin to copy a layer's input [1, tokens, width] out; its memory is free when the next but one comes."""
        if index not in self._buffers:
            numbers = self._tokens * hidden.shape[-1]
            self._buffers[index] = pinned(numbers, hidden.dtype)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._buffers[index][: hidden.numel()].copy_(hidden.detach().reshape(-1), non_blocking=True)
        self._leaving.append((self._stream.record_event(), hidden.detach()))
        self._shapes[index] = hidden.shape
        if len(self._leaving) > 1:
            self._let_go(self._leaving.pop(0))

    def fetch(self, index: int) -> torch.Tensor:
        """A layer's input, back on the GPU; the one before it is on its way."""
        self.settle()
        if index not in self._coming:
            self._bring(index)
        torch.cuda.current_stream().wait_stream(self._stream)
        hidden = self._coming.pop(index)
        del self._shapes[index]
        before = max((other for other in self._shapes if other < index), default=None)
        if before is not None:
            self._bring(before)
        return hidden

    def settle(self) -> None:
        """Let the current stream wait for all that is on its way out."""
        while self._leaving:
            self._let_go(self._leaving.pop(0))

    def forget(self) -> None:
        """Drop what is parked or on its way: nobody fetches it, and a broken capture's events cannot be waited for."""
        self._shapes.clear()
        self._leaving.clear()
        self._coming.clear()

    def _let_go(self, leaving: tuple[Any, torch.Tensor]) -> None:
        # No record_stream: under capture it would hold every input until the capture ends.
        gone, _ = leaving
        torch.cuda.current_stream().wait_event(gone)

    def _bring(self, index: int) -> None:
        shape = self._shapes[index]
        hidden = torch.empty(shape, dtype=self._buffers[index].dtype, device="cuda")
        self._stream.wait_stream(torch.cuda.current_stream())  # whoever had this memory before is done
        with torch.cuda.stream(self._stream):
            hidden.view(-1).copy_(self._buffers[index][: shape.numel()], non_blocking=True)
        self._coming[index] = hidden

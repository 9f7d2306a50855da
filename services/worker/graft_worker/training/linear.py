"""The linear layers of a frozen base, with LoRA or without: one opaque product each, forward and backward.

PEFT makes the adapter's modules, names and saves them; only their forward pass is ours. A product dequantises the
weight into a scratch that all layers share. To a compiler it is one node, so that no dequantised weight is ever kept
for the backward pass, which dequantises again.

The adapter rides along: the input is widened by what the adapter's first matrix makes of it, and the weight by the
second, so that one product gives x Wᵀ + (x Aᵀ) Bᵀ, and its backward pass the gradient of both. A product apart
would be short, but has to read and write the whole output: a tenth to a quarter of the time of the large one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.lora.layer import Linear as PeftLinear

from graft_shared.memory import shared_columns
from graft_worker.training.dropout import dropped
from graft_worker.training.weights import dense, weight_parts

ADAPTER = "default"  # PEFT's name for an adapter that has none

# The parts of a layer that adds its MLP's output to the stream and does nothing else to it.
PLAIN_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
PLAIN_LAYER |= {"resid_attn_dropout", "resid_mlp_dropout"}  # Phi 3's, which are silenced with all others of a base

_spared_is_left_out = False

_library: Any = torch.library.Library("graft", "DEF")  # type: ignore[no-untyped-call]
_library.define("widened(Tensor[] parts) -> Tensor")
_library.define(
    "linear(Tensor x, Tensor[] weight, str quant_type, int in_features, int out_features, Tensor? bias, Tensor? low, "
    "Tensor? up, bool spared) -> Tensor"
)
_library.define("linear_backward(Tensor grad, Tensor[] weight, str quant_type, int in_features, Tensor? up) -> Tensor")


@torch.library.impl(_library, "widened", "CompositeExplicitAutograd")
def _widened(parts: list[torch.Tensor]) -> torch.Tensor:
    """Matrices side by side, [tokens, the sum of their widths]."""
    return torch.cat(parts, dim=1)


@torch.library.register_fake("graft::widened")  # type: ignore[untyped-decorator]
def _widened_shape(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0].new_empty(parts[0].shape[0], sum(part.shape[1] for part in parts))


def _remember_widths(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.widths = [part.shape[1] for part in inputs[0]]


def _narrowed(ctx: Any, grad: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.split(grad, ctx.widths, dim=1))


torch.library.register_autograd("graft::widened", _narrowed, setup_context=_remember_widths)


@cache
def teach_inductor() -> None:
    """Let inductor write the parts of `widened` where they belong: it would rather copy the input once more."""
    from torch._inductor.ir import ConcatKernel, TensorBox
    from torch._inductor.lowering import register_lowering

    @register_lowering(torch.ops.graft.widened.default, type_promotion_kind=None)
    def _(parts: list[Any]) -> Any:
        return TensorBox(ConcatKernel.create(parts, 1))


@torch.library.impl(_library, "linear", "CompositeExplicitAutograd")
def _linear(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    quant_type: str,
    in_features: int,
    out_features: int,
    bias: torch.Tensor | None,
    low: torch.Tensor | None,
    up: torch.Tensor | None,
    spared: bool,
) -> torch.Tensor:
    """x [W, up]ᵀ + bias.

    Args:
        x: [tokens, in + extra]; without an adapter nothing is extra.
        weight: As `weight_parts` returns it.
        low: [tokens, extra], the end of x once more, which the backward pass keeps.
        up: [out, extra], the adapter's second matrix, scaled, in the columns that are its own; else zero.
        spared: Nothing needs this product where `leave_out_spared` holds: it is not made, and NaN stands in its place.
    """
    if spared and _spared_is_left_out:
        return x.new_full((x.shape[0], out_features), torch.nan)
    matrix = dense(weight, quant_type, (out_features, in_features), x.dtype, beside=up)
    return torch.nn.functional.linear(x, matrix, bias)


@torch.library.impl(_library, "linear_backward", "CompositeExplicitAutograd")
def _linear_backward(
    grad: torch.Tensor, weight: list[torch.Tensor], quant_type: str, in_features: int, up: torch.Tensor | None
) -> torch.Tensor:
    """The gradient of x, [tokens, in + extra], from that of the output, [tokens, out]."""
    return grad @ dense(weight, quant_type, (grad.shape[1], in_features), grad.dtype, beside=up)


@torch.library.register_fake("graft::linear")  # type: ignore[untyped-decorator]
def _linear_shape(x: torch.Tensor, weight: Any, quant_type: str, in_features: int, out: int, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], out)


@torch.library.register_fake("graft::linear_backward")  # type: ignore[untyped-decorator]
def _linear_backward_shape(
    grad: torch.Tensor, weight: Any, quant_type: str, in_features: int, up: torch.Tensor | None
) -> torch.Tensor:
    return grad.new_empty(grad.shape[0], in_features + (0 if up is None else up.shape[1]))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, weight, quant_type, in_features, _, _, low, up, _ = inputs
    ctx.save_for_backward(low, up, *weight)
    ctx.facts = quant_type, in_features


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """To x, whose last columns are `low`, and to `up`."""
    low, up, *weight = ctx.saved_tensors
    to_x = to_up = None
    if ctx.needs_input_grad[0]:
        to_x = torch.ops.graft.linear_backward(grad, weight, *ctx.facts, up)
    if low is not None:
        to_up = grad.t() @ low
    return to_x, [None] * len(weight), None, None, None, None, None, to_up, None


torch.library.register_autograd("graft::linear", _gradients, setup_context=_remember)


class _Product(torch.nn.Module):
    """What a base layer's product needs, as plain buffers: a compiler sees through them, and no layer is special."""

    in_features: int
    out_features: int
    bias: torch.nn.Parameter | None
    compute: torch.dtype
    quant_type: str
    parts: int
    spared = False  # whether `leave_out_spared` is for this product

    def ready(self, compute: torch.dtype, extra: int = 0) -> None:
        """Lay the weight's tensors out; `compute` is the type of the product, `extra` the columns of an adapter."""
        self.compute = compute
        state = getattr(self.weight, "quant_state", None)
        self.quant_type = "" if state is None else str(state.quant_type)
        if state is None and extra:
            weight: Any = self.weight
            room = weight.new_empty(self.out_features, self.in_features + extra)
            room[:, : self.in_features] = weight
            weight.data = room[:, : self.in_features]
        for number, tensor in enumerate(weight_parts(self)):  # type: ignore[arg-type]
            self.register_buffer(f"part{number}", tensor, persistent=False)
            self.parts = number + 1

    def product(
        self, rows: torch.Tensor, low: torch.Tensor | None = None, up: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[tokens, in + extra] to [tokens, out], in the compute type."""
        weight = [getattr(self, f"part{number}") for number in range(self.parts)]
        bias = None if self.bias is None else self.bias.to(self.compute)
        out: torch.Tensor = torch.ops.graft.linear(
            rows.to(self.compute),
            weight,
            self.quant_type,
            self.in_features,
            self.out_features,
            bias,
            low,
            up,
            self.spared,
        )
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, in] to […, out]."""
        out = self.product(x.reshape(-1, self.in_features))
        return out.view(*x.shape[:-1], self.out_features).to(x.dtype)


class FrozenLinear4bit(_Product, bnb.nn.Linear4bit):  # type: ignore[misc]
    """A 4-bit layer of the base."""


class FrozenLinear(_Product, torch.nn.Linear):  # type: ignore[misc]
    """A layer of a base that is not quantised, under an adapter."""


class _LoraForward:
    """PEFT's LoRA layer with our forward pass; the adapter's weights are fp32 and compute in the base's type."""

    siblings: tuple[Any, ...]  # the layers that are fed the same tensor, this one among them
    extra: int  # columns by which the input is widened for all of them
    place: int  # which of these are this layer's own: from here on
    handed: tuple[torch.Tensor, ...] | None  # an input, and what a sibling has made of it for this layer too

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, in] to […, out]."""
        layer: Any = self
        base: _Product = layer.base_layer
        wide, low = self._shared_input(x)
        up = layer.lora_B[ADAPTER].weight
        others = self.place, self.extra - self.place - up.shape[1]
        up = torch.nn.functional.pad(up * layer.scaling[ADAPTER], others).to(base.compute)
        return base.product(wide, low, up).view(*x.shape[:-1], base.out_features).to(x.dtype)

    def _shared_input(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The input with the adapters' columns, [tokens, in + extra], and these columns alone; for all siblings."""
        layer: Any = self
        handed, layer.handed = layer.handed, None
        if handed is not None and handed[0] is x:
            return handed[1], handed[2]
        base: _Product = layer.base_layer
        rows = x.reshape(-1, base.in_features).to(base.compute)
        seen = dropped(rows, layer.keys, layer.salt, layer.dropout) if layer.training and layer.dropout else rows
        down = torch.cat([sibling.lora_A[ADAPTER].weight for sibling in self.siblings])
        down = torch.nn.functional.pad(down, (0, 0, 0, self.extra - len(down))).to(base.compute)
        low = seen @ down.t()
        wide = torch.ops.graft.widened([rows, low])
        for sibling in self.siblings:
            if sibling is not layer:
                sibling.handed = x, wide, low
        return wide, low


class LoraLinear4bit(_LoraForward, PeftLinear4bit):  # type: ignore[misc]
    """LoRA on a 4-bit layer."""


class LoraLinear(_LoraForward, PeftLinear):  # type: ignore[misc]
    """LoRA on a layer that is not quantised."""


def take_over(model: PeftModel, compute: torch.dtype, *, dropout: float, keys: torch.Tensor) -> None:
    """Give every 4-bit layer, and every layer with an adapter, our forward pass.

    Args:
        compute: The type that products are computed in.
        dropout: The adapters' dropout.
        keys: int32 [largest microbatch], the tokens' keys; whoever runs the model writes them before each microbatch.
    """
    modules: list[tuple[str, Any]] = list(model.named_modules())
    for _, module in modules:
        if isinstance(module, bnb.nn.Linear4bit):
            module.__class__ = FrozenLinear4bit
            module.ready(compute)
    adapted: dict[str, dict[str, Any]] = {}  # by what they are part of, then by name
    for path, module in modules:
        if isinstance(module, (PeftLinear4bit, PeftLinear)):
            parent, _, name = path.rpartition(".")
            adapted.setdefault(parent, {})[name] = module
    every = [
        ([parts[name] for name in group], columns)
        for parts in adapted.values()
        for group, columns in shared_columns(parts, next(iter(parts.values())).r[ADAPTER]).items()
    ]
    for number, (siblings, columns) in enumerate(every):
        salt = torch.tensor(number * 0x3C6EF372 % 2**31, dtype=torch.int32, device=keys.device)
        for place, module in enumerate(siblings):
            module.__class__ = LoraLinear4bit if isinstance(module, PeftLinear4bit) else LoraLinear
            module.siblings, module.handed = tuple(siblings), None
            module.extra, module.place = columns, place * module.r[ADAPTER]
            if not isinstance(module.base_layer, _Product):
                module.base_layer.__class__ = FrozenLinear
                module.base_layer.ready(compute, module.extra)
            module.dropout = dropout
            module.register_buffer("keys", keys, persistent=False)
            module.register_buffer("salt", salt, persistent=False)


def let_go(layer: torch.nn.Module) -> None:
    """Drop what siblings have handed to each other, where a forward pass was broken off between them."""
    for module in layer.modules():
        if isinstance(module, _LoraForward):
            module.handed = None


def spare_last_products(layer: torch.nn.Module) -> None:
    """Let `leave_out_spared` leave out the last product of a decoder layer, where nothing but a sum reads it.

    So it is in layers that are built as Llama's are. A norm behind the product, as in Gemma 2, has to see it.
    """
    if {name for name, _ in layer.named_children()} <= PLAIN_LAYER:
        last = getattr(getattr(layer, "mlp", None), "down_proj", None)
        last = getattr(last, "base_layer", last)
        if isinstance(last, _Product):
            last.spared = True


@contextmanager
def leave_out_spared() -> Iterator[None]:
    """Run a layer again for its backward pass alone: a quarter of its work is a product that only the output needs."""
    global _spared_is_left_out
    before, _spared_is_left_out = _spared_is_left_out, True
    try:
        yield
    finally:
        _spared_is_left_out = before

"""The linear layers of a frozen base, with LoRA or without: one opaque product each, forward and backward.

PEFT makes the adapter's modules, names and saves them; only their forward pass is ours. A product dequantises the
weight into a scratch that all layers share, and adds the adapter's part in place. To a compiler it is one node, so that
no dequantised weight is ever kept for the backward pass, which dequantises again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.lora.layer import Linear as PeftLinear

from graft_worker.training.dropout import dropped
from graft_worker.training.weights import dense, weight_parts

ADAPTER = "default"  # PEFT's name for an adapter that has none
# Layers whose input is the same tensor: they share one dropout mask, so that it is computed and kept once.
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

# The parts of a layer that adds its MLP's output to the stream and does nothing else to it.
PLAIN_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
PLAIN_LAYER |= {"resid_attn_dropout", "resid_mlp_dropout"}  # Phi 3's, which are silenced with all others of a base

_spared_is_left_out = False

_library: Any = torch.library.Library("graft", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "linear(Tensor x, Tensor[] weight, str quant_type, int out_features, Tensor? bias, Tensor? down, Tensor? up, "
    "float scaling, bool spared) -> Tensor"
)
_library.define("linear_backward(Tensor grad, Tensor[] weight, str quant_type, int in_features) -> Tensor")


@torch.library.impl(_library, "linear", "CompositeExplicitAutograd")
def _linear(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    quant_type: str,
    out_features: int,
    bias: torch.Tensor | None,
    down: torch.Tensor | None,
    up: torch.Tensor | None,
    scaling: float,
    spared: bool,
) -> torch.Tensor:
    """x Wᵀ + bias + scaling · down upᵀ.

    Args:
        x: [tokens, in].
        weight: As `weight_parts` returns it.
        down: [tokens, r], x through the adapter's first matrix; with up [out, r], its second.
        spared: Nothing needs this product where `leave_out_spared` holds: it is not made, and NaN stands in its place.
    """
    if spared and _spared_is_left_out:
        return x.new_full((x.shape[0], out_features), torch.nan)
    matrix = dense(weight, quant_type, (out_features, x.shape[1]), x.dtype)
    if down is None or up is None:
        return torch.nn.functional.linear(x, matrix, bias)
    # The adapter's part first: a small product is as long as its memory takes, and this way it writes without reading.
    out = x.new_empty(x.shape[0], out_features)
    torch.addmm(out if bias is None else bias, down, up.t(), beta=0 if bias is None else 1, alpha=scaling, out=out)
    return out.addmm_(x, matrix.t())


@torch.library.impl(_library, "linear_backward", "CompositeExplicitAutograd")
def _linear_backward(grad: torch.Tensor, weight: list[torch.Tensor], quant_type: str, in_features: int) -> torch.Tensor:
    """The gradient of x, [tokens, in], from that of the output, [tokens, out]."""
    return grad @ dense(weight, quant_type, (grad.shape[1], in_features), grad.dtype)


@torch.library.register_fake("graft::linear")  # type: ignore[untyped-decorator]
def _linear_shape(
    x: torch.Tensor, weight: Any, quant_type: str, out_features: int, bias: Any, down: Any, up: Any, *_: Any
) -> torch.Tensor:
    return x.new_empty(x.shape[0], out_features)


@torch.library.register_fake("graft::linear_backward")  # type: ignore[untyped-decorator]
def _linear_backward_shape(grad: torch.Tensor, weight: Any, quant_type: str, in_features: int) -> torch.Tensor:
    return grad.new_empty(grad.shape[0], in_features)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, quant_type, _, _, down, up, scaling, _ = inputs
    ctx.save_for_backward(down, up, *weight)
    ctx.facts = quant_type, x.shape[1], scaling


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    down, up, *weight = ctx.saved_tensors
    quant_type, in_features, scaling = ctx.facts
    to_x = to_down = to_up = None
    if ctx.needs_input_grad[0]:
        to_x = torch.ops.graft.linear_backward(grad, weight, quant_type, in_features)
    if down is not None:
        to_down = (grad @ up) * scaling
        to_up = (grad.t() @ down) * scaling
    return to_x, [None] * len(weight), None, None, None, to_down, to_up, None, None


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

    def ready(self, compute: torch.dtype) -> None:
        """Lay the weight's tensors out; `compute` is the type of the product."""
        self.compute = compute
        state = getattr(self.weight, "quant_state", None)
        self.quant_type = "" if state is None else str(state.quant_type)
        for number, tensor in enumerate(weight_parts(self)):  # type: ignore[arg-type]
            self.register_buffer(f"part{number}", tensor, persistent=False)
            self.parts = number + 1

    def product(
        self, rows: torch.Tensor, down: torch.Tensor | None = None, up: torch.Tensor | None = None, scaling: float = 1.0
    ) -> torch.Tensor:
        """[tokens, in] to [tokens, out], in the compute type."""
        rows = rows.to(self.compute)
        weight = [getattr(self, f"part{number}") for number in range(self.parts)]
        bias = None if self.bias is None else self.bias.to(self.compute)
        out: torch.Tensor = torch.ops.graft.linear(
            rows, weight, self.quant_type, self.out_features, bias, down, up, scaling, self.spared
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
    handed: tuple[torch.Tensor, torch.Tensor] | None  # an input, and what a sibling has made of it for this one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, in] to […, out]."""
        layer: Any = self
        base: _Product = layer.base_layer
        down, up = self._lowered(x), layer.lora_B[ADAPTER].weight.to(base.compute)
        out = base.product(x.reshape(-1, base.in_features), down, up, layer.scaling[ADAPTER])
        return out.view(*x.shape[:-1], base.out_features).to(x.dtype)

    def _lowered(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, r], the input through dropout and the adapter's first matrix: one product for all siblings."""
        layer: Any = self
        handed, layer.handed = layer.handed, None
        if handed is not None and handed[0] is x:
            return handed[1]  # type: ignore[no-any-return]
        base: _Product = layer.base_layer
        rows = x.reshape(-1, base.in_features).to(base.compute)
        seen = dropped(rows, layer.keys, layer.salt, layer.dropout) if layer.training and layer.dropout else rows
        first = [sibling.lora_A[ADAPTER].weight for sibling in self.siblings]
        lowered = seen @ torch.cat(first).to(base.compute).t()
        parts: list[torch.Tensor] = list(torch.split(lowered, [len(weight) for weight in first], dim=1))
        own = parts[0]
        for sibling, part in zip(self.siblings, parts, strict=True):
            if sibling is layer:
                own = part
            else:
                sibling.handed = x, part
        return own


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
    fed_alike: dict[tuple[str, str], list[Any]] = {}
    for path, module in modules:
        if not isinstance(module, (PeftLinear4bit, PeftLinear)):
            continue
        if not isinstance(module.base_layer, _Product):
            module.base_layer.__class__ = FrozenLinear
            module.base_layer.ready(compute)
        module.__class__ = LoraLinear4bit if isinstance(module, PeftLinear4bit) else LoraLinear
        parent, _, name = path.rpartition(".")
        fed_alike.setdefault((parent, _input_of(name)), []).append(module)
    for number, siblings in enumerate(fed_alike.values()):
        salt = torch.tensor(number * 0x3C6EF372 % 2**31, dtype=torch.int32, device=keys.device)
        for module in siblings:
            module.siblings, module.handed = tuple(siblings), None
            module.dropout = dropout
            module.register_buffer("keys", keys, persistent=False)
            module.register_buffer("salt", salt, persistent=False)


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
    _spared_is_left_out = True
    try:
        yield
    finally:
        _spared_is_left_out = False


def _input_of(name: str) -> str:
    """One name for all layers that are fed the same tensor."""
    return next((group[0] for group in SHARED_INPUTS if name in group), name)

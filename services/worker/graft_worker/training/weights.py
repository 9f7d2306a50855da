"""A frozen layer's weight as plain tensors, 4-bit or not, and its dense form for one product at a time."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import bitsandbytes as bnb
import torch

# The layout that bitsandbytes gives a Linear4bit: 64 weights share a constant, 256 constants share theirs.
BLOCK_WEIGHTS = 64
NESTED_BLOCK = 256
COLUMNS_AT_ONCE = 16  # our kernel writes full transactions, and none crosses the end of a row

_scratch: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}


def weight_parts(linear: torch.nn.Linear) -> list[torch.Tensor]:
    """The tensors that a frozen linear layer's weight is made of.

    Returns:
        [weight], or for a 4-bit layer [packed, absmax], or doubly quantised [packed, absmax, absmax of these, their
        code, their offset], as `kernels.dequantise_4bit` takes them.
    """
    if not isinstance(linear, bnb.nn.Linear4bit):
        return [linear.weight.detach()]
    state: Any = linear.weight.quant_state
    packed = linear.weight.detach().as_subclass(torch.Tensor)
    if state.blocksize != BLOCK_WEIGHTS or (state.nested and state.state2.blocksize != NESTED_BLOCK):
        raise ValueError(f"unknown 4-bit layout: blocks of {state.blocksize} weights")
    if not state.nested:
        return [packed, state.absmax]
    return [packed, state.absmax, state.state2.absmax, state.state2.code, state.offset]


def dense(
    parts: list[torch.Tensor],
    quant_type: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    beside: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weight as one matrix [out, in], good until the next call: a 4-bit one is dequantised into a shared scratch.

    Every bit is what `bitsandbytes.functional.dequantize_4bit` gives.

    Args:
        shape: out and in.
        beside: [out, extra], more columns: the matrix is [out, in + extra].
    """
    rows, columns = shape
    extra = 0 if beside is None else beside.shape[1]
    if len(parts) > 1 and parts[0].is_cuda and columns % COLUMNS_AT_ONCE == 0 and rows * columns % BLOCK_WEIGHTS == 0:
        from graft_worker.training.kernels import dequantise_4bit

        out = _scratch_of(rows * (columns + extra), dtype, parts[0].device).view(rows, columns + extra)
        dequantise_4bit(parts, _levels(quant_type, parts[0].device), beside, out)
        return out
    if len(parts) == 1:  # laid out with room for what comes beside it
        # `.data`: what is written beside the weight is scratch, and makes no saved weight of autograd's another one.
        matrix = parts[0].data.as_strided((rows, columns + extra), (parts[0].stride(0), 1)).to(dtype)
    else:
        matrix = torch.ops.bitsandbytes.dequantize_4bit(
            parts[0], _constants(parts), BLOCK_WEIGHTS, quant_type, shape, dtype
        )
        matrix = torch.nn.functional.pad(matrix, (0, extra)) if extra else matrix
    if beside is not None:
        matrix[:, columns:] = beside
    return matrix


def _constants(parts: list[torch.Tensor]) -> torch.Tensor:
    """One fp32 constant per block of weights."""
    if len(parts) == 2:
        return parts[1]
    _, absmax, nested_absmax, nested_code, offset = parts
    constants: torch.Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
        absmax, nested_absmax, nested_code, NESTED_BLOCK, torch.float32
    )
    return constants + offset


def _scratch_of(numbers: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The first numbers of a buffer that grows to the largest layer; whoever uses it is done before the next asks."""
    held = _scratch.get((device, dtype))
    if held is None or held.numel() < numbers:
        held = _scratch[device, dtype] = torch.empty(numbers, dtype=dtype, device=device)
    return held[:numbers]


@lru_cache
def _levels(quant_type: str, device: torch.device) -> torch.Tensor:
    """The 16 values of a 4-bit type, asked of bitsandbytes itself; fp32."""
    packed = torch.arange(16, dtype=torch.uint8, device=device).repeat_interleave(2).mul_(17)[:32].reshape(-1, 1)
    one = torch.ones(1, dtype=torch.float32, device=device)
    shape = (1, BLOCK_WEIGHTS)
    values = torch.ops.bitsandbytes.dequantize_4bit(packed, one, BLOCK_WEIGHTS, quant_type, shape, torch.float32)
    return values.flatten()[::4].contiguous()  # type: ignore[no-any-return]

"""GPU kernels in Triton; imported only where there is a GPU."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

WORDS_PER_PROGRAM = 512  # of 8 weights each
WARPS = 4

# What Triton compiled, by what it specialises on. Its own launcher takes longer on the host than the kernel runs.
_compiled: dict[tuple[bool, torch.dtype, bool, bool], Any] = {}


def dequantise_4bit(parts: list[torch.Tensor], levels: torch.Tensor, out: torch.Tensor) -> None:
    """Write packed 4-bit weights into `out`, the same bits that bitsandbytes would write, in one pass.

    bitsandbytes takes three launches for doubly quantised weights: it writes the block constants to memory in between.

    Args:
        parts: packed uint8 [n / 2] and fp32 block constants [n / 64]; or packed, uint8 block constants [n / 64], their
            own constants fp32 [n / 64 / 256], the code of 8 bits fp32 [256], and the offset fp32 [].
        levels: fp32 [16], the values of the 4-bit type.
        out: [rows, columns] of any 16- or 32-bit float, n elements, n a multiple of 64; rows may lie apart. Columns and
            the distance of rows are multiples of 16.
    """
    words, columns, distance = out.numel() // 8, out.shape[1], out.stride(0)
    nested = len(parts) > 2
    packed, absmax = parts[:2]
    # Arguments that a single quantisation does not use are never read.
    nested_absmax, nested_code, offset = parts[2:] if nested else (absmax, absmax, absmax)
    tensors = (packed.view(-1).view(torch.int32), levels, absmax, nested_absmax, nested_code, offset, out)
    grid = (triton.cdiv(words, WORDS_PER_PROGRAM), 1, 1)
    key = nested, out.dtype, words % 16 == 0, all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    kernel = _compiled.get(key)
    if kernel is None:
        _compiled[key] = _dequantise[grid](
            *tensors, words, columns, distance, nested=nested, size=WORDS_PER_PROGRAM, num_warps=WARPS,
            enable_fp_fusion=False,  # a fused multiply-add rounds once where bitsandbytes rounds twice
        )  # fmt: skip
        return
    kernel[grid](*tensors, words, columns, distance, nested, WORDS_PER_PROGRAM)


@triton.jit  # type: ignore[untyped-decorator]
def _dequantise(  # type: ignore[no-untyped-def]
    packed, levels, absmax, nested_absmax, nested_code, offset, out, words, columns, distance,
    nested: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """Four bytes in and eight weights out for each lane: both ends of the way are full transactions."""
    at = tl.program_id(0) * size + tl.arange(0, size)
    inside = at < words
    word = tl.load(packed + at, inside, other=0)
    block = at // 8
    if nested:
        code = tl.load(absmax + block, inside, other=0).to(tl.int32)
        scale = tl.load(nested_code + code) * tl.load(nested_absmax + block // 256, inside, other=0.0)
        scale = scale + tl.load(offset)
    else:
        scale = tl.load(absmax + block, inside, other=0.0)
    place = tl.arange(0, 8)
    shift = (place // 2) * 8 + (1 - place % 2) * 4  # in each byte the high half comes first
    level = (word[:, None] >> shift[None, :]) & 15
    values = tl.load(levels + level) * scale[:, None]
    row = at * 8 // columns
    to = row * (distance - columns) + at * 8
    tl.store(out + to[:, None] + place[None, :], values.to(out.dtype.element_ty), inside[:, None])

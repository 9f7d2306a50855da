"""GPU kernels in Triton; imported only where there is a GPU."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

WEIGHTS_PER_WORD = 8
WORDS_PER_PROGRAM = 512
WARPS = 4

# What Triton compiled, by what it specialises on. Its own launcher takes longer on the host than the kernel runs.
_compiled: dict[tuple[Any, ...], Any] = {}


def dequantise_4bit(
    parts: list[torch.Tensor], levels: torch.Tensor, beside: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Write packed 4-bit weights into `out`, the same bits that bitsandbytes would write, in one pass.

    bitsandbytes takes three launches for doubly quantised weights: it writes the block constants to memory in between.

    Args:
        parts: packed uint8 [n / 2] and fp32 block constants [n / 64]; or packed, uint8 block constants [n / 64], their
            own constants fp32 [n / 64 / 256], the code of 8 bits fp32 [256], and the offset fp32 [].
        levels: fp32 [16], the values of the 4-bit type.
        beside: [rows, extra], in the type of `out`, or nothing: columns that are written after the weights'.
        out: [rows, columns + extra], contiguous, of any 16- or 32-bit float; n = rows × columns is a multiple of 64,
            columns and extra are multiples of 16.
    """
    rows, extra = out.shape[0], 0 if beside is None else beside.shape[1]
    columns = out.shape[1] - extra
    words = rows * columns // WEIGHTS_PER_WORD
    nested = len(parts) > 2
    packed, absmax = parts[:2]
    # Arguments that a single quantisation, or a weight with nothing beside it, does not use are never read.
    nested_absmax, nested_code, offset = parts[2:] if nested else (absmax, absmax, absmax)
    more = levels if beside is None else beside.contiguous()
    tensors = (packed.view(-1).view(torch.int32), levels, absmax, nested_absmax, nested_code, offset, more, out)
    first_beside = triton.cdiv(words, WORDS_PER_PROGRAM)
    grid = (first_beside + triton.cdiv(rows * extra, WORDS_PER_PROGRAM * WEIGHTS_PER_WORD), 1, 1)
    constants = (columns, extra, nested, WORDS_PER_PROGRAM)
    numbers = (words, first_beside, rows * extra)
    key = (
        constants,
        out.dtype,
        more.dtype,
        *(number % 16 == 0 for number in numbers),
        *(number == 1 for number in numbers),
        *(tensor.data_ptr() % 16 == 0 for tensor in tensors),
    )
    kernel = _compiled.get(key)
    if kernel is None:
        _compiled[key] = _dequantise[grid](
            *tensors, *numbers, *constants, num_warps=WARPS,
            enable_fp_fusion=False,  # a fused multiply-add rounds once where bitsandbytes rounds twice
        )  # fmt: skip
        return
    kernel[grid](*tensors, *numbers, *constants)


@triton.jit  # type: ignore[untyped-decorator]
def _dequantise(  # type: ignore[no-untyped-def]
    packed, levels, absmax, nested_absmax, nested_code, offset, beside, out, words, first_beside, numbers_beside,
    columns: tl.constexpr, extra: tl.constexpr, nested: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """Four bytes in and eight weights out for each lane: both ends of the way are full transactions."""
    program = tl.program_id(0)
    if program < first_beside:
        at = program * size + tl.arange(0, size)
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
        to = at * 8 + (at * 8 // columns) * extra
        tl.store(out + to[:, None] + place[None, :], values.to(out.dtype.element_ty), inside[:, None])
    else:
        if extra > 0:
            tail = (program - first_beside) * size * 8 + tl.arange(0, size * 8)
            exists = tail < numbers_beside
            target = tail + (tail // extra + 1) * columns
            tl.store(out + target, tl.load(beside + tail, exists, other=0.0), exists)

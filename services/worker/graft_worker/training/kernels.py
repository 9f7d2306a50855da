"""GPU kernels in Triton; imported only where there is a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCKS_PER_PROGRAM = 64  # quantisation blocks that one program dequantises: 4,096 weights
WARPS = 4


def dequantise_4bit(parts: list[torch.Tensor], levels: torch.Tensor, out: torch.Tensor) -> None:
    """Write packed 4-bit weights into `out`, the same bits that bitsandbytes would write, in one pass.

    bitsandbytes takes three launches for doubly quantised weights and a third more time: it writes the block constants
    to memory in between.

    Args:
        parts: packed uint8 [n / 2] and fp32 block constants [n / 64]; or packed, uint8 block constants [n / 64], their
            own constants fp32 [n / 64 / 256], the code of 8 bits fp32 [256], and the offset fp32 [].
        levels: fp32 [16], the values of the 4-bit type.
        out: contiguous, n elements of any 16- or 32-bit float; n is a multiple of 64.
    """
    blocks = out.numel() // 64
    nested = len(parts) > 2
    packed, absmax = parts[:2]
    # Arguments that a single quantisation does not use are never read.
    nested_absmax, nested_code, offset = parts[2:] if nested else (absmax, absmax, absmax)
    _dequantise[(triton.cdiv(blocks, BLOCKS_PER_PROGRAM),)](
        packed, levels, absmax, nested_absmax, nested_code, offset, out, blocks,
        nested=nested, rows=BLOCKS_PER_PROGRAM, num_warps=WARPS,
        enable_fp_fusion=False,  # a fused multiply-add rounds once where bitsandbytes rounds twice
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _dequantise(  # type: ignore[no-untyped-def]
    packed, levels, absmax, nested_absmax, nested_code, offset, out, blocks, nested: tl.constexpr, rows: tl.constexpr
):
    block = tl.program_id(0) * rows + tl.arange(0, rows)
    inside = block < blocks
    if nested:
        code = tl.load(absmax + block, inside, other=0).to(tl.int32)
        scale = tl.load(nested_code + code) * tl.load(nested_absmax + block // 256, inside, other=0.0)
        scale = scale + tl.load(offset)
    else:
        scale = tl.load(absmax + block, inside, other=0.0)
    at = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    byte = tl.load(packed + at, inside[:, None], other=0).to(tl.int32)
    high = tl.load(levels + (byte >> 4)) * scale[:, None]
    low = tl.load(levels + (byte & 15)) * scale[:, None]
    values = tl.reshape(tl.join(high, low), (rows, 64))
    to = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + to, values.to(out.dtype.element_ty), inside[:, None])

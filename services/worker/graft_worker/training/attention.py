"""Attention over a packed row: sequences side by side that never see each other.

On a GPU this is `torch.nn.attention.varlen.varlen_attn` (flash attention by sequence boundaries, in torch since 2.10);
elsewhere the same result by scaled-dot-product attention under a block mask. Boundaries travel through the model's
keyword arguments as `cu_seq_lens_q` (int32 [sequences + 1]) and `max_length_q`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None  # type: ignore[assignment]

ATTENTION = "graft_packed"
# The kernel takes fewer heads of keys and values than of queries; from torch 2.12 on it wants to be told so.
_VARLEN_ASKS_FOR_GROUPS = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters
VARLEN_HEAD_SIZES = 256  # the largest head size that flash attention takes
# Flash attention's first cards; older ones attend under a mask.
_VARLEN_RUNS = varlen_attn is not None and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def register_attention() -> None:
    """Teach transformers our attention.

    No mask function is registered: transformers then builds no mask, for which it would read positions on the host.
    """
    AttentionInterface.register(ATTENTION, packed_attention)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence of a packed row.

    Args:
        query: [1, heads, tokens, head size]; key and value may have fewer heads, a divisor of it.
        cu_seq_lens_q: int32 [sequences + 1], where each sequence begins; the last is `tokens`.
        max_length_q: The longest sequence, in tokens.
        sliding_window: How many tokens back a token may look, itself included.
        softcap: Scores are squashed to ±softcap by tanh (Gemma 2).

    Returns:
        [1, tokens, heads, head size], and no weights.
    """
    fits_varlen = query.is_cuda and query.dtype != torch.float32 and query.shape[-1] <= VARLEN_HEAD_SIZES
    if _VARLEN_RUNS and fits_varlen and softcap is None:
        grouped: dict[str, Any] = {"enable_gqa": True} if _VARLEN_ASKS_FOR_GROUPS else {}
        window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
        out = varlen_attn(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=window,
            **grouped,
        )
        assert isinstance(out, torch.Tensor)  # noqa: S101 (a pair only when return_aux is asked for)
        return out.unsqueeze(0), None
    mask = block_mask(cu_seq_lens_q, query.shape[2], sliding_window)
    key, value = _ungrouped(query, key, value)
    if softcap is not None:
        return _softcapped(query, key, value, mask, scaling, softcap), None
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2), None


def block_mask(cu_seq_lens: torch.Tensor, tokens: int, sliding_window: int | None = None) -> torch.Tensor:
    """Who may see whom: bool [tokens, tokens], True where the row's token may look at the column's."""
    positions = torch.arange(tokens, device=cu_seq_lens.device)
    sequence = torch.searchsorted(cu_seq_lens[1:].contiguous(), positions, right=True)
    back = positions[:, None] - positions[None, :]
    allowed = (sequence[:, None] == sequence[None, :]) & (back >= 0)
    return allowed if sliding_window is None else allowed & (back < sliding_window)


def _ungrouped(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values with as many heads as the queries."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def _softcapped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float | None, cap: float
) -> torch.Tensor:
    scores = query @ key.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
    scores = (cap * torch.tanh(scores / cap)).masked_fill(~mask, float("-inf"))
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2)

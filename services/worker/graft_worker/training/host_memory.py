"""Tensors in the host's pinned memory: where the GPU parks what it does not need now, and reads what it rarely does."""

from __future__ import annotations

from typing import Any

import torch


def pinned(numbers: int, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised memory of the host that the GPU can copy from and to while it computes.

    Raises:
        MemoryError: The host has no more that it can pin.
    """
    try:
        return torch.empty(numbers, dtype=dtype, pin_memory=True)
    except RuntimeError as error:  # CUDA calls this, too, out of memory
        raise MemoryError("the host has no more memory that it can pin") from error


def keep_on_host(embedding: torch.nn.Embedding) -> None:
    """Move an embedding's table to pinned memory, where the GPU reads the few rows that a microbatch names.

    Nobody notices: the weight is a tensor of the GPU as before, only that its bytes come over the bus.
    """
    table = embedding.weight.data
    held = pinned(table.numel(), table.dtype)
    held.copy_(table.view(-1))
    embedding.weight.data = _seen_by_gpu(held).view(table.shape)


class _Lent:
    """Pinned memory under the protocol by which libraries lend each other arrays of a GPU; kept as long as it is lent.

    Pinned memory has one address for host and GPU. The protocol has no name for bf16, so it is lent as bytes.
    """

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (held.numel() * held.element_size(),),
            "typestr": "|u1",
            "data": (held.data_ptr(), False),
            "version": 3,
        }


def _seen_by_gpu(held: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(_Lent(held), device="cuda").view(held.dtype)

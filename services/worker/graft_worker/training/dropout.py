"""Dropout without a generator: whether a number is kept is a hash of where it stands.

The key of a token tells its update, its sequence and its position, the salt of a site which layer's input it is. So the
same numbers are dropped however sequences are packed, on a CPU and on a GPU, compiled or not, in a recomputed layer,
and in a run that goes on from a checkpoint; and no mask need be kept for the backward pass.
"""

from __future__ import annotations

import numpy as np
import torch

# The finalizer of MurmurHash3, which mixes every bit into every other (public domain, Austin Appleby), as int32.
FIRST, SECOND = -2048144789, -1028477387  # 0x85EBCA6B, 0xC2B2AE35


def dropped(x: torch.Tensor, keys: torch.Tensor, salt: torch.Tensor, p: float) -> torch.Tensor:
    """`x` with a share `p` of its numbers set to zero and the others divided by `1 - p`.

    Args:
        x: [tokens, width].
        keys: int32 [tokens or more], one for each token.
        salt: int32 scalar, one for each place in the model; inputs that share it share their mask.
    """
    # No product here: inductor would make it part of an index, and an index must not overflow (torch 2.13 gave NaN).
    columns = torch.arange(x.shape[1], dtype=torch.int32, device=x.device) + salt
    mixed = keys[: x.shape[0], None] ^ columns[None, :]
    mixed = mixed ^ ((mixed >> 16) & 0xFFFF)
    mixed = mixed * FIRST
    mixed = mixed ^ ((mixed >> 13) & 0x7FFFF)
    mixed = mixed * SECOND
    mixed = mixed ^ ((mixed >> 16) & 0xFFFF)
    kept = (mixed & 0x7FFFFFFF) >= int(p * 2**31)
    return torch.where(kept, x * (1.0 / (1.0 - p)), 0.0)


def token_keys(seed: int, step: int, sequences: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """A key for every token of a microbatch, int32 [tokens].

    Args:
        seed: The run's.
        step: The update's number.
        sequences: Which sequence of the update each token belongs to, int [tokens].
        positions: Where in its sequence it stands, int [tokens].
    """
    (start,) = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    mixed = start + sequences.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + positions.astype(np.uint64)
    # SplitMix64's finalizer (Steele, Lea and Flood, 2014)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    keys: np.ndarray = (mixed >> np.uint64(32)).astype(np.uint32).view(np.int32)
    return keys

"""From prepared tokens to microbatches: which sequences make an update, and how they are packed into rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from graft_worker.training.dropout import token_keys


@dataclass(frozen=True)
class Split:
    """One prepared split, flat."""

    input_ids: np.ndarray  # int32 [tokens]
    loss_mask: np.ndarray  # uint8 [tokens], 1 where the token is learnt
    offsets: np.ndarray  # int64 [rows + 1]

    @classmethod
    def load(cls, path: Path) -> Split:
        """Read a file that preparing wrote."""
        tensors = load_file(path)
        return cls(tensors["input_ids"], tensors["loss_mask"], tensors["offsets"])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [rows]."""
        return np.diff(self.offsets)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths.max(initial=0))

    @cached_property
    def learnt_rows(self) -> np.ndarray:
        """The row of each token that can be learnt, int64: a row's first token has nothing to be predicted from."""
        learnt = self.loss_mask.astype(bool)
        learnt[self.offsets[:-1][self.lengths > 0]] = False
        rows: np.ndarray = np.searchsorted(self.offsets, np.nonzero(learnt)[0], side="right") - 1
        return rows


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """One packed row on the device."""

    input_ids: torch.Tensor  # int64 [1, tokens]
    position_ids: torch.Tensor  # int64 [1, tokens], from 0 in every sequence
    targets: torch.Tensor  # int64 [learnt]: the token to predict
    predictors: torch.Tensor  # int64 [learnt]: the position whose hidden state predicts it
    cu_seq_lens: torch.Tensor  # int32 [sequences + 1]
    max_length: int
    real_tokens: int
    keys: torch.Tensor | None = None  # int32 [tokens]: what decides on dropout


@lru_cache(maxsize=2)
def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits the rows: the same for the same seed, on every machine."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def updates_per_epoch(rows: int, sequences_per_update: int) -> int:
    """Optimizer steps of one pass; the last may see fewer sequences."""
    return -(-rows // sequences_per_update)


def update_rows(split: Split, step: int, *, sequences_per_update: int, seed: int) -> np.ndarray:
    """The rows that update number `step` (from 0) learns from; a pure function, so that resuming needs no history."""
    per_epoch = updates_per_epoch(len(split), sequences_per_update)
    epoch, position = divmod(step, per_epoch)
    order = epoch_order(len(split), seed, epoch)
    return order[position * sequences_per_update : (position + 1) * sequences_per_update]


def pack(lengths: list[int], budget: int) -> list[list[int]]:
    """Distribute sequences over as few rows of at most `budget` tokens as first-fit decreasing finds, evenly.

    Returns:
        For each row the indices of its sequences. A sequence longer than the budget gets a row of its own.
    """
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    rows = _first_fit(lengths, longest_first, budget)
    return _even(lengths, longest_first, budget, len(rows)) or rows


def _first_fit(lengths: list[int], order: list[int], budget: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    for index in order:
        for row, left in enumerate(room):
            if lengths[index] <= left:
                rows[row].append(index)
                room[row] -= lengths[index]
                break
        else:
            rows.append([index])
            room.append(budget - lengths[index])
    return rows


def _even(lengths: list[int], order: list[int], budget: int, count: int) -> list[list[int]] | None:
    """Fill so many rows, always the emptiest; None if one overflows. A small row costs nearly what a full one does."""
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for index in order:
        row = filled.index(min(filled))
        rows[row].append(index)
        filled[row] += lengths[index]
        if filled[row] > budget and len(rows[row]) > 1:
            return None
    return rows


def largest_microbatch(split: Split, *, budget: int, sequences_per_update: int) -> int:
    """Tokens that no microbatch of these rows exceeds."""
    fullest = int(np.sort(split.lengths)[-sequences_per_update:].sum())
    return min(fullest, max(budget, split.longest))


def fullest_rows(split: Split, *, budget: int, packing: bool, sequences_per_update: int) -> np.ndarray:
    """Rows that together make the heaviest microbatch there can be, or nearly: the longest, as many as fit."""
    longest_first = np.argsort(-split.lengths, kind="stable")
    if not packing:
        fitting = max(1, budget // max(1, split.longest))
        return longest_first[: min(fitting, sequences_per_update)]
    rows: list[int] = []
    room = max(budget, split.longest)
    for row in longest_first:
        if len(rows) == sequences_per_update or room < split.lengths[longest_first[-1]]:
            break
        if split.lengths[row] <= room:
            rows.append(int(row))
            room -= int(split.lengths[row])
    return np.array(rows)


def microbatches(
    split: Split,
    rows: np.ndarray,
    *,
    budget: int,
    packing: bool,
    device: torch.device,
    update: tuple[int, int] | None = None,
) -> Iterator[Microbatch]:
    """Yield the microbatches of one update; without packing, as many rows as would fit if each were padded.

    Args:
        update: The run's seed and the update's number, from which dropout follows; None where nothing is dropped.
    """
    rows = rows[split.lengths[rows] > 0]
    lengths = split.lengths[rows].tolist()
    groups = pack(lengths, budget) if packing else _in_order(lengths, budget)
    for group in groups:
        yield _assemble(split, rows[group], np.array(group), device, update)


def _in_order(lengths: list[int], budget: int) -> list[list[int]]:
    """As many neighbours as would fit if each were padded to the longest: what padding would have cost."""
    groups: list[list[int]] = []
    longest = 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        if groups and (len(groups[-1]) + 1) * longest <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
            longest = length
    return groups


def _assemble(
    split: Split, rows: np.ndarray, places: np.ndarray, device: torch.device, update: tuple[int, int] | None
) -> Microbatch:
    spans = [(int(split.offsets[row]), int(split.offsets[row + 1])) for row in rows]
    ids = np.concatenate([split.input_ids[start:end] for start, end in spans]).astype(np.int64)
    mask = np.concatenate([split.loss_mask[start:end] for start, end in spans]).astype(bool)
    lengths = np.array([end - start for start, end in spans])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    mask[starts[:-1]] = False  # nothing comes before the first token of a sequence
    (learnt,) = np.nonzero(mask)
    positions = np.arange(len(ids)) - np.repeat(starts[:-1], lengths)

    keys = None if update is None else token_keys(*update, np.repeat(places, lengths), positions)

    def there(array: np.ndarray, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        tensor = torch.as_tensor(array, dtype=dtype)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    return Microbatch(
        input_ids=there(ids)[None],
        position_ids=there(positions)[None],
        targets=there(ids[learnt]),
        predictors=there(learnt - 1),
        cu_seq_lens=there(starts, torch.int32),
        max_length=int(lengths.max()),
        real_tokens=len(ids),
        keys=None if keys is None else there(keys, torch.int32),
    )

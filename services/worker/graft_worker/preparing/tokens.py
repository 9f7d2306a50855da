"""From rendered rows to token arrays: tokenise, mark what is learnt, cut at the longest length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from graft_worker.preparing.rendering import Rendered

BATCH_ROWS = 1000  # rows handed to the tokenizer at once


@dataclass
class TokenRows:
    """Tokenised rows, and what was done to them."""

    ids: list[np.ndarray] = field(default_factory=list)  # int32 [tokens] each
    masks: list[np.ndarray] = field(default_factory=list)  # uint8 [tokens] each
    truncated: int = 0
    dropped: int = 0  # nothing was left to learn
    duplicates: int = 0
    lengths: list[int] = field(default_factory=list)  # of all rows before cutting

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def learnt_tokens(self) -> int:
        """Tokens that the model will learn; the first of a row has nothing to be predicted from."""
        return int(sum(mask[1:].sum() for mask in self.masks))

    def take(self, indices: Iterable[int]) -> TokenRows:
        """Some of the rows."""
        chosen = list(indices)
        return TokenRows(ids=[self.ids[index] for index in chosen], masks=[self.masks[index] for index in chosen])

    def save(self, path: Path) -> None:
        """Write the split as `graft_worker.protocol` describes it."""
        offsets = np.cumsum([0, *(len(row) for row in self.ids)]).astype(np.int64)
        tensors = {"input_ids": np.concatenate(self.ids), "loss_mask": np.concatenate(self.masks), "offsets": offsets}
        save_file(tensors, path)


def tokenize(rows: Iterable[Rendered], tokenizer: Any, *, max_length: int, learn_all: bool) -> TokenRows:
    """Tokenise rows in batches.

    The pieces of a row are tokenised apart, so that no token straddles the border between prompt and answer, and the
    model meets at training the very tokens of a prompt that it will meet when it is used.
    """
    made = TokenRows()
    seen: set[bytes] = set()
    source = iter(rows)
    while batch := list(islice(source, BATCH_ROWS)):
        texts = [piece.text for row in batch for piece in row.pieces]
        encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
        for row in batch:
            _add(made, row, [next(encoded) for _ in row.pieces], tokenizer, seen, max_length, learn_all)
    return made


def _add(
    made: TokenRows,
    row: Rendered,
    encoded: list[list[int]],
    tokenizer: Any,
    seen: set[bytes],
    max_length: int,
    learn_all: bool,
) -> None:
    ids: list[int] = []
    mask: list[int] = []
    begins = getattr(tokenizer, "bos_token_id", None)
    if not row.brings_specials and begins is not None and _adds_bos(tokenizer):
        ids.append(begins)
        mask.append(0)
    for piece, tokens in zip(row.pieces, encoded, strict=True):
        ids += tokens
        mask += [int(piece.learnt or learn_all)] * len(tokens)
    ends = getattr(tokenizer, "eos_token_id", None)
    if not row.brings_specials and ends is not None:
        ids.append(ends)
        mask.append(1)
    made.lengths.append(len(ids))
    made.truncated += len(ids) > max_length
    kept = np.array(ids[:max_length], dtype=np.int32)
    learnt = np.array(mask[:max_length], dtype=np.uint8)
    fingerprint = kept.tobytes()
    made.duplicates += fingerprint in seen
    seen.add(fingerprint)
    if len(kept) < 2 or not learnt[1:].any():
        made.dropped += 1
        return
    made.ids.append(kept)
    made.masks.append(learnt)


def _adds_bos(tokenizer: Any) -> bool:
    """Whether this tokenizer begins a text with its begin token, as its model was trained to see."""
    probe = tokenizer("a")["input_ids"]
    return bool(probe) and probe[0] == tokenizer.bos_token_id

"""From rendered rows to token arrays: tokenise, mark what is learnt, cut at the longest length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, islice, pairwise
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
    """Tokenise rows in batches, cut them at `max_length` tokens, and drop those that have nothing left to learn.

    The model meets at training the very tokens of a prompt that it will meet when it is used; see `encode`.
    """
    made = TokenRows()
    ends = Ends.of(tokenizer)
    seen: set[bytes] = set()
    source = iter(rows)
    while batch := list(islice(source, BATCH_ROWS)):
        for row, encoded in zip(batch, encode(batch, tokenizer), strict=True):
            ids, mask = ends.join(row, encoded)
            if learn_all:
                mask = [1] * len(ids)
            _add(made, ids, mask, seen, max_length)
    return made


def encode(rows: Sequence[Rendered], tokenizer: Any) -> list[list[list[int]]]:
    """The tokens of every piece of every row, without begin and end tokens.

    A row is tokenised whole, as the model will read it, wherever the tokens of each stretch up to a border are a prefix
    of the whole's. Where a token straddles a border, the pieces are tokenised apart. Most tokenizers give the same both
    ways; SentencePiece ones (Llama 2) do not: they put a space before every text, hence before every piece.
    """
    wholes = _encode(["".join(piece.text for piece in row.pieces) for row in rows], tokenizer)
    apart = iter(_encode([piece.text for row in rows for piece in row.pieces], tokenizer))
    encoded = []
    for row, whole in zip(rows, wholes, strict=True):
        pieces = [next(apart) for _ in row.pieces]
        if list(chain.from_iterable(pieces)) != whole:
            pieces = _cut_at_borders(row, whole, tokenizer) or pieces
        encoded.append(pieces)
    return encoded


def _cut_at_borders(row: Rendered, whole: list[int], tokenizer: Any) -> list[list[int]] | None:
    texts = list(accumulate(piece.text for piece in row.pieces[:-1]))
    prefixes = _encode(texts, tokenizer) if texts else []
    if any(whole[: len(prefix)] != prefix for prefix in prefixes):
        return None
    borders = [0, *(len(prefix) for prefix in prefixes), len(whole)]
    return [whole[start:end] for start, end in pairwise(borders)]


def _encode(texts: list[str], tokenizer: Any) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return encoded


@dataclass(frozen=True, kw_only=True)
class Ends:
    """The tokens that begin and end a text of this base; None where it has none."""

    begin: int | None  # only if the tokenizer itself begins a text with it, as its model was trained to see
    end: int | None

    @classmethod
    def of(cls, tokenizer: Any) -> Ends:
        """Ask the tokenizer."""
        begin = tokenizer.bos_token_id
        probe = tokenizer("a")["input_ids"]
        return cls(begin=begin if probe and probe[0] == begin else None, end=tokenizer.eos_token_id)

    def join(self, row: Rendered, encoded: list[list[int]]) -> tuple[list[int], list[int]]:
        """One row's tokens and their mask; the end is learnt, so that the model learns to stop."""
        ids = list(chain.from_iterable(encoded))
        mask = [int(piece.learnt) for piece, tokens in zip(row.pieces, encoded, strict=True) for _ in tokens]
        if row.brings_specials:
            return ids, mask
        before = [] if self.begin is None else [self.begin]
        after = [] if self.end is None else [self.end]
        return [*before, *ids, *after], [*(0 for _ in before), *mask, *(1 for _ in after)]


def _add(made: TokenRows, ids: list[int], mask: list[int], seen: set[bytes], max_length: int) -> None:
    made.lengths.append(len(ids))
    made.truncated += len(ids) > max_length
    kept = np.array(ids[:max_length], dtype=np.int32)
    learnt = np.array(mask[:max_length], dtype=np.uint8)
    fingerprint = hashlib.sha256(kept.tobytes()).digest()
    made.duplicates += fingerprint in seen
    seen.add(fingerprint)
    if not learnt[1:].any():
        made.dropped += 1
        return
    made.ids.append(kept)
    made.masks.append(learnt)

"""What the report says of the rows of a file: 16 bytes are remembered of each, and the first ones are shown."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np

from graft_worker.preparing.rendering import Piece, Rendered
from graft_worker.preparing.tokens import Ends, Tokenized

SHOWN_ROWS = 3
SHOWN_SPANS = 24  # of a row, and
SHOWN_CHARACTERS = 800  # of a span, half from each end: the report is kept in the database
LONG_TOKEN = 16  # characters; few tokens of any language have as many
BINS = 24  # of the histogram, up to the 99th percentile; one more holds the rest
PERCENTILES = (5, 50, 95, 100)


class Figures:
    """The rows of one file, counted."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._ends = Ends.of(tokenizer)
        self._lengths, self._learnt, self._fingerprints = array("I"), array("I"), array("Q")
        self.first_rows: list[dict[str, Any]] = []
        self.last_turn_only = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, rendered: Rendered, row: Tokenized) -> None:
        """Count a row."""
        self._lengths.append(len(row.ids))
        self._learnt.append(row.learnt_within(self._max_length))
        self._fingerprints.append(_fingerprint(rendered))
        self.last_turn_only += rendered.last_turn_only
        if len(self.first_rows) < SHOWN_ROWS:
            self.first_rows.append(self._shown(rendered, row))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row before it is cut, uint32 [rows]."""
        return np.frombuffer(self._lengths, dtype=np.uint32)

    @property
    def learnt(self) -> np.ndarray:
        """Tokens of each row that are learnt once it is cut, uint32 [rows]."""
        return np.frombuffer(self._learnt, dtype=np.uint32)

    @property
    def fingerprints(self) -> np.ndarray:
        """Eight bytes of each row's hash, uint64 [rows]: of a million rows, two clash by chance once in 10^7 files."""
        return np.frombuffer(self._fingerprints, dtype=np.uint64)

    @property
    def usable(self) -> np.ndarray:
        """Numbers of the rows that leave something to learn."""
        return np.flatnonzero(self.learnt)

    @property
    def truncated(self) -> int:
        """Rows that are longer than the longest length."""
        return int((self.lengths > self._max_length).sum())

    @property
    def duplicates(self) -> int:
        """Rows that stand earlier in the file already."""
        return len(self) - len(np.unique(self.fingerprints))

    def side(self, chosen: np.ndarray) -> dict[str, int]:
        """Rows and tokens of those that are trained or evaluated on."""
        tokens = np.minimum(self.lengths[chosen], self._max_length).sum(dtype=np.int64)
        learnt = self.learnt[chosen].sum(dtype=np.int64)
        return {"rows": len(chosen), "tokens": int(tokens), "trained_tokens": int(learnt)}

    def length_figures(self) -> dict[str, Any]:
        """Percentiles and a histogram of the rows' lengths; bin n holds those from edge n to before edge n + 1."""
        lengths = self.lengths
        low, high, top = int(lengths.min()), int(np.percentile(lengths, 99)), int(lengths.max())
        edges = np.unique([*np.linspace(low, high + 1, BINS + 1).astype(int), top + 1])
        counts, _ = np.histogram(lengths, bins=edges)
        return {
            "percentiles": {str(share): int(np.percentile(lengths, share)) for share in PERCENTILES},
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        }

    def _shown(self, rendered: Rendered, row: Tokenized) -> dict[str, Any]:
        spans = list(self._spans(rendered, row))
        return {
            "line": rendered.line,
            "tokens": len(row.ids),
            "spans": spans[:SHOWN_SPANS],
            "spans_left_out": max(0, len(spans) - SHOWN_SPANS),
        }

    def _spans(self, rendered: Rendered, row: Tokenized) -> Iterator[dict[str, Any]]:
        """The row's text as the model reads it: what is learnt of it, and what lies beyond the longest length."""
        left = self._characters_kept(rendered, row)
        for piece in self._with_ends(rendered):
            kept, cut = piece.text[:left], piece.text[left:]
            left = max(0, left - len(piece.text))
            if kept:
                yield {**_shortened(kept), "trained": piece.learnt, "cut": False}
            if cut:
                yield {**_shortened(cut), "trained": False, "cut": True}

    def _with_ends(self, rendered: Rendered) -> Iterator[Piece]:
        begin, end = (None, None) if rendered.brings_specials else (self._ends.begin, self._ends.end)
        if begin is not None:
            yield Piece(text=self._tokenizer.convert_ids_to_tokens(begin), learnt=False)
        yield from rendered.pieces
        if end is not None:
            yield Piece(text=self._tokenizer.convert_ids_to_tokens(end), learnt=True)

    def _characters_kept(self, rendered: Rendered, row: Tokenized) -> int:
        """How much of the text lies within the longest length; all of it where the tokenizer cannot tell."""
        text = "".join(piece.text for piece in self._with_ends(rendered))
        if len(row.ids) <= self._max_length or not self._tokenizer.is_fast:
            return len(text)
        begun = text[: LONG_TOKEN * self._max_length]
        offsets = self._tokenizer.backend_tokenizer.encode(begun, add_special_tokens=False).offsets
        return int(offsets[self._max_length][0]) if len(offsets) > self._max_length else len(begun)


def overlap(train: np.ndarray, held_out: np.ndarray) -> int:
    """How many held-out rows stand among the training rows too, by their fingerprints."""
    return int(np.isin(held_out, train).sum())


def _fingerprint(rendered: Rendered) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for piece in rendered.pieces:
        digest.update(b"\x01" if piece.learnt else b"\x00")
        digest.update(piece.text.encode())
    return int.from_bytes(digest.digest(), "little")


def _shortened(text: str) -> dict[str, Any]:
    left_out = len(text) - SHOWN_CHARACTERS
    if left_out <= 0:
        return {"text": text, "left_out": 0}
    half = SHOWN_CHARACTERS // 2
    return {"text": f"{text[:half]} … {text[-half:]}", "left_out": left_out}

"""From rendered rows to tokens: tokenise on every core, mark what is learnt, cut at the longest length."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from graft_worker.preparing.rendering import Rendered

# Rows handed to the tokenizer at once: enough for all cores, and few enough that what they become fits beside the rest.
BATCH_ROWS = 1000
BATCH_CHARACTERS = 2_000_000
LONGEST_TEXT = 500_000  # characters tokenised at once: the tokenizer holds some 250 bytes for each
KNOWN_TAILS = 10_000  # remembered tokens of what stands between a special token and a border; see `Encoder`
LONGEST_TAIL = 200  # characters
MOST_PREFIX_CHARACTERS = 20_000_000  # of one row: all stretches up to a border together grow with its turns' square

Encoded = tuple[list[int], list[int]]
"""A row's tokens, and for each of its pieces how many of them lie up to its end."""


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A row's tokens before they are cut, and the stretches of them that are learnt."""

    ids: list[int]
    learnt: list[tuple[int, int]]

    def learnt_within(self, max_length: int) -> int:
        """How many tokens the model will learn; the first of a row has nothing to be predicted from."""
        return sum(max(0, min(end, max_length) - max(start, 1)) for start, end in self.learnt)

    def mask(self, max_length: int) -> np.ndarray:
        """1 where a token is learnt, uint8, for the row as it is cut."""
        mask = np.zeros(min(len(self.ids), max_length), dtype=np.uint8)
        for start, end in self.learnt:
            mask[start:end] = 1
        return mask


@dataclass
class TokenRows:
    """Tokenised rows as they are trained on: cut, and with something to learn in each."""

    ids: list[np.ndarray] = field(default_factory=list)  # int32 [tokens] each
    masks: list[np.ndarray] = field(default_factory=list)  # uint8 [tokens] each

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, row: Tokenized, max_length: int) -> None:
        """Keep a row, unless nothing of it is left to learn."""
        if row.learnt_within(max_length):
            self.ids.append(np.array(row.ids[:max_length], dtype=np.int32))
            self.masks.append(row.mask(max_length))

    def take(self, indices: Iterable[int]) -> TokenRows:
        """Some of the rows."""
        chosen = list(indices)
        return TokenRows(ids=[self.ids[index] for index in chosen], masks=[self.masks[index] for index in chosen])

    def save(self, path: Path) -> None:
        """Write the split as `graft_worker.protocol` describes it."""
        offsets = np.cumsum([0, *(len(row) for row in self.ids)]).astype(np.int64)
        tensors = {"input_ids": np.concatenate(self.ids), "loss_mask": np.concatenate(self.masks), "offsets": offsets}
        save_file(tensors, path)


def tokenize(rows: Iterable[Rendered], tokenizer: Any) -> Iterator[tuple[Rendered, Tokenized]]:
    """Tokenise rows in batches: while the tokenizer's threads are at one, the next is read and rendered.

    The model meets at training the very tokens of a prompt that it will meet when it is used; see `Encoder`.
    """
    ends = Ends.of(tokenizer)
    for batch, encoded in _encoded_beside(rows, Encoder(tokenizer)):
        for row, (ids, borders) in zip(batch, encoded, strict=True):
            yield row, ends.join(row, ids, borders)


def _encoded_beside(rows: Iterable[Rendered], encoder: Encoder) -> Iterator[tuple[list[Rendered], list[Encoded]]]:
    source = iter(rows)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="encoder") as beside:
        before: tuple[list[Rendered], Future[list[Encoded]]] | None = None
        while batch := _next_batch(source):
            encoding = beside.submit(encoder.encode, batch)
            if before is not None:
                yield before[0], before[1].result()
            before = batch, encoding
        if before is not None:
            yield before[0], before[1].result()


def _next_batch(source: Iterator[Rendered]) -> list[Rendered]:
    batch: list[Rendered] = []
    characters = 0
    while len(batch) < BATCH_ROWS and characters < BATCH_CHARACTERS and (row := next(source, None)) is not None:
        batch.append(row)
        characters += sum(len(piece.text) for piece in row.pieces)
    return batch


@dataclass(frozen=True, slots=True)
class _Tails:
    """Of one row: its special tokens, and for each border which of them is the last before it and the text since."""

    specials: list[int]
    tails: list[tuple[int, str]]

    def places_in(self, whole: list[int]) -> list[int] | None:
        """Where the special tokens stand; None unless they are all that there are, and in their order."""
        if sum(map(whole.count, set(self.specials))) != len(self.specials):
            return None
        places, place = [], -1
        for token in self.specials:
            try:
                place = whole.index(token, place + 1)
            except ValueError:
                return None
            places.append(place)
        return places


class Encoder:
    """The tokens of rows, without begin and end tokens, and where in them each piece ends.

    A row is tokenised whole, as the model will read it, wherever the tokens of each stretch up to a border are a prefix
    of the whole's. Where a token straddles a border, the pieces are tokenised apart. Most tokenizers give the same both
    ways; SentencePiece ones (Llama 2) do not: they put a space before every text, hence before every piece.

    No token reaches over a special one, and what stands before it has no say in the tokens behind. So of a stretch that
    holds special tokens, as a chat template's do, only its tail from the last one on is tokenised, and that is the same
    in most rows: there a row costs no more than its own tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._encode = _plain_encoder(tokenizer)
        added: dict[int, Any] = tokenizer.added_tokens_decoder
        specials = {number: token.content for number, token in added.items() if token.special and not token.normalized}
        self._special_ids = {content: number for number, content in specials.items()}
        longest_first = sorted(specials.values(), key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._tails: dict[str, list[int]] = {}

    def encode(self, rows: Sequence[Rendered]) -> list[Encoded]:
        """Tokenise a batch."""
        texts = ["".join(piece.text for piece in row.pieces) for row in rows]
        wholes = self._encode(texts)
        borders = self._borders_by_specials(rows, texts, wholes)
        left = [index for index, found in enumerate(borders) if found is None]
        encoded = [(whole, found or []) for whole, found in zip(wholes, borders, strict=True)]
        for index, made in zip(left, self._by_pieces([rows[i] for i in left], [wholes[i] for i in left]), strict=True):
            encoded[index] = made
        return encoded

    def _borders_by_specials(
        self, rows: Sequence[Rendered], texts: Sequence[str], wholes: Sequence[list[int]]
    ) -> list[list[int] | None]:
        tails = [self._tails_of(row, text) for row, text in zip(rows, texts, strict=True)]
        if len(self._tails) > KNOWN_TAILS:
            self._tails.clear()
        unknown = sorted({tail for found in tails if found for _, tail in found.tails} - self._tails.keys())
        self._tails.update(zip(unknown, self._encode(unknown), strict=True))
        return [self._borders(whole, found) for whole, found in zip(wholes, tails, strict=True)]

    def _tails_of(self, row: Rendered, text: str) -> _Tails | None:
        if len(row.pieces) == 1:
            return _Tails([], [])
        found = list(self._specials.finditer(text))
        ends = [match.end() for match in found]
        tails = []
        for border in accumulate(len(piece.text) for piece in row.pieces[:-1]):
            before = bisect_right(ends, border)
            if before == 0 or (before < len(found) and found[before].start() < border):
                return None
            tail = text[found[before - 1].start() : border]
            if len(tail) > LONGEST_TAIL:
                return None
            tails.append((before - 1, tail))
        return _Tails([self._special_ids[match[0]] for match in found], tails)

    def _borders(self, whole: list[int], found: _Tails | None) -> list[int] | None:
        if found is None or (places := found.places_in(whole)) is None:
            return None
        borders = []
        for index, tail in found.tails:
            known = self._tails[tail]
            start, end = places[index], places[index] + len(known)
            if whole[start:end] != known:
                return None
            borders.append(end)
        return [*borders, len(whole)]

    def _by_pieces(self, rows: Sequence[Rendered], wholes: Sequence[list[int]]) -> Iterator[Encoded]:
        """Where the pieces before the last are the beginning of the whole, it can be cut behind them."""
        firsts = iter(self._encode([piece.text for row in rows for piece in row.pieces[:-1]]))
        for row, whole in zip(rows, wholes, strict=True):
            pieces = [next(firsts) for _ in row.pieces[:-1]]
            borders = list(accumulate(map(len, pieces)))
            begun = list(chain.from_iterable(pieces))
            if whole[: len(begun)] == begun:
                yield whole, [*borders, len(whole)]
            elif (found := self._by_stretches(row, whole)) is not None:
                yield whole, found
            else:
                begun += self._encode([row.pieces[-1].text])[0]
                yield begun, [*borders, len(begun)]

    def _by_stretches(self, row: Rendered, whole: list[int]) -> list[int] | None:
        stretches = list(accumulate(piece.text for piece in row.pieces[:-1]))
        if sum(map(len, stretches)) > MOST_PREFIX_CHARACTERS:
            return None
        prefixes = self._encode(stretches)
        if any(whole[: len(prefix)] != prefix for prefix in prefixes):
            return None
        return [*map(len, prefixes), len(whole)]


def _plain_encoder(tokenizer: Any) -> Callable[[Sequence[str]], list[list[int]]]:
    """The tokens of texts as they stand. A fast tokenizer is asked past its wrapper, which makes lists of no use here.

    Truncation and padding that a tokenizer's file may ask for are switched off.
    """
    if not tokenizer.is_fast:
        return lambda texts: list(tokenizer(list(texts), add_special_tokens=False)["input_ids"]) if texts else []
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()

    def tokens(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode(texts: Sequence[str]) -> list[list[int]]:
        encoded = iter(tokens([text for text in texts if len(text) <= LONGEST_TEXT]))
        return [next(encoded) if len(text) <= LONGEST_TEXT else _in_slices(text, tokens) for text in texts]

    return encode


def _in_slices(text: str, tokens: Callable[[list[str]], list[list[int]]]) -> list[int]:
    """The tokens of a very long text, slice by slice, each cut before a space: there most tokenizers break anyway."""
    ids: list[int] = []
    start = 0
    while start < len(text):
        end = start + LONGEST_TEXT
        if end < len(text) and (space := text.rfind(" ", start + 1, end)) > 0:
            end = space
        ids += tokens([text[start:end]])[0]
        start = end
    return ids


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

    def join(self, row: Rendered, ids: list[int], borders: Sequence[int]) -> Tokenized:
        """One row's tokens and what is learnt of them; the end is, so that the model learns to stop."""
        starts = [0, *borders[:-1]]
        stretches = zip(row.pieces, starts, borders, strict=True)
        learnt = [(start, end) for piece, start, end in stretches if piece.learnt and start < end]
        if row.brings_specials:
            return Tokenized(ids, learnt)
        if self.end is not None:
            learnt.append((len(ids), len(ids) + 1))
            ids = [*ids, self.end]
        if self.begin is not None:
            learnt = [(start + 1, end + 1) for start, end in learnt]
            ids = [self.begin, *ids]
        return Tokenized(ids, learnt)

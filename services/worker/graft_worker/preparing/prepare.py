"""The whole of preparing: read, check, render, tokenise, split, report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import AutoTokenizer

from graft_shared.errors import InvalidParameter, InvalidTrainingFile, NoTrainableTokens
from graft_shared.rows import Row, RowKind, lines_of, read_rows
from graft_shared.specs import JobSpec, Validation
from graft_worker.preparing.rendering import Rendered, render
from graft_worker.preparing.tokens import TokenRows, tokenize
from graft_worker.protocol import EventWriter, PreparedEvent, PrepareRequest, WarningEvent

SHOWN_ROWS = 3
SHOWN_CHARACTERS = 2000  # of each piece of a shown row: the report is kept in the job's row
MANY_TRUNCATED = 0.05  # of the rows: then the user hears of it
CHAT_KINDS = (RowKind.MESSAGES, RowKind.SHAREGPT)


def prepare(workdir: Path, request: PrepareRequest, events: EventWriter) -> None:
    """Leave `prepared/` in the work folder, and say what is in it.

    Raises:
        InvalidTrainingFile, InvalidParameter, NoTrainableTokens: The user has to change something.
    """
    spec = JobSpec.model_validate(request.spec)
    tokenizer = AutoTokenizer.from_pretrained(request.tokenizer_path, local_files_only=True)
    source = RowSource(Path(request.train_file), tokenizer, param="dataset")
    rows = _tokenize(source, tokenizer, spec)
    if request.validation_file is not None:
        held_source = RowSource(Path(request.validation_file), tokenizer, param="validation.file")
        held = _tokenize(held_source, tokenizer, spec)
    elif spec.validation is not None and spec.validation.split is not None:
        rows, held = split(rows, spec.validation, spec.training.seed)
    else:
        held = None
    folder = workdir / "prepared"
    folder.mkdir()
    rows.save(folder / "train.safetensors")
    if held is not None:
        held.save(folder / "validation.safetensors")
    report = _report(source, rows, held)
    (folder / "report.json").write_text(json.dumps(report))
    for warning in _warnings(source, tokenizer, spec, report):
        events.emit(warning)
    events.emit(PreparedEvent(report=report))


class RowSource:
    """The rendered rows of one file; remembers the kind and the first rows for the report."""

    def __init__(self, path: Path, tokenizer: Any, *, param: str) -> None:
        self._path = path
        self._tokenizer = tokenizer
        self.param = param
        self.kind: RowKind | None = None
        self.shown: list[list[dict[str, Any]]] = []
        self.last_turn_only = 0

    def __iter__(self) -> Iterator[Rendered]:
        with self._path.open("rb") as file:
            try:
                for number, kind, row in read_rows(lines_of(file)):
                    self.kind = kind
                    rendered = self._render(number, kind, row)
                    self.last_turn_only += rendered.last_turn_only
                    if len(self.shown) < SHOWN_ROWS:
                        self.shown.append(_shown(rendered))
                    yield rendered
            except InvalidTrainingFile as error:
                error.param = self.param
                raise

    def _render(self, number: int, kind: RowKind, row: Row) -> Rendered:
        try:
            return render(kind, row, self._tokenizer)
        except TemplateError as error:
            reason = f"the base's chat template refuses the row: {error}".rstrip(".")
            raise InvalidTrainingFile(line=number, reason=reason) from error


def _shown(rendered: Rendered) -> list[dict[str, Any]]:
    return [{"text": piece.text[:SHOWN_CHARACTERS], "learnt": piece.learnt} for piece in rendered.pieces]


def split(rows: TokenRows, validation: Validation, seed: int) -> tuple[TokenRows, TokenRows]:
    """Hold out rows, the same ones for the same seed.

    Raises:
        InvalidParameter: There are too few rows for both sides.
    """
    if len(rows) < 2:
        raise InvalidParameter(param="validation.split", reason=f"{len(rows)} usable row cannot be split in two")
    count = validation.rows_held_out(len(rows))
    order = np.random.default_rng(seed).permutation(len(rows))
    held, kept = sorted(order[:count]), sorted(order[count:])
    train, held_out = rows.take(kept), rows.take(held)
    train.truncated, train.dropped, train.duplicates = rows.truncated, rows.dropped, rows.duplicates
    train.lengths = rows.lengths
    return train, held_out


def _tokenize(source: RowSource, tokenizer: Any, spec: JobSpec) -> TokenRows:
    wanted = spec.training.completion_only_loss
    rows = tokenize(source, tokenizer, max_length=spec.training.max_length, learn_all=wanted is False)
    if source.kind is None:
        raise InvalidTrainingFile(line=1, reason="the file holds no rows", param=source.param)
    if wanted is True and source.kind is RowKind.TEXT:
        reason = "rows of kind 'text' have no completion; use 'auto' or give 'prompt' and 'completion'"
        raise InvalidParameter(param="training.completion_only_loss", reason=reason)
    if not len(rows):
        longest = spec.training.max_length
        reason = f"in all {rows.dropped} rows the part to learn lies beyond 'max_length' ({longest} tokens) or is empty"
        raise NoTrainableTokens(param="training.max_length", reason=reason, rows=rows.dropped, max_length=longest)
    return rows


def _report(source: RowSource, rows: TokenRows, held: TokenRows | None) -> dict[str, Any]:
    lengths = np.array(rows.lengths)
    return {
        "kind": str(source.kind),
        "rows": len(rows),
        "validation_rows": len(held) if held is not None else 0,
        "tokens": int(sum(len(row) for row in rows.ids)),
        "learnt_tokens": rows.learnt_tokens,
        "length_percentiles": {str(share): int(np.percentile(lengths, share)) for share in (5, 50, 95, 100)},
        "truncated": rows.truncated,
        "dropped": rows.dropped,
        "duplicates": rows.duplicates,
        "first_rows": source.shown,
    }


def _warnings(source: RowSource, tokenizer: Any, spec: JobSpec, report: dict[str, Any]) -> Iterator[WarningEvent]:
    every = report["rows"] + report["validation_rows"] + report["dropped"]
    if report["truncated"] > MANY_TRUNCATED * every:
        message = f"{report['truncated']} of {every} rows were cut at 'max_length' ({spec.training.max_length} tokens)."
        yield WarningEvent(code="rows_truncated", message=message)
    if report["dropped"]:
        message = f"{report['dropped']} of {every} rows were left out: nothing of them is left to learn."
        yield WarningEvent(code="rows_dropped", message=message)
    if report["duplicates"]:
        message = f"{report['duplicates']} of {every} rows stand in the data more than once."
        yield WarningEvent(code="rows_duplicated", message=message)
    if source.kind in CHAT_KINDS and tokenizer.chat_template is None:
        message = "The base has no chat template: turns are written as '### User:' and '### Assistant:'."
        yield WarningEvent(code="plain_chat_template", message=message)
    if source.last_turn_only:
        message = f"The chat template rewrites history: of {source.last_turn_only} rows only the last answer is learnt."
        yield WarningEvent(code="last_turn_only", message=message)

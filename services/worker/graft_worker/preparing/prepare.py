"""The whole of preparing: read, check, render, tokenise, split, report. A report alone leaves the tokens out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import AutoTokenizer

from graft_shared.errors import InvalidParameter, InvalidTrainingFile, NoTrainableTokens, UnsupportedBaseModel
from graft_shared.rows import CHAT_KINDS, Row, RowKind, lines_of, read_rows
from graft_shared.specs import JobSpec, ReportSpec
from graft_worker.preparing.figures import Figures, overlap
from graft_worker.preparing.rendering import ChatTemplate, Rendered, as_one_piece, render
from graft_worker.preparing.tokens import TokenRows, tokenize
from graft_worker.protocol import PLAIN_CHAT, EventWriter, PreparedEvent, PrepareRequest, ReportRequest, WarningEvent

READ_BYTES = 1024 * 1024
MANY_TRUNCATED = 0.05  # of the rows: then the user hears of it


def prepare(workdir: Path, request: PrepareRequest, events: EventWriter) -> None:
    """Leave `prepared/` in the work folder, and say what is in it.

    Raises:
        InvalidTrainingFile, InvalidParameter, NoTrainableTokens, UnsupportedBaseModel: The user must change something.
    """
    spec = ReportSpec.of(JobSpec.model_validate(request.spec))
    tokenizer = load_tokenizer(request.tokenizer_path, spec)
    rows, held_rows = TokenRows(), TokenRows()
    data = _read(request.train_file, tokenizer, spec, rows, param="dataset")
    _require_tokens(data, spec)
    held = None
    if request.validation_file is not None:
        held = _read(request.validation_file, tokenizer, spec, held_rows, param="validation.file")
        _require_tokens(held, spec)
    kept, held_out = split(len(rows), spec)
    if held is None:
        held_rows = rows.take(held_out)
    folder = workdir / "prepared"
    folder.mkdir()
    rows.take(kept).save(folder / "train.safetensors")
    if len(held_rows):
        held_rows.save(folder / "validation.safetensors")
    report = _report(data, held, kept, held_out, spec, tokenizer)
    (folder / "report.json").write_text(json.dumps(report))
    for warning in report["warnings"]:
        events.emit(WarningEvent.model_validate(warning))
    events.emit(PreparedEvent(report=report))


def report(request: ReportRequest, events: EventWriter) -> None:
    """Say what a job would learn from a file.

    Raises:
        InvalidTrainingFile, InvalidParameter, UnsupportedBaseModel: The user has to change something.
    """
    spec = ReportSpec.model_validate(request.spec)
    tokenizer = load_tokenizer(request.tokenizer_path, spec)
    data = _read(request.train_file, tokenizer, spec, None, param="dataset")
    held = None
    if request.validation_file is not None:
        held = _read(request.validation_file, tokenizer, spec, None, param="validation.file")
    kept, held_out = split(len(data.figures.usable), spec)
    events.emit(PreparedEvent(report=_report(data, held, kept, held_out, spec, tokenizer)))


def load_tokenizer(path: str, spec: ReportSpec) -> Any:
    """The base's tokenizer, from its folder on this machine.

    Raises:
        UnsupportedBaseModel: There is none that can be read.
    """
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        reason = f"its tokenizer cannot be read ({type(error).__name__})"
        raise UnsupportedBaseModel(base_model=spec.base_model, reason=reason, param="base_model") from error


@dataclass(frozen=True, kw_only=True)
class _Read:
    """A file that was read to its end."""

    kind: RowKind
    figures: Figures
    param: str


class RowSource:
    """The rendered rows of one file; remembers their kind."""

    def __init__(self, path: Path, tokenizer: Any, *, param: str) -> None:
        self._path = path
        self._chat = ChatTemplate(tokenizer)
        self.param = param
        self.kind: RowKind | None = None

    def __iter__(self) -> Iterator[Rendered]:
        with self._path.open("rb", buffering=READ_BYTES) as file:
            try:
                for number, kind, row in read_rows(lines_of(file)):
                    self.kind = kind
                    yield self._render(number, kind, row)
            except InvalidTrainingFile as error:
                error.param = self.param
                raise

    def _render(self, number: int, kind: RowKind, row: Row) -> Rendered:
        try:
            return render(kind, row, self._chat, line=number)
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            reason = f"the base's chat template refuses the row: {error}".rstrip(".")
            raise InvalidTrainingFile(line=number, reason=reason) from error


def split(rows: int, spec: ReportSpec) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows to train on and of those to hold out, of so many usable ones; the same for the same seed.

    Raises:
        InvalidParameter: There are too few rows for both sides.
    """
    if spec.validation is None or spec.validation.split is None or rows == 0:
        return np.arange(rows), np.arange(0)
    if rows < 2:
        raise InvalidParameter(param="validation.split", reason=f"{rows} usable row cannot be split in two")
    count = spec.validation.rows_held_out(rows)
    order = np.random.default_rng(spec.seed).permutation(rows)
    return np.sort(order[count:]), np.sort(order[:count])


def _read(path: str, tokenizer: Any, spec: ReportSpec, keep: TokenRows | None, *, param: str) -> _Read:
    source, figures = RowSource(Path(path), tokenizer, param=param), Figures(tokenizer, spec.max_length)
    rendered_rows: Iterator[Rendered] = iter(source)
    if spec.completion_only_loss is False:
        rendered_rows = map(as_one_piece, rendered_rows)
    for rendered, row in tokenize(rendered_rows, tokenizer):
        figures.add(rendered, row)
        if keep is not None:
            keep.add(row, spec.max_length)
    if source.kind is None:
        raise InvalidTrainingFile(line=1, reason="the file holds no rows", param=param)
    if spec.completion_only_loss is True and source.kind is RowKind.TEXT:
        reason = "rows of kind 'text' have no completion; use 'auto' or give 'prompt' and 'completion'"
        raise InvalidParameter(param="training.completion_only_loss", reason=reason)
    return _Read(kind=source.kind, figures=figures, param=param)


def _require_tokens(read: _Read, spec: ReportSpec) -> None:
    if not len(read.figures.usable):
        rows, longest = len(read.figures), spec.max_length
        reason = f"in all {rows} rows the part to learn lies beyond 'max_length' ({longest} tokens) or is empty"
        raise NoTrainableTokens(param="training.max_length", reason=reason, rows=rows, max_length=longest)


def _report(
    data: _Read, held: _Read | None, kept: np.ndarray, held_out: np.ndarray, spec: ReportSpec, tokenizer: Any
) -> dict[str, Any]:
    figures = data.figures
    train = figures.usable[kept]
    side, chosen = (figures, figures.usable[held_out]) if held is None else (held.figures, held.figures.usable)
    validation = None
    if spec.validation is not None:
        common = overlap(figures.fingerprints[train], side.fingerprints[chosen])
        validation = {**side.side(chosen), "overlap_rows": common}
    found = {
        "kind": str(data.kind),
        "rows": len(figures),
        "max_length": spec.max_length,
        "train": figures.side(train),
        "validation": validation,
        "truncated_rows": figures.truncated,
        "truncated_share": figures.truncated / len(figures),
        "duplicate_rows": figures.duplicates,
        "nothing_to_learn_rows": len(figures) - len(figures.usable),
        "lengths": figures.length_figures(),
        "first_rows": figures.first_rows,
    }
    warnings = _warnings(data, found, spec, tokenizer)
    return {**found, "warnings": [{"code": code, "message": message} for code, message in warnings]}


def _warnings(data: _Read, found: dict[str, Any], spec: ReportSpec, tokenizer: Any) -> Iterator[tuple[str, str]]:
    rows, validation = found["rows"], found["validation"]
    if found["nothing_to_learn_rows"] == rows:
        yield "no_trainable_tokens", f"None of {rows} rows leaves anything to learn: a job would be refused."
    elif found["nothing_to_learn_rows"]:
        yield "rows_dropped", f"{found['nothing_to_learn_rows']} of {rows} rows are left out: nothing is left to learn."
    if found["truncated_rows"] > MANY_TRUNCATED * rows:
        yield (
            "rows_truncated",
            f"{found['truncated_rows']} of {rows} rows are cut at 'max_length' ({spec.max_length} tokens).",
        )
    if found["duplicate_rows"]:
        yield "rows_duplicated", f"{found['duplicate_rows']} of {rows} rows stand in the data more than once."
    if validation is not None and validation["overlap_rows"]:
        message = f"{validation['overlap_rows']} of {validation['rows']} validation rows are trained on as well"
        yield "validation_overlap", f"{message}: 'eval_loss' will look better than it is."
    if data.kind in CHAT_KINDS and tokenizer.chat_template is None:
        message = "The base has no chat template: turns are written as '### User:' and '### Assistant:'."
        yield PLAIN_CHAT, message
    if data.figures.last_turn_only:
        message = (
            f"The chat template rewrites history: of {data.figures.last_turn_only} rows only the last answer is learnt."
        )
        yield "last_turn_only", message

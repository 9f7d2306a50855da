"""JSONL rows: which kind they are, whether each is sound, and the line that is not; one line at a time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, BinaryIO

from graft_shared.errors import InvalidTrainingFile

MAX_LINE_BYTES = 10 * 1024 * 1024
MAX_ROWS = 20_000_000
MAX_DEPTH = 16
MAX_TURNS = 512  # of one chat: each answer is rendered with all that came before it
MAX_VALUES = 100_000  # in one row: each costs some hundred bytes once it is read, so that a line could fill a gigabyte

_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_ESCAPED_NUL = b"\\u0000"
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"')
_BORDERS = (b",", b"[", b"{")  # before each value but the first stands one of these

Row = dict[str, Any]


class RowKind(StrEnum):
    """The shapes of row that are understood."""

    TEXT = "text"
    MESSAGES = "messages"
    PROMPT_COMPLETION = "prompt_completion"
    ALPACA = "alpaca"
    SHAREGPT = "sharegpt"


CHAT_KINDS = (RowKind.MESSAGES, RowKind.SHAREGPT)  # written in the base's chat template, or in a plain one

# The keys that make a row of each kind; the first kind whose keys are all there is the row's.
_KEYS: dict[RowKind, tuple[str, ...]] = {
    RowKind.MESSAGES: ("messages",),
    RowKind.SHAREGPT: ("conversations",),
    RowKind.PROMPT_COMPLETION: ("prompt", "completion"),
    RowKind.ALPACA: ("instruction", "output"),
    RowKind.TEXT: ("text",),
}
_ROLES = {"system", "user", "assistant"}
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True, kw_only=True)
class RowsReport:
    """What is known of a file once every line was checked."""

    rows: int
    kind: RowKind
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"rows": self.rows, "kind": self.kind.value, "bytes": self.bytes}


def check_lines(lines: Iterable[bytes]) -> RowsReport:
    """Check a whole file, a line at a time.

    Raises:
        InvalidTrainingFile: Some line is not a sound row of the first one's kind; says which and why.
    """
    rows, kind, size = 0, None, 0

    def counted() -> Iterator[bytes]:
        nonlocal size
        for line in lines:
            size += len(line)
            yield line

    for _, row_kind, _ in read_rows(counted()):
        rows, kind = rows + 1, row_kind
    if kind is None:
        raise InvalidTrainingFile(line=1, reason="the file holds no rows")
    return RowsReport(rows=rows, kind=kind, bytes=size)


def lines_of(source: BinaryIO) -> Iterator[bytes]:
    """The lines of an open file; one that is too long is cut, so that it is refused and never held whole."""
    while line := source.readline(MAX_LINE_BYTES + 1):
        yield line


def read_rows(lines: Iterable[bytes]) -> Iterator[tuple[int, RowKind, Row]]:
    """Yield (line number from 1, kind, row) for every row; blank lines are passed over.

    Raises:
        InvalidTrainingFile: As `check_lines`.
    """
    first_kind: RowKind | None = None
    rows = 0
    for number, line in enumerate(lines, start=1):
        if len(line) > MAX_LINE_BYTES:
            raise InvalidTrainingFile(line=number, reason=f"the line has more than {MAX_LINE_BYTES} bytes")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        row = _parse(line, number)
        kind = _kind_of(row, number)
        first_kind = first_kind or kind
        if kind is not first_kind:
            raise InvalidTrainingFile(
                line=number, reason=f"a row of kind '{kind}' in a file that began with '{first_kind}'; use one kind"
            )
        rows += 1
        if rows > MAX_ROWS:
            raise InvalidTrainingFile(line=number, reason=f"the file has more than {MAX_ROWS} rows")
        _CHECKS[kind](row, number)
        yield number, kind, row


def messages_of(kind: RowKind, row: Row) -> list[dict[str, str]]:
    """A chat row as `[{"role", "content"}, …]`, whichever of the two chat shapes it has."""
    if kind is RowKind.SHAREGPT:
        return [{"role": _SHAREGPT_ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
    return [{"role": message["role"], "content": message["content"]} for message in row["messages"]]


def _parse(line: bytes, number: int) -> Row:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidTrainingFile(line=number, reason=f"byte {error.start + 1} is not valid UTF-8") from error

    if _holds_many_values(line):
        raise InvalidTrainingFile(line=number, reason=f"one row holds more than {MAX_VALUES} values")
    row = _load(text, number)
    if not isinstance(row, dict):
        raise InvalidTrainingFile(line=number, reason=f"a row is a JSON object, found {_name(row)}")
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _depth(row) > MAX_DEPTH:
        raise InvalidTrainingFile(line=number, reason=f"nested deeper than {MAX_DEPTH} levels")
    if _ESCAPED_SURROGATE.search(line) and not _is_unicode(row):
        raise InvalidTrainingFile(line=number, reason="a \\u escape names half a character, which is not valid Unicode")
    if _ESCAPED_NUL in line and _holds_nul(row):
        raise InvalidTrainingFile(line=number, reason="a text holds the NUL character")
    return row


def _holds_many_values(line: bytes) -> bool:
    """Whether JSON holds more than `MAX_VALUES`; what stands in texts is looked past only where it could matter."""
    if sum(map(line.count, _BORDERS)) <= MAX_VALUES:
        return False
    bare = _STRING.sub(b"", line)
    return sum(map(bare.count, _BORDERS)) > MAX_VALUES


def _holds_nul(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_nul(part) for pair in value.items() for part in pair)
    if isinstance(value, list):
        return any(map(_holds_nul, value))
    return isinstance(value, str) and "\0" in value


class _NotStrict(Exception):
    """JSON that `json` takes and we do not."""


def _pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(found)
    if len(made) < len(found):
        names = [name for name, _ in found]
        twice = next(name for name in names if names.count(name) > 1)
        raise _NotStrict(f"the key '{twice}' stands twice in one object")
    return made


def _constant(name: str) -> Any:
    raise _NotStrict(f"{name} is not valid JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _NotStrict(f"the number {digits[:20]} is too large")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_finite)


def _load(text: str, number: int) -> Any:
    """Read JSON strictly: no key twice, no number that JSON does not know."""
    try:
        return _DECODER.decode(text.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise InvalidTrainingFile(line=number, reason=f"not valid JSON at column {error.colno}: {error.msg}") from error
    except _NotStrict as error:
        raise InvalidTrainingFile(line=number, reason=str(error)) from error
    except ValueError as error:  # an integer of more digits than Python reads
        raise InvalidTrainingFile(line=number, reason="a number has thousands of digits") from error
    except RecursionError as error:
        raise InvalidTrainingFile(line=number, reason=f"nested deeper than {MAX_DEPTH} levels") from error


def _is_unicode(row: Row) -> bool:
    """Whether every text can be written as UTF-8; one half of a surrogate pair cannot, and no tokenizer takes it."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind_of(row: Row, number: int) -> RowKind:
    for kind, keys in _KEYS.items():
        if all(key in row for key in keys):
            return kind
    wanted = "; ".join(" + ".join(keys) for keys in _KEYS.values())
    found = ", ".join(list(row)[:6]) or "nothing"
    raise InvalidTrainingFile(line=number, reason=f"no known kind of row: found the keys {found}; give {wanted}")


def _check_text(row: Row, number: int) -> None:
    _want_text(row, "text", number)


def _check_pair(row: Row, number: int) -> None:
    _want_text(row, "prompt", number, may_be_empty=True)
    _want_text(row, "completion", number)


def _check_alpaca(row: Row, number: int) -> None:
    _want_text(row, "instruction", number)
    _want_text(row, "output", number)
    if row.get("input") is not None:
        _want_text(row, "input", number, may_be_empty=True)


def _check_messages(row: Row, number: int) -> None:
    _check_turns(row, number, "messages", "role", "content", _ROLES)


def _check_sharegpt(row: Row, number: int) -> None:
    _check_turns(row, number, "conversations", "from", "value", set(_SHAREGPT_ROLES))


def _check_turns(row: Row, number: int, name: str, who: str, what: str, roles: set[str]) -> None:
    turns = row[name]
    if not isinstance(turns, list) or not turns:
        raise InvalidTrainingFile(line=number, reason=f"'{name}' is a list of at least one turn, found {_name(turns)}")
    if len(turns) > MAX_TURNS:
        raise InvalidTrainingFile(line=number, reason=f"'{name}' has {len(turns)} turns, at most {MAX_TURNS}; split it")
    for position, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get(who), str) or turn[who] not in roles:
            known = ", ".join(sorted(roles))
            raise InvalidTrainingFile(line=number, reason=f"turn {position} of '{name}' needs '{who}', one of {known}")
        _want_text(turn, what, number, may_be_empty=True)
    answers = [turn for turn in turns if turn[who] in ("assistant", "gpt") and turn[what].strip()]
    if not answers:
        raise InvalidTrainingFile(line=number, reason=f"'{name}' has no answer of the assistant to learn from")


def _want_text(part: Mapping[str, Any], key: str, number: int, *, may_be_empty: bool = False) -> None:
    value = part.get(key)
    if not isinstance(value, str):
        raise InvalidTrainingFile(line=number, reason=f"'{key}' is a string, found {_name(value)}")
    if not may_be_empty and not value.strip():
        raise InvalidTrainingFile(line=number, reason=f"'{key}' is empty")


_CHECKS = {
    RowKind.TEXT: _check_text,
    RowKind.MESSAGES: _check_messages,
    RowKind.PROMPT_COMPLETION: _check_pair,
    RowKind.ALPACA: _check_alpaca,
    RowKind.SHAREGPT: _check_sharegpt,
}


def _depth(value: Any) -> int:
    """How deep lists and objects are nested; stops looking one level beyond the limit."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        inner = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [item for group in inner for item in group]
        depth += bool(inner)
        if not inner:
            break
    return depth


def _name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number")

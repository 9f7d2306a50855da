"""Which rows are understood, and what is said of a line that is not."""

from __future__ import annotations

import json
from collections.abc import Iterable
from io import BytesIO

import pytest

from graft_shared.errors import InvalidTrainingFile
from graft_shared.rows import MAX_LINE_BYTES, RowKind, check_lines, lines_of, messages_of, read_rows

CHAT = {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]}


def lines(*rows: object) -> list[bytes]:
    return [row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": "a"}, RowKind.TEXT),
        (CHAT, RowKind.MESSAGES),
        ({"prompt": "", "completion": "b"}, RowKind.PROMPT_COMPLETION),
        ({"instruction": "a", "input": "", "output": "b"}, RowKind.ALPACA),
        ({"instruction": "a", "output": "b", "source": "x"}, RowKind.ALPACA),
        (SHAREGPT, RowKind.SHAREGPT),
    ],
)
def test_every_kind_of_row_is_recognised(row: dict[str, object], kind: RowKind) -> None:
    report = check_lines(lines(row, row))
    assert (report.rows, report.kind) == (2, kind)


def test_both_chat_shapes_are_the_same_messages() -> None:
    expected = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    assert messages_of(RowKind.MESSAGES, CHAT) == messages_of(RowKind.SHAREGPT, SHAREGPT) == expected


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        ([], 1, "holds no rows"),
        ([b"\n", b"  \n"], 1, "holds no rows"),
        (lines({"text": "a"}, b'{"text": \n'), 2, "not valid JSON at column"),
        (lines({"text": "a"}, b'{"text": NaN}'), 2, "NaN is not valid JSON"),
        (lines(b'{"text": "a", "text": "b"}'), 1, "'text' stands twice"),
        (lines([1, 2]), 1, "a row is a JSON object, found a list"),
        (lines({"question": "a"}), 1, "found the keys question; give messages"),
        (lines({"text": "a"}, {"text": 7}), 2, "'text' is a string, found a number"),
        (lines({"text": "  "}), 1, "'text' is empty"),
        (lines({"prompt": "a", "completion": ""}), 1, "'completion' is empty"),
        (lines({"text": "a"}, CHAT), 2, "kind 'messages' in a file that began with 'text'"),
        (lines(b'{"text": "\xff"}'), 1, "byte 11 is not valid UTF-8"),
        (lines(b'{"text": "a", "score": 1e999}'), 1, "1e999 is too large"),
        (lines(b'{"text": "a", "score": ' + b"9" * 5000 + b"}"), 1, "thousands of digits"),
        (lines(b'{"text": "a \\ud83d b"}'), 1, "half a character"),
        (lines({"messages": []}), 1, "a list of at least one turn"),
        (lines({"messages": [{"role": "tool", "content": "a"}]}), 1, "one of assistant, system, user"),
        (lines({"messages": CHAT["messages"][:1]}), 1, "no answer of the assistant"),
        (lines({"text": "a", "more": json.loads("[" * 17 + "]" * 17)}), 1, "nested deeper than 16"),
        (lines(b'{"text": ' + b"[" * 90_000), 1, "nested deeper than 16"),
        (lines_of(BytesIO(b" " * 2 * MAX_LINE_BYTES)), 1, "more than 10485760 bytes"),
    ],
)
def test_a_line_that_is_not_sound_is_named_with_its_number(content: Iterable[bytes], line: int, says: str) -> None:
    with pytest.raises(InvalidTrainingFile) as refused:
        check_lines(content)
    assert refused.value.facts["line"] == line
    assert says in refused.value.message


def test_an_escaped_pair_of_surrogates_is_one_character() -> None:
    ((_, _, row),) = read_rows(lines(b'{"text": "\\ud83d\\ude00"}'))
    assert row == {"text": "\N{GRINNING FACE}"}


def test_a_byte_order_mark_and_blank_lines_are_passed_over() -> None:
    content = [b"\xef\xbb\xbf" + lines({"text": "a"})[0], b"\n", *lines({"text": "b"}), b"\n"]
    assert [number for number, _, _ in read_rows(content)] == [1, 3]


def test_a_file_is_never_held_whole() -> None:
    taken = 0

    def endless() -> object:
        nonlocal taken
        while True:
            taken += 1
            yield lines({"text": "a"})[0] if taken < 1000 else b"broken"

    with pytest.raises(InvalidTrainingFile) as refused:
        check_lines(endless())  # type: ignore[arg-type]
    assert refused.value.facts["line"] == taken == 1000

"""What the operator's commands print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def in_columns(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as plain text, the columns as wide as they must be."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "".join(f"{line.rstrip()}\n" for line in padded)

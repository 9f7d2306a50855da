"""How a report on data looks on a terminal: its figures, its lengths, and its first rows with their loss mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from graft_client.terminal import escape, harmless

BAR_WIDTH = 40
LEARNT, CUT = ("⟦", "⟧"), ("‹", "›")  # so that the mask can be read without colours, too


def report_view(report: dict[str, Any]) -> RenderableType:
    """A report as tables and texts."""
    return Group(
        _figures(report),
        "",
        _histogram(report["lengths"]["histogram"]),
        "",
        *_rows(report["first_rows"]),
        *(f"[yellow]warning:[/yellow] {escape(warning['message'])}" for warning in report["warnings"]),
    )


def _figures(report: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in _facts(report):
        table.add_row(f"[dim]{name}[/dim]", value)
    return table


def _facts(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    rows, train, held_out = report["rows"], report["train"], report["validation"]
    yield "rows", f"{rows:,} of kind {report['kind']}"
    yield "trained on", _side(train)
    if held_out is not None:
        yield "validation", _side(held_out)
        yield "in both", _part(held_out["overlap_rows"], held_out["rows"], " validation rows")
    yield "cut", f"{_part(report['truncated_rows'], rows, ' rows')}, at {report['max_length']:,} tokens"
    yield "duplicates", _part(report["duplicate_rows"], rows, " rows")
    yield "nothing to learn", _part(report["nothing_to_learn_rows"], rows, " rows")
    shares = report["lengths"]["percentiles"]
    yield "tokens a row", ", ".join(f"{share} %: {length:,}" for share, length in shares.items())


def _side(side: dict[str, Any]) -> str:
    return f"{side['rows']:,} rows, {side['tokens']:,} tokens, learnt {_part(side['trained_tokens'], side['tokens'])}"


def _part(count: int, of: int, what: str = "") -> str:
    return f"{count:,}{what} ({100 * count / of if of else 0:.1f} %)"


def _histogram(histogram: dict[str, Any]) -> Table:
    edges, counts = histogram["edges"], histogram["counts"]
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    most = max(counts)
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        lengths = f"{low:,}" if high - 1 == low else f"{low:,}–{high - 1:,}"
        table.add_row(f"[dim]{lengths}[/dim]", "█" * round(BAR_WIDTH * count / most), f"{count:,}")
    return table


def _rows(rows: list[dict[str, Any]]) -> Iterator[RenderableType]:
    opened, closed = LEARNT
    cut_opened, cut_closed = CUT
    if rows:
        legend = f"{opened}learnt{closed}, read only, {cut_opened}cut off{cut_closed}"
        yield f"[dim]The first rows as the model reads them:[/dim] {legend}"
    for row in rows:
        yield f"[bold]line {row['line']}[/bold] [dim]{row['tokens']:,} tokens[/dim]"
        yield masked(row["spans"])
        if row["spans_left_out"]:
            yield f"[dim]… and {row['spans_left_out']} more pieces[/dim]"
        yield ""


def masked(spans: list[dict[str, Any]]) -> Text:
    """A row's text with its mask; what could steer a terminal is shown as a sign."""
    text = Text()
    for span in spans:
        shown = harmless(span["text"])
        if span["trained"]:
            text.append(f"{LEARNT[0]}{shown}{LEARNT[1]}", style="black on green")
        elif span["cut"]:
            text.append(f"{CUT[0]}{shown}{CUT[1]}", style="dim strike")
        else:
            text.append(shown)
    return text

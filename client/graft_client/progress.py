"""Watching a job: a bar with step, loss and its curve, tokens/s and ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from graft_client.client import Update
from graft_client.tables import duration, status_words
from graft_client.terminal import escape, harmless

_BAR_EVENTS = frozenset({"progress", "heartbeat", "metrics"})  # the bar shows these; as lines they would flood
_BLOCKS = "▁▂▃▄▅▆▇█"
WIDE = 110  # columns of a terminal that has room for a bar beside step, curve and measures
SPARKS, SPARKS_NARROW = 24, 12  # characters of a loss curve
_LEVEL_COLOURS = {"warning": "yellow", "error": "red"}


class Display(Protocol):
    """Something that shows updates as they come."""

    def show(self, update: Update) -> None:
        """Show one update."""


def watch(updates: Iterable[Update], console: Console) -> dict[str, Any]:
    """Show every update and return the job as it ended."""
    job: dict[str, Any] = {}
    if not console.is_terminal:
        lines = Lines(console)
        for update in updates:
            lines.show(update)
            job = update.job
        return job
    with _progress(console) as progress:
        bar = Bar(progress)
        for update in updates:
            bar.show(update)
            job = update.job
    return job


class Bar:
    """A live bar, with the job's events scrolling above it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("…", total=None, facts="", curve="")
        self._sparks = SPARKS if progress.console.width >= WIDE else SPARKS_NARROW
        self._losses: dict[int, float] = {}  # by step: what is done twice is shown once

    def show(self, update: Update) -> None:
        """Move the bar and print what is new."""
        for line in event_lines(update):
            self._progress.console.print(line)
        measured = (event["data"] for event in update.events if event.get("type") == "metrics")
        self._losses |= {data["step"]: data["loss"] for data in measured if data.get("loss") is not None}
        progress = update.job.get("progress") or {}
        self._progress.update(
            self._task,
            description=harmless(status_words(update.job)),
            completed=progress.get("step") or 0,
            total=progress.get("total_steps"),
            facts=harmless(measures(update.job)),
            curve=sparkline([self._losses[step] for step in sorted(self._losses)], self._sparks),
        )


def sparkline(values: Sequence[float], width: int = SPARKS) -> str:
    """A curve in so many characters at most, from its lowest to its highest; each is the mean of its share."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    width = min(width, len(finite))
    cuts = [round(part * len(finite) / width) for part in range(width + 1)]
    means = [fmean(finite[begin:end]) for begin, end in pairwise(cuts)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(_BLOCKS[round((mean - low) / span * (len(_BLOCKS) - 1))] for mean in means)


class Lines:
    """One line for each change: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = ""

    def show(self, update: Update) -> None:
        """Print what is new, nothing when nothing is."""
        for line in event_lines(update):
            self._console.print(line, soft_wrap=True)
        line = plain_line(update.job)
        if line != self._last:
            self._console.print(escape(line), soft_wrap=True, highlight=False)
            self._last = line


def event_lines(update: Update) -> list[str]:
    """The events worth a line, as rich markup."""
    lines = []
    for event in update.events:
        if event.get("type") in _BAR_EVENTS:
            continue
        colour = _LEVEL_COLOURS.get(event.get("level", "info"), "dim")
        lines.append(f"[{colour}]· {escape(str(event.get('message') or event.get('type')))}[/{colour}]")
    return lines


def plain_line(job: dict[str, Any]) -> str:
    """Status, step and measures of a job in one line."""
    progress = job.get("progress") or {}
    parts = [status_words(job)]
    if progress.get("total_steps"):
        parts.append(f"step {progress.get('step', 0)}/{progress['total_steps']}")
    return "  ".join(filter(None, [*parts, measures(job)]))


def measures(job: dict[str, Any]) -> str:
    """Loss, speed and time left, as far as they are known; of a job that waits, for what."""
    progress, metrics, queue = job.get("progress") or {}, job.get("metrics") or {}, job.get("queue") or {}
    parts = []
    if (loss := metrics.get("train_loss")) is not None:
        parts.append(f"loss {loss:.4f}")
    if (eval_loss := metrics.get("eval_loss")) is not None:
        parts.append(f"held-out {eval_loss:.4f}")
    if (speed := progress.get("tokens_per_second")) is not None:
        parts.append(f"{speed:,.0f} tokens/s")
    if (eta := progress.get("eta_seconds")) is not None and job["status"] == "running":
        parts.append(f"ETA {duration(eta)}")
    if reason := queue.get("reason"):
        parts.append(reason)
    return "  ".join(parts)


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", style="bold", markup=False),
        *([BarColumn()] if console.width >= WIDE else []),
        MofNCompleteColumn(),
        TextColumn("{task.fields[curve]}", style="cyan", markup=False),
        TextColumn("{task.fields[facts]}", markup=False),
        console=console,
    )

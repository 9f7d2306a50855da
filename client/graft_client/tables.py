"""How jobs, estimates, refusals and the fleet look on a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table

from graft_client.errors import GraftAPIError
from graft_client.terminal import escape

GIB = 1024**3

_STATUS_COLOURS = {"succeeded": "green", "failed": "red", "cancelled": "yellow", "running": "cyan", "paused": "magenta"}
_BUSY = frozenset({"validating_files", "running", "pausing"})


def gib(size: float | None) -> str:
    """A number of bytes in GiB, or in MiB or KiB where it would read 0.00."""
    if size is None:
        return "–"
    if size < 1024**2 / 10:
        return f"{size / 1024:.1f} KiB"
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 1024**2:.1f} MiB"


def moment(when: float | str | None) -> str:
    """A time of the service (seconds since 1970, or ISO 8601) in local time."""
    if when is None:
        return "–"
    at = datetime.fromisoformat(when) if isinstance(when, str) else datetime.fromtimestamp(when, UTC)
    return at.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def job_table(job: dict[str, Any]) -> RenderableType:
    """One job, a fact a line."""
    table = Table.grid(padding=(0, 2))
    for name, value in _job_facts(job):
        if value not in (None, "", "–"):
            table.add_row(f"[dim]{name}[/dim]", escape(str(value)))
    return table


def _job_facts(job: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    progress, metrics, queue = job.get("progress") or {}, job.get("metrics") or {}, job.get("queue") or {}
    memory, error = job.get("memory") or {}, job.get("error") or {}
    yield "job", job["id"]
    yield "name", (job.get("spec") or {}).get("name")
    yield "status", status_words(job)
    yield "base model", job.get("base_model")
    yield "GPU class", job.get("gpu_class")
    yield "attempt", f"{job['attempt']} of {job['max_attempts']}" if job.get("attempt") else None
    yield "queue position", queue.get("position")
    yield "likely start", moment(queue.get("predicted_start"))
    yield "note", queue.get("reason")
    if progress.get("total_steps"):
        yield "step", f"{progress['step']} of {progress['total_steps']}"
    yield "loss", _text(metrics.get("train_loss"))
    yield "held-out loss", _text(metrics.get("eval_loss"))
    yield "predicted peak", gib(memory.get("predicted_peak_bytes"))
    yield "measured peak", gib(memory.get("measured_peak_bytes"))
    yield "cost", money(job["cost"]) if job.get("cost") else None
    yield "created", moment(job.get("created_at"))
    yield "finished", moment(job.get("finished_at"))
    for warning in job.get("warnings") or ():
        yield "warning", warning.get("message", warning)
    if error:
        yield "error", f"{error.get('code')}: {error.get('message')}"


def status_words(job: dict[str, Any]) -> str:
    """The status, and what a running job is busy with."""
    phase = job.get("phase")
    return f"{job['status']} ({phase})" if phase and job["status"] in _BUSY else job["status"]


def jobs_table(jobs: Iterable[dict[str, Any]]) -> Table:
    """Jobs, one a line."""
    table = _whole_words("job", "status", "base model", "GPU class", "step", "loss", "created")
    for job in jobs:
        progress, loss = job.get("progress") or {}, (job.get("metrics") or {}).get("train_loss")
        total = progress.get("total_steps")
        colour = _STATUS_COLOURS.get(job["status"], "default")
        table.add_row(
            escape(job["id"]),
            f"[{colour}]{escape(job['status'])}[/{colour}]",
            escape(str(job.get("base_model") or "–")),
            escape(job.get("gpu_class") or "–"),
            f"{progress.get('step', 0)}/{total}" if total else "–",
            f"{loss:.3f}" if loss is not None else "–",
            moment(job.get("created_at")),
        )
    return table


def checkpoints_table(checkpoints: Iterable[dict[str, Any]]) -> Table:
    """Checkpoints, one a line."""
    table = _whole_words("checkpoint", "step", "size", "loss", "held-out loss", "created", "")
    for checkpoint in checkpoints:
        metrics = checkpoint["metrics"]
        table.add_row(
            escape(checkpoint["id"]),
            str(checkpoint["step"]),
            gib(checkpoint["size"]),
            _text(metrics.get("train_loss")),
            _text(metrics.get("eval_loss")),
            moment(checkpoint["created_at"]),
            "kept" if checkpoint["is_stored"] else "",
        )
    return table


def estimate_view(estimate: dict[str, Any]) -> RenderableType:
    """Where a job would go, and what would fill the card."""
    memory = estimate.get("memory") or {}
    low, expected, high = (gib(memory.get(f"{bound}_bytes")) for bound in ("low", "expected", "high"))
    parts: list[RenderableType] = [
        f"Fits GPU class [bold]{escape(str(estimate.get('gpu_class')))}[/bold]: expected {expected} ({low} to {high})",
        f"plan: {escape(json.dumps(estimate.get('plan')))}",
        bytes_table(memory.get("components") or {}),
        *_speed_lines(estimate.get("speed")),
    ]
    if memory.get("host_bytes"):
        parts.append(f"beside the GPU's, it may need {gib(memory['host_bytes'])} of the machine's memory")
    if estimate.get("live_workers") == 0:
        parts.append(
            f"note: no live worker of class {escape(str(estimate.get('gpu_class')))}; a job would wait for one"
        )
    parts += [f"[yellow]warning:[/yellow] {escape(_text(warning))}" for warning in estimate.get("warnings") or ()]
    return Group(*parts)


def _speed_lines(speed: dict[str, Any] | None) -> Iterable[str]:
    if speed is None:
        yield "time: not forecast for this class; graft watch shows it after the first steps"
        return
    found = speed["tokens_per_second"]
    guess = "" if speed["calibrated"] else ", by the card's data sheet"
    yield f"speed: {found['expected']:,.0f} tokens/s ({found['low']:,.0f} to {found['high']:,.0f}{guess})"
    if speed.get("duration_seconds"):
        low, expected, high = (duration(speed["duration_seconds"][bound]) for bound in ("low", "expected", "high"))
        yield f"training: {speed['steps']:,} steps in {expected} ({low} to {high})"
    if speed.get("cost") and speed["cost"]["expected"] > 0:
        low, expected, high = (money(speed["cost"][bound]) for bound in ("low", "expected", "high"))
        yield f"cost: {expected} ({low} to {high})"


def money(amount: float) -> str:
    """An amount with two decimals, or with two digits that are not zero where there is less than a tenth."""
    decimals = 2 if amount <= 0 else max(2, 1 - math.floor(math.log10(amount)))
    return f"{amount:.{decimals}f}"


def duration(seconds: float) -> str:
    """Seconds as `2h05m`, `3m09s` or `7s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def bytes_table(needed: dict[str, int], available: dict[str, int] | None = None, *, margin: int = 0) -> Table:
    """Bytes by component, the largest first, and what a forecast that may be off adds to them."""
    table = Table("component", box=None, pad_edge=False)
    table.add_column("memory", justify="right")
    for name, size in sorted(needed.items(), key=lambda item: -item[1]):
        table.add_row(escape(name.replace("_", " ")), gib(size))
    if margin > 0:
        table.add_row("margin of the forecast", gib(margin))
    for name, size in (available or {}).items():
        table.add_row(f"[dim]on the card: {escape(name.replace('_', ' '))}[/dim]", f"[dim]{gib(size)}[/dim]")
    return table


def print_error(console: Console, error: GraftAPIError) -> None:
    """Say what is wrong with its numbers; a refusal for memory comes with the table and the changes that would fit."""
    where = f" (at '{error.param}')" if error.param and error.param not in error.message else ""
    console.print(f"[red]error[/red] {escape(error.code)}: {escape(error.message)}{escape(where)}", soft_wrap=True)
    facts = dict(error.facts)
    needed, available = facts.pop("needed", None), facts.pop("available", None)
    changes, fits_here = facts.pop("changes", None) or (), facts.pop("fits_here", None) or ()
    if isinstance(needed, dict):
        margin = (facts.get("needed_bytes") or 0) - sum(needed.values())
        print_whole(console, bytes_table(needed, available if isinstance(available, dict) else None, margin=margin))
    if changes:
        console.print("Any one of these changes would fit:")
        print_whole(console, _changes_table(changes))
    if fits_here:
        names = ", ".join(_text(base) for base in fits_here)
        console.print(f"Base models that fit here as asked: {escape(names)}", soft_wrap=True)
    for name, value in facts.items():
        if value in (None, "", [], {}) or (isinstance(value, str) and value in error.message):
            continue
        shown = gib(value) if name.endswith("_bytes") and isinstance(value, int) else _text(value)
        console.print(f"  [dim]{escape(name)}:[/dim] {escape(shown)}", soft_wrap=True)
    if error.status >= 500 and error.request_id:
        console.print(f"  [dim]request:[/dim] {escape(error.request_id)}")


def _changes_table(changes: Iterable[dict[str, Any]]) -> Table:
    table = Table("set", "from", "to", box=None, pad_edge=False)
    table.add_column("needs", justify="right")
    table.add_column("GPU class")
    for change in changes:
        table.add_row(
            escape(_text(change.get("param"))),
            escape(_text(change.get("from"))),
            f"[green]{escape(_text(change.get('to')))}[/green]",
            gib(change.get("needed_bytes")),
            escape(_text(change.get("gpu_class") or "–")),
        )
    return table


def rows_table(rows: Iterable[dict[str, Any]]) -> Table:
    """Documents with the same keys as a table, sizes and times as people read them. Lists and objects are left out."""
    rows = list(rows)
    flat = [{k: v for k, v in row.items() if not isinstance(v, list | dict) and k != "object"} for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    table = _whole_words(*[escape(column.removesuffix("_bytes").replace("_", " ")) for column in columns])
    for row in flat:
        table.add_row(*(escape(_cell(key, row.get(key))) for key in columns))
    return table


def _cell(key: str, value: Any) -> str:
    if key == "bytes" or key.endswith("_bytes"):
        return gib(value)
    return moment(value) if key.endswith("_at") else _text(value)


def models_table(models: Iterable[dict[str, Any]]) -> Table:
    """Base models, one a line: what one chooses by."""
    table = _whole_words("base model", "source", "type", "parameters", "max length")
    for model in models:
        parameters = f"{model['parameters'] / 1e9:.1f}B" if model["parameters"] >= 1e8 else f"{model['parameters']:,}"
        facts = (model["id"], model["source"], model["model_type"], parameters, str(model["max_length"]))
        table.add_row(*map(escape, facts))
    return table


def without(rows: Iterable[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """The rows, with less in them."""
    return [{key: value for key, value in row.items() if key not in keys} for row in rows]


def _whole_words(*columns: str) -> Table:
    """A table that is never cut: what it shows, an id above all, is there to be copied. Print it with `print_whole`."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True, overflow="ignore")
    return table


def print_whole(console: Console, shown: RenderableType) -> None:
    """Print a text or tables uncut, however narrow the terminal: a long line wraps there, and loses nothing."""
    narrow, wide = console.width, console.options.update(width=10_000)
    console.width = max(narrow, console.measure(shown, options=wide).maximum)
    console.print(shown, soft_wrap=isinstance(shown, str))
    console.width = narrow


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        return str(value.get("message") or value.get("id") or value.get("base_model") or json.dumps(value))
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value)

"""What a doctor finds: a verdict on one thing, what was seen, and the command that mends it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from rich.table import Column, Table

from graft_client.terminal import console, escape


class Verdict(StrEnum):
    """How much a finding matters."""

    GOOD = "ok"
    NOTE = "note"
    BAD = "fault"
    SKIPPED = "skipped"  # not this side's to check; `found` says whose it is


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at."""

    subject: str
    verdict: Verdict
    found: str
    remedy: str | None = None


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing to look at, by the name that `graft doctor NAME` knows it by."""

    name: str
    look: Callable[[], Iterable[Finding]]


class UnknownCheck(Exception):
    """There is no check of that name."""


def good(subject: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding(subject=subject, verdict=Verdict.GOOD, found=found)


def note(subject: str, found: str, remedy: str | None = None) -> Finding:
    """Worth knowing; the service works all the same."""
    return Finding(subject=subject, verdict=Verdict.NOTE, found=found, remedy=remedy)


def fault(subject: str, found: str, remedy: str) -> Finding:
    """Something does not work until the remedy is applied."""
    return Finding(subject=subject, verdict=Verdict.BAD, found=found, remedy=remedy)


def skipped(subject: str, why: str) -> Finding:
    """Not looked at."""
    return Finding(subject=subject, verdict=Verdict.SKIPPED, found=why)


def examine(checks: Sequence[Check], only: Iterable[str]) -> list[Finding]:
    """Make the checks that are named, all of them where none is.

    Raises:
        UnknownCheck: A name that no check has.
    """
    wanted = set(only)
    if unknown := wanted - {check.name for check in checks}:
        known = ", ".join(check.name for check in checks)
        raise UnknownCheck(f"There is no check '{min(unknown)}'. There are: {known}.")
    return [finding for check in checks if not wanted or check.name in wanted for finding in _made(check)]


def _made(check: Check) -> Iterator[Finding]:
    """What a check finds; one that cannot end is a fault, and the others are made all the same."""
    try:
        yield from check.look()
    except Exception as error:  # noqa: BLE001 (what no check foresaw is what a doctor is asked about)
        found = f"the check could not end: {type(error).__name__}: {error}"
        yield fault(check.name, found, f"mend what it names, then graft doctor {check.name}")


def show(findings: Sequence[Finding], *, as_json: bool) -> int:
    """Print what was found and return the exit code: 1 where something does not work."""
    if as_json:
        rows = [{"subject": f.subject, "verdict": f.verdict, "found": f.found, "remedy": f.remedy} for f in findings]
        print(json.dumps(rows, indent=2))
    else:
        console().print(_table(findings))
    return 1 if any(finding.verdict is Verdict.BAD for finding in findings) else 0


_COLOURS = {Verdict.GOOD: "green", Verdict.NOTE: "yellow", Verdict.BAD: "red", Verdict.SKIPPED: "dim"}


def _table(findings: Iterable[Finding]) -> Table:
    table = Table("", "", Column(overflow="fold"), box=None, pad_edge=False, show_header=False)
    for finding in findings:
        colour = _COLOURS[finding.verdict]
        table.add_row(f"[{colour}]{finding.verdict}[/{colour}]", escape(finding.subject), escape(finding.found))
        if finding.remedy is not None:
            table.add_row("", "", f"[bold]→[/bold] {escape(finding.remedy)}")
    return table

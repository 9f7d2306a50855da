"""What the trials showed, by point and fault."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.failpoints.cases import Verdict
from tests.failpoints.scale import LEASE_SECONDS, SCALE
from tests.failpoints.trial import FROZEN_SECONDS


@dataclass(kw_only=True)
class Report:
    """All verdicts of one command."""

    command: str
    database: str
    at_once: int
    points: list[str]  # in the order in which they are shown
    seconds: float = 0.0
    void: int = 0
    verdicts: list[Verdict] = field(default_factory=list)

    def add(self, verdict: Verdict) -> None:
        """Take note of a trial; a void one is tried again, and only counted here."""
        if verdict.is_void:
            self.void += 1
        else:
            self.verdicts.append(verdict)

    @property
    def violations(self) -> list[Verdict]:
        """The trials that went wrong."""
        return [verdict for verdict in self.verdicts if verdict.violations]

    def _busyness(self, share: float) -> float | None:
        return _share(sorted(verdict.runnable_per_core for verdict in self.verdicts), share)

    def cells(self) -> list[dict[str, Any]]:
        """One entry for each point and fault."""
        by_cell: dict[tuple[str, str], list[Verdict]] = {}
        for verdict in sorted(self.verdicts, key=lambda verdict: self.points.index(verdict.point)):
            by_cell.setdefault((verdict.point, verdict.fault), []).append(verdict)
        return [{"point": point, "fault": fault, **_cell(verdicts)} for (point, fault), verdicts in by_cell.items()]

    def to_dict(self) -> dict[str, Any]:
        """The report as it is stored; durations are those that were measured, on scaled leases."""
        return {
            "command": self.command,
            "database": self.database,
            "times_are_scaled_by": SCALE,
            "lease_seconds": LEASE_SECONDS,
            "frozen_seconds": FROZEN_SECONDS,
            "trials_at_once": self.at_once,
            "seconds": self.seconds,
            "points": len(self.points),
            "trials": len(self.verdicts),
            "void": self.void,
            "runnable_per_core": {share: self._busyness(at) for share, at in (("p50", 0.5), ("p95", 0.95))},
            "struck": sum(verdict.struck for verdict in self.verdicts),
            "steps_late": sum(verdict.steps_late for verdict in self.verdicts),
            "violations": [{"case": verdict.case, "said": verdict.violations} for verdict in self.violations],
            "cells": self.cells(),
        }


def table(report: Report) -> str:
    """The report for a terminal."""
    head = f"{'point':34}{'fault':9}{'trials':>7}{'struck':>7}{'wrong':>6}{'p50 s':>7}{'p95 s':>7}  outcomes"
    lines = [head]
    for cell in report.cells():
        outcomes = "; ".join(f"{count} × {outcome}" for outcome, count in cell["outcomes"].items())
        seconds = [cell["recovery_seconds"][share] for share in ("p50", "p95")]
        times = "".join(f"{'–' if second is None else format(second, '.2f'):>7}" for second in seconds)
        lines.append(
            f"{cell['point']:34}{cell['fault']:9}{cell['trials']:7}{cell['struck']:7}{cell['violations']:6}{times}"
            f"  {outcomes}"
        )
    known = report.to_dict()
    lines.append(
        f"{known['points']} points, {known['trials']} trials, {known['struck']} struck, {report.void} void,"
        f" {len(report.violations)} wrong,"
        f" in {report.seconds} s; a lease lasts {LEASE_SECONDS} s instead of {LEASE_SECONDS * SCALE:.0f}"
    )
    return "\n".join(lines)


def _cell(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    seconds = sorted(verdict.recovery_seconds for verdict in verdicts if verdict.recovery_seconds is not None)
    return {
        "actor": verdicts[0].actor,
        "trials": len(verdicts),
        "struck": sum(verdict.struck for verdict in verdicts),
        "violations": sum(bool(verdict.violations) for verdict in verdicts),
        "recovery_seconds": {"p50": _share(seconds, 0.5), "p95": _share(seconds, 0.95)},
        "outcomes": dict(Counter(verdict.outcome for verdict in verdicts).most_common()),
        "steps_redone": sum(verdict.steps_redone for verdict in verdicts),
        "most_runs": max(verdict.runs for verdict in verdicts),
    }


def _share(ordered: Sequence[float], share: float) -> float | None:
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None

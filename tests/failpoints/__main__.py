"""`python -m tests.failpoints`: every point × fault, some times each, on scaled leases; a table, and a JSON report."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tests.failpoints.actors import Site, warm_api
from tests.failpoints.cases import BUSY_PER_CORE, Aftermath, Case, Verdict, verdict_on
from tests.failpoints.databases import Databases, databases, warm_up
from tests.failpoints.forked import fork, fork_children
from tests.failpoints.points import POINTS, Fault
from tests.failpoints.report import Report, table
from tests.failpoints.scale import scale_constants
from tests.failpoints.trial import try_case
from tests.scratch import scratch_folder

TRIALS_AT_ONCE = 6  # most of a trial is waiting
FEWEST_AT_ONCE = 1  # on a busy machine, and to begin with
SAVED_EVERY = 50  # trials


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.failpoints", description=__doc__)
    parser.add_argument("--times", type=int, default=1, help="trials of every point × fault")
    parser.add_argument("--db", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--point", action="append", choices=[point.name for point in POINTS], metavar="NAME")
    parser.add_argument("--fault", action="append", type=Fault, choices=list(Fault))
    parser.add_argument("--at-once", type=int, default=TRIALS_AT_ONCE, help="trials that run at the same time")
    parser.add_argument("--out", type=Path, default=Path(".graft/failpoints.json"))
    asked = parser.parse_args()
    cases = cases_of(asked.times, asked.point, asked.fault)
    command = shlex.join(["python", "-m", "tests.failpoints", *sys.argv[1:]])
    points = list(dict.fromkeys(case.point.name for case in cases))
    report = Report(command=command, database=asked.db, at_once=asked.at_once, points=points)
    folder = scratch_folder("graft-failpoints-")
    began = time.monotonic()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    with databases(asked.db, folder) as made:
        for number, verdict in enumerate(try_all(cases, made, folder, at_once=asked.at_once), 1):
            report.add(verdict)
            report.seconds = round(time.monotonic() - began, 1)
            for said in verdict.violations:
                print(f"{verdict.case}: {'void, ' if verdict.is_void else ''}{said}", flush=True)
            if number % SAVED_EVERY == 0:
                save(report, asked.out)
    save(report, asked.out)
    print(table(report))
    if report.violations:
        sys.exit(f"{len(report.violations)} trials went wrong; what they left is in {folder}")
    shutil.rmtree(folder)


def save(report: Report, path: Path) -> None:
    """Write the report as it is by now."""
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    partial_path.rename(path)


def cases_of(times: int, points: Sequence[str] | None, faults: Sequence[Fault] | None) -> list[Case]:
    """Every point × fault that was asked for, so many times; in turn somebody else carries on, or nobody else."""
    chosen = [point for point in POINTS if points is None or point.name in points]
    cells = [(point, fault) for point in chosen for fault in point.faults if faults is None or fault in faults]
    in_turn = list(Aftermath)
    return [
        Case(point=point, fault=fault, number=number, aftermath=in_turn[(number + index) % 2])
        for number in range(times)
        for index, (point, fault) in enumerate(cells)
    ]


def try_all(cases: Sequence[Case], databases: Databases, folder: Path, *, at_once: int) -> Iterator[Verdict]:
    """Run the cases, each in a process of its own, and yield what they showed as they end.

    On a machine that has too much to do, fewer run at once, and what says nothing for want of time is tried again.
    """
    scale_constants()
    fork_children()
    warm_up(databases, folder / "warm")
    warm_api()
    gc.freeze()  # what lies there now is shared with all trials; collecting would copy it
    waiting, running, places, limit = list(reversed(cases)), dict[int, Case](), itertools.count(1), FEWEST_AT_ONCE
    tries: Counter[str] = Counter()
    while waiting or running:
        while waiting and len(running) < limit:
            case, place = waiting.pop(), folder / f"t{next(places)}"
            place.mkdir()
            verdict_path = folder / f"{case.name}.json"
            running[fork(partial(_try, case, databases, place, verdict_path), place / "trial.log")] = case
        pid, status = os.waitpid(-1, 0)
        case = running.pop(pid)
        verdict = _read(folder / f"{case.name}.json", case, os.waitstatus_to_exitcode(status))
        tries[case.name] += 1
        verdict.tries = tries[case.name]
        is_busy = verdict.runnable_per_core > BUSY_PER_CORE
        limit = max(FEWEST_AT_ONCE, limit - 1) if is_busy else min(at_once, limit + 1)
        if verdict.is_void:
            waiting.insert(0, case)
        yield verdict


def _try(case: Case, databases: Databases, place: Path, verdict_path: Path) -> None:
    verdict = try_case(case, Site(folder=place, database_url=databases.create(place)))
    databases.drop(place)
    verdict_path.write_text(json.dumps(asdict(verdict)))
    if not verdict.violations:
        shutil.rmtree(place)


def _read(path: Path, case: Case, code: int) -> Verdict:
    if code == 0:
        verdict = Verdict(**json.loads(path.read_text()))
        path.unlink()
        return verdict
    verdict = verdict_on(case)
    verdict.violations.append(f"the_trial_itself_works: it left with {code}")
    return verdict


if __name__ == "__main__":
    main()

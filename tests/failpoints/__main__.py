"""`python -m tests.failpoints`: every point × fault, some times each, on scaled leases; a table, and a JSON report."""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from tests.failpoints.actors import Site, warm_api
from tests.failpoints.databases import Databases, databases, warm_up
from tests.failpoints.forked import fork, fork_children
from tests.failpoints.points import POINTS, Fault
from tests.failpoints.report import Report, table
from tests.failpoints.scale import scale_constants
from tests.failpoints.trial import Aftermath, Case, Verdict, try_case, verdict_on

TRIALS_AT_ONCE = 6  # most of a trial is waiting
IN_MEMORY = Path("/dev/shm")  # what is killed here is processes, not machines: no disk has to keep anything


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
    folder = Path(tempfile.mkdtemp(prefix="graft-failpoints-", dir=IN_MEMORY if IN_MEMORY.is_dir() else None))
    began = time.monotonic()
    with databases(asked.db, folder) as made:
        for verdict in try_all(cases, made, folder, at_once=asked.at_once):
            report.add(verdict)
            for said in verdict.violations:
                print(f"{verdict.case}: {said}", flush=True)
    report.seconds = round(time.monotonic() - began, 1)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    print(table(report))
    if report.violations:
        sys.exit(f"{len(report.violations)} trials went wrong; what they left is in {folder}")
    shutil.rmtree(folder)


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
    """Run the cases, each in a process of its own, and yield what they showed as they end."""
    scale_constants()
    fork_children()
    warm_up(databases, folder / "warm")
    warm_api()
    gc.freeze()  # what lies there now is shared with all trials; collecting would copy it
    waiting, running = list(reversed(cases)), dict[int, Case]()
    while waiting or running:
        while waiting and len(running) < at_once:
            case = waiting.pop()
            place = folder / f"t{len(cases) - len(waiting)}"
            place.mkdir()
            verdict_path = folder / f"{case.name}.json"
            running[fork(lambda: _try(case, databases, place, verdict_path), place / "trial.log")] = case  # noqa: B023
        pid, status = os.waitpid(-1, 0)
        case = running.pop(pid)
        yield _read(folder / f"{case.name}.json", case, os.waitstatus_to_exitcode(status))


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

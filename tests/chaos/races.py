"""`make races [DB=…] [RACES=…] [DRAINS=…]`: cancels against finishes, then drains of busy workers; and judgement."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.chaos import cancels, drains
from tests.chaos.judge import figures, gather, judge, told_as_the_jobs_own
from tests.chaos.service import service_in_trouble
from tests.outages.wanted import UNSCALED_LEASE_SECONDS, come_to_rest
from tests.scratch import scratch_folder
from tests.witness import listening

REST_SECONDS = 300.0  # for the last jobs; nothing here waits for a lease to run out


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a run is. The seed draws how far from the moment that decides a cancel is, and at which step a drain."""

    db: str = "sqlite"
    races: int = 500
    drains: int = 50
    seed: int = 1
    lease_seconds: float = UNSCALED_LEASE_SECONDS
    trainers: int = 4


def main() -> None:
    """Run, judge, report; exit code 1 if a promise broke."""
    arguments = _arguments()
    folder = scratch_folder("graft-races-")
    out = arguments.pop("out")
    report = run(folder, Wanted(**arguments))
    print(json.dumps(report, indent=2))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2) + "\n")
    if report["violations"]:
        sys.exit(f"a promise was broken; the service's logs and database are in {folder}")
    shutil.rmtree(folder, ignore_errors=True)


def run(folder: Path, wanted: Wanted) -> dict[str, Any]:
    """One run in this folder; returns its report."""
    began = time.monotonic()
    in_trouble = service_in_trouble(
        folder, database=wanted.db, lease_seconds=wanted.lease_seconds, trainers=wanted.trainers
    )
    with in_trouble as service, listening(service.state_dir) as steps_heard:
        cancelled = cancels.Cancels(service, steps_heard, wanted.seed, wanted.races)
        drained = drains.Drains(service, steps_heard, wanted.seed, wanted.drains)
        cancelled.run()
        raced_seconds = time.monotonic() - began
        drained.run()
        come_to_rest(service, seconds=REST_SECONDS)
        service.stop()
        submitted = [*cancelled.undisturbed, *cancelled.races, *drained.drains]
        evidence = gather(service, submitted, [hit for drain in drained.drains for hit in drain.hits])
    broken = {
        **judge(evidence).violations,
        "no fault is told as the job's own": told_as_the_jobs_own(evidence.events),
        **cancels.broken_promises(cancelled.races, evidence),
        **drains.broken_promises(drained.drains, evidence),
    }
    seconds = time.monotonic() - began
    return {
        "command": shlex.join(["python", "-m", "tests.chaos.races", *sys.argv[1:]]),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.platform()}",
        "seed": wanted.seed,
        "lease_seconds": wanted.lease_seconds,
        "wanted": asdict(wanted),
        "seconds": round(seconds),
        "seconds_of": {"races": round(raced_seconds), "drains": round(seconds - raced_seconds)},
        "cancel_against_finish": cancels.figures(cancelled, evidence),
        "drain_of_a_busy_worker": drains.figures(drained.drains, evidence),
        "processes_started_again": service.restarts,
        **figures(evidence),
        "promises": {promise: len(found) for promise, found in broken.items()},
        "violations": {promise: found[:20] for promise, found in broken.items() if found},
    }


def _arguments() -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.races", description=__doc__)
    parser.add_argument("--db", choices=("sqlite", "postgres"))
    parser.add_argument("--races", type=int, help="jobs that are cancelled about when they end")
    parser.add_argument("--drains", type=int, help="workers that are told to leave while they train")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--lease-seconds", type=float, help="60 in production; all times are scaled alike")
    parser.add_argument("--trainers", type=int)
    parser.add_argument("--out", type=Path)
    parser.set_defaults(**asdict(Wanted()))
    return vars(parser.parse_args())


if __name__ == "__main__":
    main()

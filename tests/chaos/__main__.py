"""`make chaos [DB=…] [JOBS=…] [FAULTS=…] [SEED=…]`: random faults, then judgement. Exit code 1 if a promise broke."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from graft_shared.store import open_database
from tests.chaos.clients import Clients
from tests.chaos.faults import Faults
from tests.chaos.judge import figures, gather, judge, judge_webhooks, told_as_the_jobs_own, undelivered, unfinished
from tests.chaos.receiver import Receiver
from tests.chaos.service import service_in_trouble
from tests.invariants import Budget, budgets_hold
from tests.scratch import scratch_folder
from tests.waiting import wait_until


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a run is: the same seed draws the same faults, in the same order and at the same distances."""

    db: str = "sqlite"
    jobs: int = 50  # at least
    faults: int = 100
    seed: int = 1
    lease_seconds: float = 4.0
    trainers: int = 8
    gap_seconds: float = 0.7  # between two faults, in the mean


TENANTS = ("red", "blue", "green")  # each with a key of the database, and the same quotas
REST_LEASES = 60.0  # how long the last jobs may take once nothing goes wrong any more, in leases
SAY_EVERY = 100


def main() -> None:
    """Run, judge, report."""
    arguments = _arguments()
    folder = scratch_folder("graft-chaos-")
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
    budget = Budget(running_jobs=wanted.trainers // 2, queued_jobs=wanted.trainers // 2 + 1)
    receiver = Receiver(wanted.seed)
    in_trouble = service_in_trouble(
        folder,
        database=wanted.db,
        lease_seconds=wanted.lease_seconds,
        trainers=wanted.trainers,
        tenants=TENANTS,
        environment={
            "GRAFT_QUOTA_RUNNING_JOBS": str(budget.running_jobs),
            "GRAFT_QUOTA_QUEUED_JOBS": str(budget.queued_jobs),
            **receiver.environment,
        },
    )
    with in_trouble as service:
        receiver.start()
        faults = Faults(service, wanted.seed, wanted.gap_seconds, wanted.faults)
        clients = Clients(
            service,
            wanted.seed,
            backlog=wanted.trainers + 4,
            wanted=wanted.jobs,
            go_on=lambda: sum(faults.sent.values()) < wanted.faults,
            webhook_url=receiver.url,
        )
        clients.start()
        faults.run(lambda: _say(faults, clients))
        clients.join()
        database = open_database(service.database_url)
        rest = REST_LEASES * wanted.lease_seconds
        try:
            wait_until(lambda: unfinished(database) == 0, seconds=rest, what="the last jobs", every=0.5)
            receiver.be_well()
            wait_until(lambda: undelivered(database) == 0, seconds=rest, what="the last webhooks", every=2.0)
        except TimeoutError as error:
            print(error, file=sys.stderr)  # the judge says which
        finally:
            database.close()
        service.stop()
        receiver.stop()
        evidence = gather(service, clients.submitted, faults.hits)
    verdict = judge(evidence)
    tenants = {job_id: job.tenant for job_id, job in evidence.jobs.items()}
    verdict.note("no fault is told as the job's own", told_as_the_jobs_own(evidence.events))
    verdict.note("budgets hold", budgets_hold(dict.fromkeys(TENANTS, budget), evidence.events, tenants))
    verdict.note("every job's end is told at least once", judge_webhooks(evidence, receiver.taken))
    verdict.note("nothing is sent unsigned", ["a signature was wrong"] * receiver.forged)
    return {
        "command": f"python -m tests.chaos {' '.join(sys.argv[1:])}",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.platform()}",
        "wanted": asdict(wanted),
        "seconds": round(time.monotonic() - began),
        "faults": {
            "kill_9": faults.kills,
            "processes_started_again": service.restarts,
            **dict(sorted(faults.sent.items())),
        },
        "posts_repeated": clients.posts_repeated,
        "budget": asdict(budget),
        "posts_refused_by_quota": clients.refused_by_quota,
        "longest_post_seconds": round(clients.longest_post_seconds, 2),
        "webhooks": {
            "taken": len(receiver.taken),
            "of_them_twice": len(receiver.taken) - len(set(receiver.taken)),
            "turned_away": receiver.turned_away,
            "most_tries": max((message.tries for message in evidence.messages), default=0),
        },
        **figures(evidence),
        "promises": {promise: len(found) for promise, found in verdict.violations.items()},
        "violations": {promise: found[:20] for promise, found in verdict.violations.items() if found},
    }


def _say(faults: Faults, clients: Clients) -> None:
    done = sum(faults.sent.values())
    if done % SAY_EVERY == 0:
        print(f"{done} faults, {faults.kills} of them kill -9; {len(clients.submitted)} jobs", file=sys.stderr)


def _arguments() -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--db", choices=("sqlite", "postgres"))
    parser.add_argument("--jobs", type=int, help="at least so many")
    parser.add_argument("--faults", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--lease-seconds", type=float, help="60 in production; all times are scaled alike")
    parser.add_argument("--trainers", type=int)
    parser.add_argument("--gap-seconds", type=float, help="between two faults, in the mean")
    parser.add_argument("--out", type=Path)
    parser.set_defaults(**asdict(Wanted()))
    return vars(parser.parse_args())


if __name__ == "__main__":
    main()

"""`make outages ONLY=… [DB=…] [SECONDS=…]`: one outage, then judgement. Exit code 1 if a promise broke."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.outages import broker, bucket, database, disk, recovery
from tests.outages.wanted import UNSCALED_LEASE_SECONDS, Played, Wanted

SCENARIOS: dict[str, tuple[Callable[[Path, Wanted], Played], Wanted]] = {
    "redis-killed": (broker.killed, Wanted()),
    "redis-down": (broker.down, Wanted()),
    "redis-half-open": (broker.half_open, Wanted(seconds=120.0)),
    "postgres-stopped": (database.postgres_stopped, Wanted(db="postgres")),
    "api-killed": (database.api_killed, Wanted()),
    "bucket-away": (bucket.away, Wanted(seconds=300.0)),
    "disk-full": (disk.full, Wanted(seconds=60.0)),
    "recovery": (recovery.measured, Wanted(kills=20)),
}


def main() -> None:
    """Play, judge, report."""
    name, wanted, out = _arguments()
    folder = Path(tempfile.mkdtemp(prefix="graft-outage-"))
    report = play(name, folder, wanted)
    print(json.dumps(report, indent=2))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2) + "\n")
    if report["violations"]:
        sys.exit(f"a promise was broken; the service's logs and database are in {folder}")
    shutil.rmtree(folder, ignore_errors=True)


def play(name: str, folder: Path, wanted: Wanted) -> dict[str, Any]:
    """Play one scenario in this folder; returns its report."""
    scenario, _ = SCENARIOS[name]
    began = time.monotonic()
    played = scenario(folder, wanted)
    return {
        "scenario": name,
        "what": scenario.__doc__,
        "command": f"python -m tests.outages {' '.join(sys.argv[1:])}",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.platform()}",
        "wanted": asdict(wanted),
        "lease_scale": wanted.lease_seconds / UNSCALED_LEASE_SECONDS,
        "seconds": round(time.monotonic() - began),
        **played.figures,
        "promises": {promise: len(found) for promise, found in played.violations.items()},
        "violations": {promise: found[:20] for promise, found in played.violations.items() if found},
    }


def _arguments() -> tuple[str, Wanted, Path | None]:
    parser = argparse.ArgumentParser(prog="python -m tests.outages", description=__doc__)
    parser.add_argument("name", choices=list(SCENARIOS))
    parser.add_argument("--db", choices=("sqlite", "postgres"))
    parser.add_argument("--seconds", type=float, help="how long it lasts")
    parser.add_argument("--kills", type=int, help="of the API, or of each kind that is recovered from")
    parser.add_argument("--lease-seconds", type=float, help="60 in production; all times are scaled alike")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", type=Path)
    given = vars(parser.parse_args())
    name, out = given.pop("name"), given.pop("out")
    changes = {what: value for what, value in given.items() if value is not None}
    return name, replace(SCENARIOS[name][1], **changes), out


if __name__ == "__main__":
    main()

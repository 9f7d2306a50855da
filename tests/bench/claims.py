"""How long a claim takes, and a look at a place in line, while thousands of jobs of some tenants wait.

    python tests/bench/claims.py --db postgres --rows 10000 --tenants 20 --out FILE

A third of the tenants train something, all have a history of a month, and each has quotas. Prints, and writes as JSON,
the median and the 95th percentile in milliseconds, from before the call to its answer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import insert, text

from graft_shared.jobs import Stage
from graft_shared.store import Database, JobQuery, Jobs, Leases, Quotas, open_database, tables
from graft_shared.store.migrate import migrate
from tests.servers import PostgresServer
from tests.store_factories import a_new_job

CALLS = 100
TRAIN: dict[str, Any] = {"stage": Stage.TRAIN, "gpu_classes": ["80gb", "24gb", "cpu"]}
QUOTAS = Quotas(running_jobs=10**6, gpu_hours=10**6)
OWN = ("id", "tenant", "created_at", "idempotency_key")


def main() -> None:
    """Fill, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--db", choices=("sqlite", "postgres"), default="postgres")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--tenants", type=int, default=20)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), asked.db, asked.rows, asked.tenants)
    print(json.dumps(figures, indent=2))
    if asked.out is not None:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(figures, indent=2) + "\n")


def measure(folder: Path, db: str, rows: int, tenants: int) -> dict[str, Any]:
    """Everything, on a database of its own."""
    server = PostgresServer(folder / "postgres").start() if db == "postgres" else None
    database = open_database(server.new_database("claims") if server else f"sqlite:///{folder / 'graft.db'}")
    migrate(database)
    try:
        _fill(database, rows, tenants)
        jobs, leases = Jobs(database, QUOTAS), Leases(database, timedelta(seconds=60), QUOTAS)
        waiting = [jobs.list(f"t{number}", JobQuery(limit=1))[0][0] for number in range(min(tenants, 10))]
        return {
            "what": (__doc__ or "").splitlines()[0],
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{os.cpu_count()} cores, {platform.platform()}",
            "load_average_before": round(os.getloadavg()[0], 2),
            "database": db,
            "rows": rows,
            "tenants": tenants,
            "place_in_line_ms": _timed(lambda number: jobs.place_in_line(waiting[number % len(waiting)])),
            "claim_ms": _timed(lambda _: leases.claim("w/train", **TRAIN)),
        }
    finally:
        database.close()
        if server:
            server.stop()


def _timed(call: Callable[[int], Any]) -> dict[str, float]:
    took = []
    for number in range(CALLS):
        began = time.perf_counter()
        if call(number) is None:
            raise SystemExit("it found nothing")
        took.append(1000 * (time.perf_counter() - began))
    return {"median": round(statistics.median(took), 2), "p95": round(sorted(took)[int(0.95 * CALLS)], 2)}


def _fill(database: Database, rows: int, tenants: int) -> None:
    jobs, leases = Jobs(database), Leases(database, timedelta(seconds=60))
    job, _ = jobs.submit(a_new_job(tenant="t0"))
    prepared = leases.claim("p/prepare", stage=Stage.PREPARE, gpu_classes=[])
    if prepared is None:
        raise SystemExit("it was not claimed")
    leases.hand_to_training(job.id, prepared.epoch, {"report": {"rows": 1000}})
    names = ", ".join(column.name for column in tables.jobs.columns if column.name not in OWN)
    copied = text(
        f"with recursive n(i) as (select 1 union all select i + 1 from n where i < {rows}) "
        f"insert into jobs (id, tenant, created_at, {names}) "
        f"select 'copy-' || i, 't' || (i % {tenants}), created_at + i * 0.001, {names} from jobs, n where id = :job"
    )
    now = time.time()
    today = now - now % 86_400
    history = [
        {"tenant": f"t{tenant}", "stage": stage.value, "day": today - day * 86_400.0, "seconds": 100.0 * tenant + day}
        for tenant in range(tenants)
        for stage in Stage
        for day in range(1, 60)
    ]
    with database.writing() as connection:
        connection.execute(copied, {"job": job.id})
        connection.execute(text("update jobs set priority = length(id) % 3"))
        connection.execute(insert(tables.worker_time), history)
        connection.execute(
            insert(tables.tenants), [{"name": f"t{tenant}", "share": 1.0 + tenant % 3} for tenant in range(tenants)]
        )
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("analyze"))
    for _ in range(tenants // 3):
        leases.claim("w/train", **TRAIN)


if __name__ == "__main__":
    main()

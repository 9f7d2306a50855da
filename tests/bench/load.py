"""How many jobs a service takes a second while a fleet of workers beats, and how long users wait for an answer.

    python tests/bench/load.py --db postgres --seconds 30 --workers 200 --out FILE       (or: make bench-load)

Real processes on this machine: PostgreSQL with fsync (or a SQLite file), Redis, a reconciler, and API processes started
as a cluster starts them. Clients post jobs without files over connections that they keep, each as soon as it has its
answer, or at a fixed rate, and beside that look at jobs at another. Every simulated worker holds the lease of a job in
training: it renews that, looks for orders and says that it is alive, as often as a real one. Afterwards every job that
was answered with 202 must be in the database exactly once, and no worker may have lost its lease. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import redis
from sqlalchemy import func, select, text

from graft_shared.dispatch import queue_for
from graft_shared.jobs import Stage
from graft_shared.store import Database, open_database
from graft_shared.store.migrate import migrate
from graft_shared.store.tables import job_events, jobs
from tests.servers import PostgresServer, RedisServer
from tests.waiting import free_port, wait_until

ROOT = Path(__file__).parents[2]
START_SECONDS = 180.0  # on a machine that does other things
SPEC = {
    "base_model": "meta-llama/Llama-2-7b-hf",
    "dataset": {"hub": "tatsu-lab/alpaca", "split": "train"},
    "lora": {"r": 16, "target_modules": "all-linear"},
    "training": {"max_length": 1024, "max_steps": 1000},
    "metadata": {"team": "search"},
}
VERSIONS = ("fastapi", "starlette", "uvicorn", "pydantic", "SQLAlchemy", "psycopg", "celery", "redis")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to play."""

    db: str
    seconds: float
    workers: int
    apis: int
    clients: int  # connections that post
    client_processes: int
    posts_per_second: float | None
    gets_per_second: float


@dataclass(frozen=True, kw_only=True)
class Service:
    """A service under load: where it is, and the neighbours behind its back."""

    folder: Path
    urls: list[str]
    apis: list[int]  # their process ids
    database: Database
    redis: RedisServer
    environment: dict[str, str]


def main() -> None:
    """Play, judge, report."""
    wanted, out = _arguments()
    with tempfile.TemporaryDirectory(prefix="graft-load-") as folder:
        report = play(Path(folder), wanted)
    print(json.dumps(report, indent=2))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2) + "\n")
    if report["violations"]:
        sys.exit("a promise was broken")


def play(folder: Path, wanted: Wanted) -> dict[str, Any]:
    """Start everything in this folder, load it, and judge; returns the report."""
    with _service(folder, wanted) as service:
        held = [_submit(service.urls[0], number) for number in range(wanted.workers)]
        with _fleet(service, held) as fleet, _reconciler(service):
            busy_before, cpu_before = os.getloadavg()[0], sum(map(_cpu_seconds, service.apis))
            began, stolen_before = time.monotonic(), _stolen_seconds()
            clients, seconds = _load(service, wanted, held)
            stolen_share = (_stolen_seconds() - stolen_before) / (time.monotonic() - began) / (os.cpu_count() or 1)
            cpu = sum(map(_cpu_seconds, service.apis)) - cpu_before
            beats = _end(fleet)
        posts, gets = _together(clients, "posts"), _together(clients, "gets")
        accepted = {name: job_id for client in clients for name, job_id in client["accepted"]}
        return {
            "what": (__doc__ or "").splitlines()[0],
            "command": f"python tests/bench/load.py {' '.join(sys.argv[1:])}",
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{os.cpu_count()} cores, {platform.platform()}",
            "load_average_before": round(busy_before, 2),
            "stolen_share": round(stolen_share, 3),
            "wanted": asdict(wanted),
            "durability": _durability(service.database),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}},
            "seconds": round(seconds, 2),
            "posts": _figures(posts, seconds, good=202),
            "gets": {**_figures(gets, seconds, good=200), "began_late": sum(client["late"] for client in clients)},
            "fleet": beats,
            "api_cpu_ms_per_request": round(
                1000 * cpu / max(1, sum((posts["statuses"] + gets["statuses"]).values())), 2
            ),
            "client_cpu_share": [round(client["cpu_seconds"] / seconds, 2) for client in clients],
            "bells_in_redis": redis.Redis.from_url(service.redis.url).llen(queue_for(Stage.PREPARE, "")),
            "violations": [*_violations(service.database, held, accepted, posts["statuses"]), *beats["violations"]],
        }


@contextlib.contextmanager
def _service(folder: Path, wanted: Wanted) -> Iterator[Service]:
    with contextlib.ExitStack() as ended:
        broker = RedisServer(folder / "redis").start()
        ended.callback(broker.stop)
        database_url = f"sqlite:///{folder / 'graft.db'}"
        if wanted.db == "postgres":
            postgres = PostgresServer(folder / "postgres", fsync=True).start()
            ended.callback(postgres.stop)
            database_url = postgres.new_database("load")
        database = open_database(database_url)
        ended.callback(database.close)
        migrate(database)
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")},
            "PYTHONPATH": str(ROOT),
            "GRAFT_STATE_DIR": str(folder / "state"),
            "GRAFT_DATABASE_URL": database_url,
            "GRAFT_BROKER_URL": broker.url,
        }
        ports = [free_port() for _ in range(wanted.apis)]
        apis = [
            ended.enter_context(_process(folder / f"api-{port}.log", environment, "graft_api", "--port", str(port)))
            for port in ports
        ]
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        wait_until(lambda: all(_is_ready(url) for url in urls), seconds=START_SECONDS, what="the APIs")
        yield Service(folder=folder, urls=urls, apis=apis, database=database, redis=broker, environment=environment)


@contextlib.contextmanager
def _process(log: Path, environment: dict[str, str], module: str, *arguments: str) -> Iterator[int]:
    with log.open("wb") as written:
        command = [sys.executable, "-m", module, *arguments]
        child = subprocess.Popen(command, env=environment, stdout=written, stderr=written)
    try:
        yield child.pid
        if child.poll() is not None:
            raise SystemExit(f"{module} ended by itself: {log.read_text()[-2000:]}")
    finally:
        child.terminate()
        child.wait()


def _cpu_seconds(pid: int) -> float:
    """What a process has used of the processors so far: says more than a rate, on a machine that does other things."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _stolen_seconds() -> float:
    """What other virtual machines took of these processors so far: rates and waits are theirs too where it grows."""
    return int(Path("/proc/stat").read_text().split(maxsplit=9)[8]) / os.sysconf("SC_CLK_TCK")


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def _submit(url: str, number: int) -> str:
    """Post a job that a simulated worker will hold."""
    answer = httpx.post(f"{url}/jobs", json={**SPEC, "name": f"held-{number}"}, timeout=30)
    if answer.status_code != 202:
        raise SystemExit(f"the job was answered with {answer.status_code}: {answer.text}")
    return str(answer.json()["id"])


@contextlib.contextmanager
def _reconciler(service: Service) -> Iterator[None]:
    """A reconciler, once it has made a pass: to start one takes seconds of a core."""
    passed = service.folder / "passed"
    environment = {**service.environment, "GRAFT_RECONCILER_PASSED_PATH": str(passed)}
    with _process(service.folder / "reconciler.log", environment, "graft_shared.reconciler"):
        wait_until(passed.exists, seconds=START_SECONDS, what="the reconciler's first pass")
        yield


@contextlib.contextmanager
def _fleet(service: Service, held: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """The simulated workers, once each of them holds its job."""
    command = [sys.executable, "-m", "tests.bench.load_fleet", str(len(held))]
    child = _talk(command, service.environment)
    try:
        assert child.stdout is not None
        if child.stdout.readline() != "ready\n":
            raise SystemExit("the fleet did not start")
        yield child
    finally:
        child.kill()
        child.wait()


def _load(service: Service, wanted: Wanted, held: Sequence[str]) -> tuple[list[dict[str, Any]], float]:
    """Run the clients to their end; returns what each of them saw, and how long they took."""
    processes = wanted.client_processes
    orders = [
        {
            "number": number,
            "urls": service.urls,
            "spec": SPEC,
            "seconds": wanted.seconds,
            "posting": wanted.clients // processes,
            "posts_per_second": wanted.posts_per_second and wanted.posts_per_second / processes,
            "gets_per_second": wanted.gets_per_second / processes,
            "known": list(held),
        }
        for number in range(processes)
    ]
    command = [sys.executable, "-m", "tests.bench.load_clients"]
    children = [_talk(command, service.environment) for _ in orders]
    began = time.monotonic()
    for child, order in zip(children, orders, strict=True):
        assert child.stdin is not None
        child.stdin.write(json.dumps(order))
        child.stdin.close()
    found = [json.loads(child.stdout.read()) for child in children if child.stdout is not None]
    for child in children:
        child.wait()
    return found, max(client["seconds"] for client in found) if found else time.monotonic() - began


def _end(fleet: subprocess.Popen[str]) -> dict[str, Any]:
    assert fleet.stdin is not None and fleet.stdout is not None
    fleet.stdin.close()
    figures: dict[str, Any] = json.loads(fleet.stdout.read())
    return figures


def _talk(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _together(clients: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
    statuses: Counter[str] = Counter()
    for client in clients:
        statuses.update(client[kind]["statuses"])
    milliseconds = sorted(1000 * seconds for client in clients for seconds in client[kind]["seconds"])
    return {"statuses": statuses, "milliseconds": milliseconds}


def _figures(answers: dict[str, Any], seconds: float, *, good: int) -> dict[str, Any]:
    """Rates and waits of the answers that are as they should be, and how many were not."""
    waits, statuses = answers["milliseconds"], answers["statuses"]
    share = {f"p{percent}_ms": _percentile(waits, percent) for percent in (50, 95, 99)}
    return {
        "answered": statuses[str(good)],
        "per_second": round(statuses[str(good)] / seconds, 1),
        **share,
        "longest_ms": round(waits[-1], 1) if waits else None,
        "errors": {status: count for status, count in statuses.items() if status != str(good)},
    }


def _percentile(ordered: Sequence[float], percent: int) -> float | None:
    return round(ordered[min(len(ordered) - 1, len(ordered) * percent // 100)], 1) if ordered else None


def _durability(database: Database) -> dict[str, str]:
    """What the database itself says of how it keeps a commit."""
    asked = {
        "postgresql": ("server_version", "fsync", "synchronous_commit", "full_page_writes", "wal_sync_method"),
        "sqlite": ("journal_mode", "synchronous", "foreign_keys"),
    }
    dialect = database.engine.dialect.name
    word = "show" if dialect == "postgresql" else "pragma"
    with database.reading() as connection:
        told = {name: str(connection.execute(text(f"{word} {name}")).scalar_one()) for name in asked[dialect]}
        if dialect == "sqlite":
            told["version"] = str(connection.execute(text("select sqlite_version()")).scalar_one())
    return {"database": dialect, **told}


def _violations(
    database: Database, held: Sequence[str], accepted: dict[str, str], statuses: Counter[str]
) -> Iterator[str]:
    """What is not as every 202 promised."""
    if len(accepted) != statuses["202"] or len(set(accepted.values())) != len(accepted):
        yield f"{statuses['202']} jobs were accepted under {len(set(accepted.values()))} ids"
    with database.reading() as connection:
        rows = [(spec["name"], job_id) for job_id, spec in connection.execute(select(jobs.c.id, jobs.c.spec))]
        submitted = select(job_events.c.job_id, func.count()).where(job_events.c.type == "submitted")
        counts = dict(connection.execute(submitted.group_by(job_events.c.job_id)).all())
    found = [row for row in rows if row[1] not in set(held)]
    by_name = Counter(name for name, _ in found)
    yield from (f"{name} is {count} jobs" for name, count in by_name.items() if count > 1)
    yield from (
        f"{job_id} was accepted and is not there" for job_id in set(accepted.values()) - {row[1] for row in rows}
    )
    yield from (
        f"{name} is {job_id}, its client was told otherwise"
        for name, job_id in found
        if accepted.get(name, job_id) != job_id
    )
    yield from (
        f"{job_id} was submitted {counts.get(job_id, 0)} times" for _, job_id in rows if counts.get(job_id) != 1
    )
    if statuses == Counter({"202": len(accepted)}) and len(found) != len(accepted):
        yield f"{len(accepted)} jobs were accepted, and {len(found)} are there"


def _arguments() -> tuple[Wanted, Path | None]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--db", choices=("postgres", "sqlite"), default="postgres")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--apis", type=int, default=2, help="API processes; clients spread over them")
    parser.add_argument("--clients", type=int, default=8, help="connections that post, each one job after the other")
    parser.add_argument("--client-processes", type=int, default=2)
    parser.add_argument(
        "--posts-per-second", type=float, help="all clients together; else as fast as there are answers"
    )
    parser.add_argument("--gets-per-second", type=float, default=50.0)
    parser.add_argument("--out", type=Path)
    given = vars(parser.parse_args())
    out: Path | None = given.pop("out")
    return Wanted(**given), out


if __name__ == "__main__":
    main()

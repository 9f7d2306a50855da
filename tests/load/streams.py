"""`python -m tests.load.streams`: a reader that is cut off a hundred times, and five hundred streams on one API.

Every event must be read once and in order; and what a stream costs the process is measured, in threads, connections,
memory and time, beside what other requests then wait.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import text
from sqlalchemy.pool import QueuePool

from graft_shared.store.migrate import migrate
from tests.api_process import ApiProcess
from tests.api_service import ApiService
from tests.servers import postgres_url

EVERY_SECONDS = 0.05  # between two steps of a job that runs, and between two GETs
QUIET_SECONDS = 60.0  # a stream that says nothing for so long has been forgotten
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a run is."""

    cuts: int = 100
    streams: int = 500
    jobs: int = 50  # that the streams are about
    seconds: float = 20.0  # for which the open streams are watched
    seed: int = 1


@dataclass
class Reader:
    """A client of server-sent events, by bytes: what is not whole yet when the connection goes has not been read."""

    port: int
    job_id: str
    seen: list[int] = field(default_factory=list)
    types: list[str] = field(default_factory=list)
    in_mid_event: int = 0  # cuts that left a part of an event behind

    async def read(self, *, cut_after: int | None = None) -> bool:
        """Read until the stream ends, or for so many bytes; whether the job has ended."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"GET /jobs/{self.job_id}/events HTTP/1.0\r\nhost: localhost\r\naccept: text/event-stream\r\n"
        head += f"last-event-id: {self.seen[-1]}\r\n" if self.seen else ""
        writer.write(f"{head}\r\n".encode())
        try:
            status = (await reader.readuntil(b"\r\n\r\n")).split()[1]
            if status == b"204":
                return True
            assert status == b"200", status
            await self._events(reader, cut_after)
        finally:
            writer.close()
        return bool(self.types) and self.types[-1] in ("succeeded", "failed", "cancelled")

    async def _events(self, reader: asyncio.StreamReader, cut_after: int | None) -> None:
        read, rest = 0, b""
        while cut_after is None or read < cut_after:
            most = 65_536 if cut_after is None else cut_after - read
            chunk = await asyncio.wait_for(reader.read(most), QUIET_SECONDS)
            if not chunk:
                break
            read += len(chunk)
            *whole, rest = (rest + chunk).split(b"\n\n")
            for part in whole:
                self._take(part.decode())
        self.in_mid_event += rest.startswith(b"id:")

    def _take(self, part: str) -> None:
        fields = dict(line.split(": ", 1) for line in part.splitlines() if not line.startswith(":"))
        if "id" in fields:
            assert json.loads(fields["data"])["id"] == int(fields["id"])
            self.seen.append(int(fields["id"]))
            self.types.append(fields["event"])


@dataclass
class RunningJob:
    """A job that takes a step every moment, by a thread that plays its worker."""

    api: ApiService
    id: str

    def __post_init__(self) -> None:
        self.job = self.api.train(self.id, steps=1)
        self.end = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        step = 1
        while not self.end.wait(EVERY_SECONDS):
            step += 1
            lines = [{"step": step, "loss": 3.0 / step}]
            progress = {"step": step, "total_steps": 10_000}
            self.api.leases.record_progress(self.id, self.job.epoch, progress=progress, metrics={}, steps=lines)
        self.api.http.post(f"/jobs/{self.id}/cancel").raise_for_status()
        self.api.leases.settle_cancelled(self.id, self.job.epoch)

    def finish(self) -> None:
        self.end.set()
        self.thread.join()


def run(folder: Path, wanted: Wanted, database_url: str) -> dict[str, Any]:
    """One run in this folder, on PostgreSQL; returns its report."""
    with _service(folder, database_url) as (process, api):
        cut = asyncio.run(_cut_off(process, api, wanted))
        many = asyncio.run(_many(process, api, wanted))
    return {
        "command": f"python -m tests.load.streams --cuts {wanted.cuts} --streams {wanted.streams}",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.platform()}",
        "wanted": asdict(wanted),
        "cut_off": cut,
        "open_at_once": many,
        "violations": [*cut["violations"], *many["violations"]],
    }


@contextmanager
def _service(folder: Path, database_url: str) -> Iterator[tuple[ApiProcess, ApiService]]:
    with ExitStack() as ended:
        process = ApiProcess(folder / "state", GRAFT_DATABASE_URL=database_url)
        api = process.service()
        ended.callback(api.database.close)
        migrate(api.database)
        process.start()
        ended.callback(process.stop, signal.SIGKILL)
        yield process, api


async def _cut_off(process: ApiProcess, api: ApiService, wanted: Wanted) -> dict[str, Any]:
    """Read one running job's stream, cut off again and again; then read it to its end."""
    job = RunningJob(api, api.new_job()["id"])
    reader, draw = Reader(process.port, job.id), random.Random(wanted.seed)
    job.thread.start()
    for _ in range(wanted.cuts):
        await reader.read(cut_after=draw.randint(1, 1500))
    await asyncio.to_thread(job.finish)
    while not await reader.read():
        pass
    last = api.jobs.latest_events("default", job.id, limit=1)[0][0].id
    return {
        "connections": wanted.cuts + 1,
        "cut_in_mid_event": reader.in_mid_event,
        "events": len(reader.seen),
        "violations": _gaps(reader, last),
    }


async def _many(process: ApiProcess, api: ApiService, wanted: Wanted) -> dict[str, Any]:
    """Watch the process with many streams open, of which one job's get something to say all the time."""
    running = RunningJob(api, await asyncio.to_thread(lambda: api.new_job()["id"]))
    ids = [running.id, *(await asyncio.to_thread(_queued, api, wanted.jobs - 1))]
    without = await _measured(process, api, running.id, seconds=min(5.0, wanted.seconds))
    readers = [Reader(process.port, ids[number % len(ids)]) for number in range(wanted.streams)]
    reading = [asyncio.create_task(reader.read()) for reader in readers]
    while not all(reader.seen for reader in readers):
        await asyncio.sleep(EVERY_SECONDS)
        for task in reading:
            if task.done():
                task.result()
    running.thread.start()
    with_streams = await _measured(process, api, running.id, seconds=wanted.seconds)
    await asyncio.to_thread(running.finish)
    await asyncio.to_thread(_cancel, api, ids[1:])
    await asyncio.gather(*reading)
    last = {job_id: api.jobs.latest_events("default", job_id, limit=1)[0][0].id for job_id in ids}
    return {
        "streams": wanted.streams,
        "jobs": wanted.jobs,
        "events_read": sum(len(reader.seen) for reader in readers),
        "without": without,
        "with": with_streams,
        "violations": [gap for reader in readers for gap in _gaps(reader, last[reader.job_id])],
    }


async def _measured(process: ApiProcess, api: ApiService, job_id: str, *, seconds: float) -> dict[str, float]:
    """What the process takes while a client asks for a job again and again."""
    times, cpu, began = [], _cpu_seconds(process.pid), time.monotonic()
    async with httpx.AsyncClient(base_url=process.url, timeout=60) as http:
        while time.monotonic() < began + seconds:
            asked = time.monotonic()
            (await http.get(f"/jobs/{job_id}")).raise_for_status()
            times.append(time.monotonic() - asked)
            await asyncio.sleep(EVERY_SECONDS)
    spent = _cpu_seconds(process.pid) - cpu
    status = _status(process.pid)
    ordered = sorted(times)
    return {
        "gets": len(times),
        "get_p50_ms": round(1000 * ordered[len(ordered) // 2], 1),
        "get_p99_ms": round(1000 * ordered[int(0.99 * len(ordered))], 1),
        "cpu_percent": round(100 * spent / (time.monotonic() - began), 1),
        "memory_mib": round(int(status["VmRSS"].split()[0]) / 1024, 1),
        "threads": int(status["Threads"]),
        "database_connections": await asyncio.to_thread(_connections, api),
    }


def _gaps(reader: Reader, last: int) -> list[str]:
    wanted = list(range(1, last + 1))
    return [] if reader.seen == wanted else [f"{reader.job_id}: read {reader.seen} of {last} events"]


def _queued(api: ApiService, count: int) -> list[str]:
    return [str(api.new_job()["id"]) for _ in range(count)]


def _cancel(api: ApiService, ids: list[str]) -> None:
    for job_id in ids:
        api.http.post(f"/jobs/{job_id}/cancel").raise_for_status()


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def _status(pid: int) -> dict[str, str]:
    return dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())


def _connections(api: ApiService) -> int:
    """The API's: clients of this database, less our own, of which the thread of a running job has one too."""
    query = (
        "select count(*) from pg_stat_activity where datname = current_database() and backend_type = 'client backend'"
    )
    with api.database.reading() as connection:
        pool = api.database.engine.pool
        assert isinstance(pool, QueuePool)
        return int(connection.execute(text(query)).scalar_one()) - pool.checkedout() - pool.checkedin()


def main() -> None:
    """Run and report; exit code 1 if an event was lost, doubled or out of order."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.streams", description=__doc__)
    for name, value in asdict(Wanted()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--out", type=Path)
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    folder = Path(tempfile.mkdtemp(prefix="graft-streams-"))
    with postgres_url(folder, "streams") as url:
        report = run(folder, Wanted(**arguments), url)
    print(json.dumps(report, indent=2))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2) + "\n")
    if report["violations"]:
        sys.exit(f"a stream did not show what has happened; logs are in {folder}")
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

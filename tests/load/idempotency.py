"""`python -m tests.load.idempotency`: one key posted many times at once, to two APIs of which one is killed meanwhile.

Every key must come to one job, whoever answers; a second body under the same key must be refused.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import func, select

from graft_shared.store import Database
from graft_shared.store.migrate import migrate
from graft_shared.store.tables import job_events, jobs
from tests.api_process import ApiProcess
from tests.servers import postgres_url

KEYS_AT_ONCE = 4
CONTESTED_EVERY = 10  # of so many keys one is posted with two bodies
PAUSE_SECONDS = 0.2  # before a POST that was not answered is sent again
KILLED_AT = 0.4  # of the keys
AWAY_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a run is."""

    db: str = "postgres"
    keys: int = 1000
    posts: int = 20  # of each key, at once
    seed: int = 1


@dataclass
class Client:
    """Posts until it is answered, by the next API at each try, as a load balancer would have it."""

    urls: list[str]
    http: httpx.AsyncClient
    statuses: Counter[str] = field(default_factory=Counter)
    sent_again: Counter[str] = field(default_factory=Counter)
    longest_seconds: float = 0.0

    async def post(self, key: str, body: dict[str, Any], first: int) -> httpx.Response:
        began = time.monotonic()
        for number in itertools.count(first):
            try:
                url = f"{self.urls[number % len(self.urls)]}/jobs"
                answer = await self.http.post(url, json=body, headers={"idempotency-key": key})
            except httpx.TransportError as error:
                self.sent_again[type(error).__name__] += 1
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            self.statuses[str(answer.status_code)] += 1
            if answer.status_code != 503:
                break
            self.sent_again["503"] += 1
            await asyncio.sleep(PAUSE_SECONDS)
        self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
        return answer


def run(folder: Path, wanted: Wanted, database_url: str | None) -> dict[str, Any]:
    """One run in this folder; returns its report. Without a URL the database is SQLite in the folder."""
    settings = {"GRAFT_DATABASE_URL": database_url} if database_url is not None else {}
    with ExitStack() as ended:
        apis = [ApiProcess(folder / "state", name=f"api-{number}", **settings) for number in range(2)]
        service = apis[0].service()
        ended.callback(service.database.close)
        migrate(service.database)
        for api in apis:
            ended.callback(lambda api=api: api.stop(signal.SIGKILL))
            api.spawn()
        for api in apis:
            api.wait()
        file_id = str(service.upload().json()["id"])
        began = time.monotonic()
        client, violations = asyncio.run(_post_all(apis, file_id, wanted))
        seconds = time.monotonic() - began
        violations += _in_the_store(service.database, wanted.keys)
    return {
        "command": f"python -m tests.load.idempotency --db {wanted.db} --keys {wanted.keys} --posts {wanted.posts}",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.platform()}",
        "wanted": asdict(wanted),
        "seconds": round(seconds),
        "answers": dict(sorted(client.statuses.items())),
        "sent_again": dict(sorted(client.sent_again.items())),
        "longest_post_seconds": round(client.longest_seconds, 2),
        "violations": violations,
    }


async def _post_all(apis: list[ApiProcess], file_id: str, wanted: Wanted) -> tuple[Client, list[str]]:
    limits = httpx.Limits(max_connections=KEYS_AT_ONCE * wanted.posts)
    async with httpx.AsyncClient(timeout=60, limits=limits) as http:
        client = Client([api.url for api in apis], http)
        draw, turn, done = random.Random(wanted.seed), asyncio.Semaphore(KEYS_AT_ONCE), itertools.count(1)
        half_way = asyncio.Event()

        async def one(number: int, first: int) -> list[str]:
            async with turn:
                found = await _post_one(client, number, first, file_id, wanted.posts)
            if next(done) >= KILLED_AT * wanted.keys:
                half_way.set()
            return found

        faults = asyncio.create_task(_kill_one(apis[1], half_way))
        found = await asyncio.gather(*(one(number, draw.randrange(2)) for number in range(wanted.keys)))
        await faults
    return client, list(itertools.chain.from_iterable(found))


async def _kill_one(api: ApiProcess, moment: asyncio.Event) -> None:
    await moment.wait()
    await asyncio.to_thread(api.stop, signal.SIGKILL)
    await asyncio.sleep(AWAY_SECONDS)
    await asyncio.to_thread(api.start)


async def _post_one(client: Client, number: int, first: int, file_id: str, posts: int) -> list[str]:
    """Post one key at once, sometimes with two bodies; then once more with one that nobody has posted."""
    key = f"key-{number}"
    base = {"base_model": "meta-llama/Llama-2-7b-hf", "dataset": {"file": file_id}}
    bodies = [{**base, "name": key}, {**base, "name": f"{key}, another"}]
    rivals = 2 if number % CONTESTED_EVERY == 0 else 1
    sent = [bodies[turn % rivals] for turn in range(posts)]
    answers = await asyncio.gather(*(client.post(key, body, first + turn) for turn, body in enumerate(sent)))
    late = await client.post(key, {**base, "name": f"{key}, too late"}, first)
    return list(_judged(key, sent, answers, late))


def _judged(key: str, sent: list[dict[str, Any]], answers: list[httpx.Response], late: httpx.Response) -> list[str]:
    """One body has won: all of its POSTs were given one job, and all others were refused."""
    accepted = [answer for answer in answers if answer.status_code == 202]
    ids = {answer.json()["id"] for answer in accepted}
    names = {answer.json()["spec"]["name"] for answer in accepted}
    found = [] if len(ids) == len(names) == 1 else [f"{key} came to the jobs {sorted(ids)}, of {sorted(names)}"]
    for body, answer in [*zip(sent, answers, strict=True), ({"name": None}, late)]:
        wins = body["name"] in names
        code = None if answer.status_code == 202 else answer.json()["error"]["code"]
        if (answer.status_code, code) != ((202, None) if wins else (422, "idempotency_conflict")):
            found.append(f"{key}: {answer.status_code} {code} for {body['name']!r}")
    return found


def _in_the_store(database: Database, keys: int) -> list[str]:
    """There is one job for each key, and each was accepted once."""
    with database.reading() as connection:
        made = connection.execute(select(func.count(), func.count(jobs.c.idempotency_key.distinct()))).one()
        accepted = connection.execute(select(func.count()).where(job_events.c.type == "submitted")).scalar_one()
    counts = (*made, accepted)
    return [] if counts == (keys, keys, keys) else [f"jobs, keys and acceptances are {counts}, and {keys} were wanted"]


def main() -> None:
    """Run and report; exit code 1 if a key came to anything but one job."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.idempotency", description=__doc__)
    parser.add_argument("--db", choices=("sqlite", "postgres"))
    parser.add_argument("--keys", type=int)
    parser.add_argument("--posts", type=int, help="of each key, at once")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", type=Path)
    parser.set_defaults(**asdict(Wanted()))
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    folder = Path(tempfile.mkdtemp(prefix="graft-idempotency-"))
    wanted = Wanted(**arguments)
    with postgres_url(folder, "idempotency") if wanted.db == "postgres" else nullcontext() as url:
        report = run(folder, wanted, url)
    print(json.dumps(report, indent=2))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2) + "\n")
    if report["violations"]:
        sys.exit(f"a key came to more than one job, or to none; logs and database are in {folder}")
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

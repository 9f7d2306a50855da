"""`python -m tests.bench.load_clients`: clients of one process; orders come as JSON on stdin, what they saw is printed.

Plain asyncio and as much HTTP as is needed, because the clients share the machine with what they measure.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

LOOKING = 8  # connections that look at jobs: so many answers may be awaited at once
LATE_SECONDS = 0.1
RECENT = 200  # of the jobs that were accepted last, one is looked at
HELD_SHARE = 0.25  # of looks are at jobs in training
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)
_JOB_ID = re.compile(rb'"id":"(ftjob-\w+)"')


@dataclass
class Answers:
    """How long each answer took, and its status."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)

    def add(self, status: str, seconds: float) -> None:
        """Count one exchange; an answer that never came has taken no time."""
        self.statuses[status] += 1
        if status.isdigit():
            self.seconds.append(seconds)


@dataclass
class Clients:
    """Post as fast as there are answers or as is wanted, and look at a fixed rate, until the time is over."""

    number: int
    urls: list[str]
    spec: dict[str, Any]
    seconds: float
    posting: int
    posts_per_second: float | None  # None: as fast as there are answers
    gets_per_second: float
    known: list[str]
    posts: Answers = field(default_factory=Answers)
    gets: Answers = field(default_factory=Answers)
    accepted: list[tuple[str, str]] = field(default_factory=list)  # name and id
    late: int = 0  # looks that began long after they were due: then the waits are too short
    _ends_at: float = 0.0
    _looks: int = 0
    _posted: int = 0

    async def run(self) -> dict[str, Any]:
        """Do it; returns what was seen."""
        began = time.perf_counter()
        self._ends_at = began + self.seconds
        await asyncio.gather(
            *(self._post(number, began) for number in range(self.posting)),
            *(self._look(n, began) for n in range(LOOKING)),
        )
        return {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time(),
            "posts": vars(self.posts),
            "gets": vars(self.gets),
            "accepted": self.accepted,
            "late": self.late,
        }

    async def _post(self, number: int, start: float) -> None:
        connection = Connection(self.urls[number % len(self.urls)])
        count = 0
        while True:
            if self.posts_per_second is not None:
                due = start + self._posted / self.posts_per_second
                self._posted += 1
                await asyncio.sleep(min(due, self._ends_at) - time.perf_counter())
            if (began := time.perf_counter()) >= self._ends_at:
                return
            name, count = f"load-{self.number}-{number}-{count}", count + 1
            status, body = await connection.ask("POST", "/jobs", json.dumps({**self.spec, "name": name}).encode())
            self.posts.add(status, time.perf_counter() - began)
            if status == "202" and (found := _JOB_ID.search(body)):
                self.accepted.append((name, found[1].decode()))

    async def _look(self, number: int, began: float) -> None:
        """Every look has its moment, and its wait is counted from then on: a slow answer cannot hide those after it."""
        connection = Connection(self.urls[number % len(self.urls)])
        while self.gets_per_second > 0:
            due = began + self._looks / self.gets_per_second
            self._looks += 1
            if due >= self._ends_at:
                return
            await asyncio.sleep(due - time.perf_counter())
            self.late += time.perf_counter() > due + LATE_SECONDS
            status, _ = await connection.ask("GET", f"/jobs/{self._any_job()}")
            self.gets.add(status, time.perf_counter() - due)

    def _any_job(self) -> str:
        if self.known and (not self.accepted or random.random() < HELD_SHARE):
            return random.choice(self.known)
        return random.choice(self.accepted[-RECENT:])[1] if self.accepted else "ftjob-none"


class Connection:
    """One kept connection; made anew after it broke."""

    def __init__(self, url: str) -> None:
        self._host = urlsplit(url)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[str, bytes]:
        """The status and the body; what went wrong, in a word, for an answer that did not come."""
        kind = "content-type: application/json\r\n" if body else ""
        head = f"{method} {path} HTTP/1.1\r\nhost: {self._host.netloc}\r\n{kind}content-length: {len(body)}\r\n\r\n"
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection(self._host.hostname, self._host.port)
            reader, writer = self._streams
            writer.write(head.encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = _LENGTH.search(answer)
            return answer[9:12].decode(), await reader.readexactly(int(length[1]) if length else 0)
        except (OSError, EOFError) as error:
            self._streams = None
            return type(error).__name__, b""


def main() -> None:
    """Read the orders, carry them out, and say what was seen."""
    clients = Clients(**json.load(sys.stdin))
    json.dump(asyncio.run(clients.run()), sys.stdout)


if __name__ == "__main__":
    main()

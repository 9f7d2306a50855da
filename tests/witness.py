"""A witness: looks at the machine's processes again and again, and remembers which trainers lived when."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.invariants import Sighting, Step

LOOK_SECONDS = 0.05
LISTEN_SECONDS = 0.005
STEPS_NAME = "steps.log"
# A trainer stands in its job's folder, `…/work/<worker>/train/<job>-e<epoch>`; one that waits for a job does not.
_WORKDIR = re.compile(r"/work/(?P<worker>[^/]+)/train/(?P<job>ftjob-\w+)-e(?P<epoch>\d+)( \(deleted\))?$")


@dataclass(frozen=True)
class Trainer:
    """A process that trains."""

    job_id: str
    epoch: int
    pid: int
    worker: str


def trainers_below(folder: Path) -> list[Trainer]:
    """Those that live now and work below `folder`; what a trainer starts stands beside it and is none."""
    folders = {pid: stands for pid in pids() if (stands := folder_of(pid)).startswith(f"{folder}/")}
    matches = {pid: match for pid, stands in folders.items() if (match := _WORKDIR.search(stands))}
    return [
        Trainer(job_id=match["job"], epoch=int(match["epoch"]), pid=pid, worker=match["worker"])
        for pid, match in matches.items()
        if _parent(pid) not in matches
    ]


def steps_made(folder: Path) -> list[Step]:
    """Those of all toy trainers (`tests.fakes.child`) that testify in this folder, in the order they were made."""
    log = folder / STEPS_NAME
    return _steps(log.read_text()) if log.exists() else []


@dataclass
class Listener:
    """Hears of every step of the toy trainers that testify in a folder, soon after it was made."""

    folder: Path
    _first: dict[tuple[str, int], Step] = field(default_factory=dict)  # by job and number
    _heard: threading.Condition = field(default_factory=threading.Condition)
    _end: threading.Event = field(default_factory=threading.Event)

    def wait_for(self, job_id: str, number: int, *, seconds: float) -> Step:
        """Return this step of a job as soon as it is made, for the first time; raises TimeoutError."""
        with self._heard:
            if not self._heard.wait_for(lambda: (job_id, number) in self._first, timeout=seconds):
                raise TimeoutError(f"waited {seconds} s for step {number} of {job_id}")
            return self._first[job_id, number]

    def listen(self) -> None:
        """Listen until `leave`."""
        path, read = self.folder / STEPS_NAME, 0
        while not self._end.wait(LISTEN_SECONDS):
            if path.exists() and path.stat().st_size > read:
                with path.open("rb") as log:
                    log.seek(read)
                    found = log.read()
                whole = found[: found.rfind(b"\n") + 1]
                read += len(whole)
                self._note(whole.decode())

    def leave(self) -> None:
        """End it."""
        self._end.set()

    def _note(self, lines: str) -> None:
        with self._heard:
            for step in _steps(lines):
                self._first.setdefault((step.job_id, step.number), step)
            self._heard.notify_all()


@contextmanager
def listening(folder: Path) -> Iterator[Listener]:
    """A listener that listens all the while."""
    listener = Listener(folder)
    thread = threading.Thread(target=listener.listen, name="listener", daemon=True)
    thread.start()
    try:
        yield listener
    finally:
        listener.leave()
        thread.join()


@dataclass
class Witness:
    """Sees the trainers that work below a folder. The store cannot tell of them: what it keeps is fenced."""

    folder: Path
    looks: int = 0
    _seen: dict[Trainer, tuple[float, float]] = field(default_factory=dict)
    _end: threading.Event = field(default_factory=threading.Event)

    def sightings(self) -> list[Sighting]:
        """All trainers that were seen so far."""
        return [
            Sighting(job_id=seen.job_id, epoch=seen.epoch, pid=seen.pid, first_at=first_at, last_at=last_at)
            for seen, (first_at, last_at) in list(self._seen.items())
        ]

    def look(self) -> None:
        """Look once."""
        at = time.monotonic()
        for trainer in trainers_below(self.folder):
            first_at, _ = self._seen.get(trainer, (at, at))
            self._seen[trainer] = (first_at, at)
        self.looks += 1

    def watch(self) -> None:
        """Look until `leave`."""
        while not self._end.wait(LOOK_SECONDS):
            self.look()

    def leave(self) -> None:
        """End the watch."""
        self._end.set()


@contextmanager
def watching(folder: Path) -> Iterator[Witness]:
    """A witness that looks all the while."""
    witness = Witness(folder)
    thread = threading.Thread(target=witness.watch, name="witness", daemon=True)
    thread.start()
    try:
        yield witness
    finally:
        witness.leave()
        thread.join()


def pids() -> list[int]:
    """Of every process of this machine."""
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def folder_of(pid: int) -> str:
    """Where a process stands; empty for one that has gone, or that is a zombie."""
    try:
        return str(Path(f"/proc/{pid}/cwd").readlink())
    except OSError:
        return ""


def _steps(lines: str) -> list[Step]:
    fields = [line.split() for line in lines.splitlines()]
    return [Step(job_id, int(epoch), int(number), float(at)) for job_id, epoch, number, at in fields]


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
